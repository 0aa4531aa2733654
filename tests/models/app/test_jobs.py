"""The line of jobs: their order, their place, and how they end early."""

import threading
import time

import pytest

from models.app import jobs
from models.app.jobs import JobQueue, JobState, QueueFullError

SECONDS = 30.0  # until a test gives up


class Gate:
    """Runs jobs that stay until they are let go, or are to stop."""

    def __init__(self):
        self.begun, self.let_go = [], threading.Event()

    def run(self, job):
        self.begun.append(job.work)
        while not self.let_go.wait(0.01):
            if job.wants_stop:
                return False
        if job.work == "broken":
            raise ValueError("it is broken")
        return True


def wait_for(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def queue(gate):
    queue = JobQueue(gate.run)
    queue.start()
    yield queue
    gate.let_go.set()
    queue.close(SECONDS)


def submit(queue, gate, names):
    """Jobs of one owner each, of which the first has begun."""
    made = [queue.submit(name, name) for name in names]
    wait_for(lambda: gate.begun)
    return made


def test_jobs_run_one_after_another_in_their_order(queue, gate):
    made = submit(queue, gate, ["a", "b", "c"])
    assert gate.begun == ["a"]
    assert [job.state for job in made] == [JobState.RUNNING, *[JobState.WAITING] * 2]
    assert [[other.work for other in queue.before(job)] for job in made] == [
        [],
        ["a"],
        ["a", "b"],
    ]
    gate.let_go.set()
    wait_for(lambda: made[-1].is_over)
    assert gate.begun == ["a", "b", "c"]
    assert {job.state for job in made} == {JobState.DONE}


def test_a_stopped_job_ends_and_the_next_begins(queue, gate):
    first, second = submit(queue, gate, ["a", "b"])
    first.stop()
    wait_for(lambda: gate.begun == ["a", "b"])
    assert first.state is JobState.STOPPED
    assert second.state is JobState.RUNNING


def test_a_job_that_waits_is_taken_out_of_the_line(queue, gate):
    _, second, third = submit(queue, gate, ["a", "b", "c"])
    queue.leave("b")
    assert second.state is JobState.STOPPED
    assert [other.work for other in queue.before(third)] == ["a"]
    gate.let_go.set()
    wait_for(lambda: third.is_over)
    assert gate.begun == ["a", "c"]


def test_what_goes_wrong_is_the_jobs_message_and_the_next_runs(queue, gate):
    gate.let_go.set()
    broken = queue.submit("a", "broken")
    after = queue.submit("b", "fine")
    wait_for(lambda: after.is_over)
    assert (broken.state, broken.message) == (JobState.FAILED, "it is broken")
    assert after.state is JobState.DONE


def test_a_page_has_one_job_at_a_time(queue, gate):
    (first,) = submit(queue, gate, ["a"])
    with pytest.raises(QueueFullError, match="your earlier run is not over"):
        queue.submit("a", "again")
    gate.let_go.set()
    wait_for(lambda: first.is_over)
    queue.submit("a", "again")


def test_the_line_has_an_end(queue, gate, monkeypatch):
    monkeypatch.setattr(jobs, "MOST_WAITING", 2)
    submit(queue, gate, ["a"])
    queue.submit("b", "b")
    queue.submit("c", "c")
    with pytest.raises(QueueFullError, match="2 runs are waiting already"):
        queue.submit("d", "d")


def test_a_job_that_nobody_looks_at_is_freed():
    """With a clock by hand: 61 s pass, in which one of two pages gives a sign."""
    now = [0.0]
    queue = JobQueue(lambda job: True, clock=lambda: now[0])  # not started
    looked_at, left = queue.submit("a", "a"), queue.submit("b", "b")
    now[0] = 59.0
    looked_at.touch()
    assert not left.wants_stop
    now[0] = 61.0
    assert queue.before(looked_at) == []
    assert left.state is JobState.STOPPED
    assert looked_at.state is JobState.WAITING


def test_without_a_model_every_job_says_so():
    def prepare():
        raise ValueError("there are no weights")

    ran = []
    queue = JobQueue(lambda job: bool(ran.append(job)), prepare=prepare)
    queue.start()
    job = queue.submit("a", "a")
    wait_for(lambda: job.is_over)
    assert (job.state, job.message) == (JobState.FAILED, "there are no weights")
    assert not ran
    queue.close(SECONDS)


def test_closing_stops_all_jobs(gate):
    queue = JobQueue(gate.run)
    queue.start()
    made = submit(queue, gate, ["a", "b"])
    queue.close(SECONDS)
    assert made[0].state is JobState.STOPPED
    assert gate.begun == ["a"]
