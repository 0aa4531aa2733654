"""Jobs of the page: they wait in line, run one after another, and can be stopped."""

import collections
import dataclasses
import enum
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_WAITING = 20  # jobs in line
# Without a sign of the page that a job is for. A page that is closed says so; this is
# for one that cannot, and longer than a machine may be too busy to listen.
IDLE_SECONDS = 60.0


class JobState(enum.Enum):
    """State of a job; the last three are final."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """State of a running job, as a page shows it.

    Attributes:
      stage: Words for what is being done.
      step: Steps that are done in this run.
      num_steps: Steps of this run.
      kept_share: Share of token pairs that the last step computed.
      seconds_left: Time that the job's steps take from here; None while not known.
      preview: A picture of the video so far, as JPEG.
    """

    stage: str
    step: int = 0
    num_steps: int = 0
    kept_share: float | None = None
    seconds_left: float | None = None
    preview: bytes | None = None


class QueueFullError(RuntimeError):
    """The line has no place left."""


class Job:
    """One request of a page. The queue's thread changes it, pages read it.

    Attributes:
      owner: Name of the page that it is for.
      work: What is to be done; the queue does not look into it.
      state: State of the job.
      progress: How far it is; None before it runs.
      message: Why it failed, for people.
      notes: Remarks about the settings.
      folder: Where its files are; None before there are any.
    """

    def __init__(self, owner: str, work: Any, *, clock: Callable[[], float]):
        self.owner = owner
        self.work = work
        self.state = JobState.WAITING
        self.progress: Progress | None = None
        self.message: str | None = None
        self.notes: list[str] = []
        self.folder: Path | None = None
        self._clock = clock
        self._seen = clock()
        self._stop = threading.Event()

    def touch(self) -> None:
        """Notes that its page is still there."""
        self._seen = self._clock()

    def stop(self) -> None:
        """Asks it to stop after its present step, or not to begin."""
        self._stop.set()

    @property
    def wants_stop(self) -> bool:
        """Whether it was asked to stop, or nobody has looked at it for long."""
        return self._stop.is_set() or self._clock() - self._seen > IDLE_SECONDS

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in (JobState.DONE, JobState.STOPPED, JobState.FAILED)


class JobQueue:
    """Runs jobs one after another in a thread of its own.

    Args:
      run: Runs a job, and returns whether it was done and not stopped. What it raises
        is the message of a job that failed.
      prepare: Called once in that thread before the first job, such as to load a model.
      clock: Seconds, as `time.monotonic` gives them.
    """

    def __init__(
        self,
        run: Callable[[Job], bool],
        *,
        prepare: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._run = run
        self._prepare = prepare
        self._clock = clock
        self._line: collections.deque[Job] = collections.deque()
        self._current: Job | None = None
        self._changed = threading.Condition()
        self._is_open = True
        # A daemon: Ctrl-C does not wait for a step of minutes.
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, owner: str, work: Any) -> Job:
        """Puts a job at the end of the line.

        Raises:
          QueueFullError: Too many wait, or the owner has a job already.
        """
        with self._changed:
            self._drop_left_ones()
            if any(job.owner == owner for job in self._all()):
                raise QueueFullError("your earlier run is not over yet: stop it first")
            if len(self._line) >= MOST_WAITING:
                raise QueueFullError(
                    f"{len(self._line)} runs are waiting already; try again later"
                )
            job = Job(owner, work, clock=self._clock)
            self._line.append(job)
            self._changed.notify_all()
            return job

    def before(self, job: Job) -> list[Job]:
        """Returns the jobs that must be over before one begins; none if it has."""
        with self._changed:
            self._drop_left_ones()
            if job not in self._line:
                return []
            everyone = self._all()
            return everyone[: everyone.index(job)]

    def leave(self, owner: str) -> None:
        """Stops the jobs of a page that is gone."""
        with self._changed:
            for job in self._all():
                if job.owner == owner:
                    job.stop()
            self._drop_left_ones()

    def close(self, seconds: float) -> None:
        """Stops all jobs, and waits for some time for the one that runs."""
        with self._changed:
            self._is_open = False
            for job in self._all():
                job.stop()
            self._changed.notify_all()
        self._thread.join(seconds)

    def _all(self) -> list[Job]:
        return [*([] if self._current is None else [self._current]), *self._line]

    def _drop_left_ones(self) -> None:
        for job in [job for job in self._line if job.wants_stop]:
            self._line.remove(job)
            job.state = JobState.STOPPED

    def _serve(self) -> None:
        try:
            self._prepare()
            reason = None
        except Exception as error:  # the page says it; each job fails with it
            reason = str(error) or type(error).__name__
        while (job := self._next()) is not None:
            try:
                if reason is not None:
                    raise RuntimeError(reason)
                state = JobState.DONE if self._run(job) else JobState.STOPPED
            except Exception as error:
                job.message = str(error) or type(error).__name__
                state = JobState.FAILED
            with self._changed:
                job.state = state
                self._current = None

    def _next(self) -> Job | None:
        """Waits for a job and takes it; None if the queue was closed."""
        with self._changed:
            while True:
                self._drop_left_ones()
                if not self._is_open:
                    return None
                if self._line:
                    job = self._current = self._line.popleft()
                    job.state = JobState.RUNNING
                    return job
                self._changed.wait()
