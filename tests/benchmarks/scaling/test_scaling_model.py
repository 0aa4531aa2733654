"""The model of a step's time, by sums worked out by hand."""

import dataclasses

import pytest

from benchmarks.scaling.model import (
    Link,
    Parts,
    Video,
    errors,
    exchanges_ms,
    fastest,
    links,
    meshes,
    parts_of,
    step_ms,
)

# Two rows, each with 1e6 tokens of 500 channels: a gigabyte in bfloat16.
VIDEO = Video(tokens=1_000_000, channels=500, heads=40, layers=10, rows=2)
PARTS = Parts(
    step_ms=8000.0,
    fixed_ms=80.0,
    links={2: Link(latency_ms=0.5, gb_per_s=100.0)},
    added=0.5,
    infiniband_gb_per_s=25.0,
)


def test_devices_send_what_is_not_theirs():
    # Each of two has 0.5 GB of a row and sends half of it; in 40 all-to-alls, 2 rows.
    assert VIDEO.exchanged_bytes(2, 1) == 2 * 0.25e9
    assert VIDEO.sent_gb(2, 1) == 40 * 0.5
    # Each of four has 0.25 GB of a row and sends three quarters of it.
    assert VIDEO.exchanged_bytes(4, 2) == 0.1875e9


@pytest.mark.parametrize(
    ("sequence", "guidance", "expected"),
    [
        (1, 2, 0.0),
        # 0.25 GB at 100 GB/s are 2.5 ms; 40 all-to-alls in each of two calls.
        (2, 1, 80 * (0.5 + 2.5)),
        # 1/8 GB of a row, of which 7/8 are sent: 0.109375 GB, in one call.
        (8, 2, 40 * (0.5 + 1.09375)),
        # 1/20 GB: 2.5 MB to each. The last host has 4 of the 20 devices, which send to
        # 16 others at 25 GB/s: 1.6 ms; that is longer than 7.5 MB at 100 GB/s.
        (20, 2, 40 * (0.5 + 1.6)),
    ],
    ids=["guidance", "two", "host", "hosts"],
)
def test_exchanges(sequence, guidance, expected):
    assert exchanges_ms(PARTS, VIDEO, sequence, guidance) == pytest.approx(expected)


def test_steps():
    assert step_ms(PARTS, VIDEO, 1, 1) == 8000
    # Guidance shares all of it, and sends nothing that counts.
    assert step_ms(PARTS, VIDEO, 1, 2) == 4000
    # Of 7,920 ms half, 80 ms, and half of 240 ms of exchanges.
    assert step_ms(PARTS, VIDEO, 2, 1) == pytest.approx(3960 + 80 + 120)


def test_meshes_divide_devices_heads_and_rows():
    assert meshes(VIDEO, 8) == [(8, 1), (4, 2)]
    assert meshes(VIDEO, 16) == [(8, 2)]  # 16 does not divide 40 heads
    assert meshes(VIDEO, 64) == []
    assert meshes(dataclasses.replace(VIDEO, rows=1), 16) == []
    assert fastest(PARTS, VIDEO, 8) == (4, 2)
    assert fastest(PARTS, VIDEO, 64) is None


def test_parts_come_from_a_record():
    """A start of 1 ms, 10 ms per gigabyte sent, 2 ms of copies; half of it is added.

    Two GPUs have 0.8 GB each of which half is sent, so copies take 400 GB/s.
    """
    record = {
        "wan": {
            "one device": {"mesh": None, "samples_ms": [7900.0, 8000.0, 9000.0]},
            "step_sequence_2": {
                "mesh": "sequence=2,guidance=1",
                # 0.25 GB are sent of 0.5 GB.
                "samples_ms": [3960 + 80 + 0.5 * 80 * (1 + 2.5 + 1.25)],
            },
            "step_guidance_2": {
                "mesh": "sequence=1,guidance=2",
                "samples_ms": [5000.0],
            },
            "weights": {"mesh": "sequence=2,guidance=1", "samples_ms": [4200.0]},
        },
        "short": {"one device": {"samples_ms": [80.0]}},
        "links": {
            "all-to-all, 2": {"devices": 2, "sent_bytes": 0.4e9, "ms": 5.0},
            "all-to-all of 1/4, 2": {"devices": 2, "sent_bytes": 0.1e9, "ms": 2.0},
            "all-to-all of 1/8, 2": {"devices": 2, "sent_bytes": 0.05e9, "ms": 1.9},
            "to heads, 2": {"devices": 2, "sent_bytes": 0.4e9, "ms": 6.5},
            "to tokens, 2": {"devices": 2, "sent_bytes": 0.4e9, "ms": 7.5},
            "ppermute, 2": {"devices": 2, "sent_bytes": 0.4e9, "ms": 1.0},
        },
    }
    (count, link), *others = links(record).items()
    assert (count, others) == (2, [])
    assert dataclasses.astuple(link) == pytest.approx((1.0, 100.0, 400.0))
    parts = parts_of(record, VIDEO)
    assert (parts.step_ms, parts.fixed_ms) == (8000.0, 80.0)
    assert parts.added == pytest.approx(0.5)
    assert errors(record, parts, VIDEO, "wan") == {
        "step_sequence_2": pytest.approx(0.0),
        "step_guidance_2": pytest.approx(4000 / 5000 - 1),
    }
    with pytest.raises(ValueError, match="--parts wan links short"):
        parts_of(record | {"links": {}}, VIDEO)
