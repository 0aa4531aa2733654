"""Expected times, worked out by hand from made-up reports."""

import copy

import pytest

from models.app.timing import TimeBook, in_words
from models.diffusion.sampling import Sampling

SMALL = Sampling(frames=8, height=32, width=32, num_steps=10)
HARDWARE = {"processor": "P", "device": "D"}
SHARES = {"dense": [1.0, 1.0], "sparse": [1.0, 0.2]}


def run_of(*steps):
    """Times of a run from pairs of a kind and milliseconds."""
    return {
        "time_ms_per_step": [time_ms for _, time_ms in steps],
        "kept_share_per_step_and_layer": [SHARES[kind] for kind, _ in steps],
    }


# Dense steps of 100, 100, 120 and 100 ms, sparse ones of 40 and 44.
REPORT = {
    "checkpoint": "shipped",
    "hardware": HARDWARE | {"cpu_cores": 2},
    "sampling": {"frames": 8, "height": 32, "width": 32, "guidance": 4.0},
    "dense": run_of(("dense", 100), ("dense", 120), ("dense", 100)),
    "sparse": run_of(("dense", 100), ("sparse", 40), ("sparse", 44)),
}


def book(*reports):
    book = TimeBook("shipped", HARDWARE)
    book.add(reports)
    return book


def changed(**changes):
    report = copy.deepcopy(REPORT)
    report.update(changes)
    return report


@pytest.mark.parametrize(
    ("mode", "seconds"), [("dense", 1.0), ("sparse", 0.42), ("compare", 1.42)]
)
def test_times_of_the_same_size(mode, seconds):
    expected = book(REPORT).expect(SMALL, mode)
    assert expected.seconds == pytest.approx(seconds)
    assert expected.bound == "about"


@pytest.mark.parametrize(
    ("frames", "seconds", "bound"), [(16, 2.0, "at least"), (4, 0.5, "at most")]
)
def test_times_of_another_size_are_bounds(frames, seconds, bound):
    sampling = Sampling(frames=frames, height=32, width=32, num_steps=10)
    expected = book(REPORT).expect(sampling, "dense")
    assert expected.seconds == pytest.approx(seconds)
    assert expected.bound == bound


def test_sparse_steps_that_were_never_run_are_as_slow_as_dense_ones():
    """A dense run alone tells the times of both."""
    alone = changed(**REPORT["dense"], sparse=None, dense=None)
    assert book(alone).expect(SMALL, "sparse").seconds == pytest.approx(1.0)


def test_the_latest_report_of_a_size_counts():
    later = changed(dense=run_of(("dense", 200), ("dense", 200), ("dense", 200)))
    later["sparse"] = run_of(("dense", 200), ("sparse", 40), ("sparse", 44))
    assert book(REPORT, later).expect(SMALL, "dense").seconds == pytest.approx(2.0)


def test_steps_that_a_cache_skips_are_no_sparse_ones():
    skipping = copy.deepcopy(REPORT)
    skipping["sparse"]["time_ms_per_step"] += [1, 1, 1]
    skipping["sparse"]["kept_share_per_step_and_layer"] += [[0.0, 0.0]] * 3
    assert book(skipping).expect(SMALL, "sparse").seconds == pytest.approx(0.42)


@pytest.mark.parametrize(
    ("frames", "bound"), [(8, "at most"), (4, "at most"), (16, None)]
)
def test_a_run_that_may_skip_steps_takes_at_most_so_long(frames, bound):
    sampling = Sampling(frames=frames, height=32, width=32, num_steps=10)
    expected = book(REPORT).expect(sampling, "dense", may_skip=True)
    assert (expected and expected.bound) == bound


def test_each_precision_has_times_of_its_own():
    other = changed(linears="float8", dense=run_of(*[("dense", 50)] * 3))
    both = book(REPORT, other)
    assert both.expect(SMALL, "dense").seconds == pytest.approx(1.0)
    expected = both.expect(SMALL, "dense", linears="float8")
    assert expected.seconds == pytest.approx(0.5)
    assert book(REPORT).expect(SMALL, "dense", linears="float8") is None


@pytest.mark.parametrize(
    "report",
    [
        changed(checkpoint="another"),
        changed(hardware={"processor": "another", "device": "D"}),
        changed(hardware=HARDWARE | {"device": "another"}),
        changed(sampling=REPORT["sampling"] | {"guidance": 1.0}),
        changed(sampling={}),
        changed(sampling=None),
        changed(dense=run_of(), sparse=run_of()),
        changed(dense={"time_ms_per_step": ["fast"]}, sparse=None),
        {},
        {"hardware": None, "checkpoint": "shipped"},
    ],
)
def test_reports_that_say_nothing(report):
    assert book(report).expect(SMALL, "dense") is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 s"),
        (99.4, "99 s"),
        (100, "1 min 40 s"),
        (120, "2 min"),
        (3000, "50 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words
