"""Outside of jit a second call compiles nothing, and calls keep no memory."""

import collections
import gc

import jax
import pytest

from draft_jax import VideoGrid
from draft_jax.draft import head_chunks
from tests.cases import mostly_nightly
from tests.draft_jax import public_calls
from tests.draft_jax.public_calls import CALLED_BY, CALLS, NOT_COMPUTED, PUBLIC

GRID = VideoGrid(2, 3, 5, tile=(2, 2), text_length=3)  # S = 12, edges, text
PAGE_BYTES = 4096


@pytest.fixture(scope="module")
def inputs():
    return public_calls.make_inputs(GRID)


@pytest.fixture
def compiled():
    """Counts what jax traces and compiles, by the name of the event."""
    events = collections.Counter()

    def count(event, duration, **_):
        events[event.rpartition("/")[2]] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    yield events
    jax.monitoring.unregister_event_duration_listener(count)


def test_each_public_function_is_called():
    called = {name.split(" ")[0] for name in CALLS} | {*CALLED_BY} | NOT_COMPUTED
    assert called == PUBLIC


def check_second_call(call, inputs, compiled):
    jax.block_until_ready(call(inputs))
    compiled.clear()
    jax.block_until_ready(call(inputs))
    assert compiled["backend_compile_duration"] == 0
    assert compiled["jaxpr_trace_duration"] == 0


@pytest.mark.parametrize("name", CALLS)
def test_a_second_call_compiles_nothing(name, inputs, compiled):
    check_second_call(CALLS[name], inputs, compiled)


@pytest.mark.nightly
def test_few_heads_at_a_time_compile_nothing(monkeypatch, inputs, compiled):
    monkeypatch.setattr(head_chunks, "MAX_CHUNK_BYTES", 4 * 12 * 12)  # one head
    check_second_call(CALLS["draft_jax.draft_attention top_p"], inputs, compiled)
    compiled.clear()
    monkeypatch.setattr(head_chunks, "MAX_CHUNK_BYTES", 2 * 4 * 12 * 12)
    CALLS["draft_jax.draft_attention top_p"](inputs)
    assert compiled["backend_compile_duration"] == 1, "another number of heads"


def test_compilations_are_counted(compiled):
    jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
    assert compiled["backend_compile_duration"] == 1
    assert compiled["jaxpr_trace_duration"] >= 1


def resident_bytes():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE_BYTES


@pytest.mark.nightly
@pytest.mark.parametrize(
    "selection", mostly_nightly(["percentile", "top_p"], ["top_p"])
)
def test_calls_keep_no_memory(selection, inputs):
    """700 MB in 600 calls, where each call compiled its loops."""
    call = CALLS[f"draft_jax.draft_attention {selection}"]

    def run(times):
        for _ in range(times):
            jax.block_until_ready(call(inputs))

    run(20)
    before = resident_bytes()
    run(500)
    assert resident_bytes() - before < 5e6
