"""A model of the time of a step on many GPUs, from parts that one run has measured.

    time(N, G) = (step - fixed) / (N G) + fixed / G + added * exchanges

`N` devices share tokens and `G` the rows of a call, such as prompt and negative prompt.
All of it comes from a record of `benchmarks.scaling.run`:

  step       the step on one device, whose rows are calls of their own
  fixed      a step of a video of a few tokens: weights that are read, launches, text;
             of each row, so `G` devices share it
  exchanges  the all-to-alls of all layers by themselves: what a device sends to others
             of its host over NVLink, and to those of other hosts over InfiniBand, at
             once, and copies that put parts together. A line through the times of two
             sizes gives NVLink's rate; InfiniBand's is given
  added      what exchanges add to a step over the time that they take by themselves:
             less where XLA runs other work meanwhile, more where devices wait for each
             other or transfers and work share a GPU. Fitted to Wan's step with
             `sequence` alone; other measured steps say how far it holds

A device computes its rows, tokens and heads as fast as one device does: products with
few rows, and attention of few heads, are slower than that.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]

HOST = 8  # GPUs that NVLink joins
INFINIBAND_GB_PER_S = 40.0  # of a GPU: of 400 gigabits, what transfers reach
EXCHANGES = 4  # of a layer: queries, keys, values, output
ELEMENT_BYTES = 2  # bfloat16
ONE = "one device"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video:
    """What a step of a model exchanges.

    Attributes:
      tokens: Of the video.
      channels: Of a token in attention.
      heads: Of attention, which `sequence` divides.
      layers: With self-attention.
      rows: Of a step: 2 with guidance.
    """

    tokens: int
    channels: int
    heads: int
    layers: int
    rows: int

    def exchanged_bytes(self, sequence: int, guidance: int) -> float:
        """Returns what each device sends to all others in one all-to-all."""
        own = self.tokens * self.channels * ELEMENT_BYTES / sequence
        return self.rows / guidance * own * (sequence - 1) / sequence

    def sent_gb(self, sequence: int, guidance: int) -> float:
        """Returns what each device sends in a step."""
        count = EXCHANGES * self.layers
        return count * self.exchanged_bytes(sequence, guidance) / 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """Times of an all-to-all on one host.

    Attributes:
      latency_ms: Of its start.
      gb_per_s: Rate of what a device sends.
      reordered_gb_per_s: Rate of the copies around it: of all that a device has.
    """

    latency_ms: float
    gb_per_s: float
    reordered_gb_per_s: float = math.inf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Measured parts of a model's step.

    Attributes:
      step_ms: On one device.
      fixed_ms: That does not shrink with the tokens.
      links: All-to-alls on one host, by number of devices.
      added: What exchanges add to a step, over their time by themselves.
      infiniband_gb_per_s: Rate between hosts, of each device.
    """

    step_ms: float
    fixed_ms: float
    links: Mapping[int, Link]
    added: float = 1.0
    infiniband_gb_per_s: float = INFINIBAND_GB_PER_S


def exchanges_ms(parts: Parts, video: Video, sequence: int, guidance: int) -> float:
    """Returns the time of all exchanges of a step by themselves."""
    if sequence == 1:
        return 0.0
    on_host = sequence % HOST or HOST if sequence > HOST else sequence
    counts = sorted(parts.links)
    link = parts.links[max([n for n in counts if n <= sequence], default=counts[0])]
    # To each of the others the same; two calls of a row each are two transfers.
    calls = 1 if guidance > 1 else video.rows
    to_each = video.exchanged_bytes(sequence, guidance) / (sequence - 1) / calls
    nvlink_ms = (on_host - 1) * to_each / link.gb_per_s / 1e6
    infiniband_ms = (sequence - on_host) * to_each / parts.infiniband_gb_per_s / 1e6
    copies_ms = sequence * to_each / link.reordered_gb_per_s / 1e6
    one_ms = link.latency_ms + max(nvlink_ms, infiniband_ms) + copies_ms
    return EXCHANGES * video.layers * calls * one_ms


def step_ms(parts: Parts, video: Video, sequence: int, guidance: int) -> float:
    """Returns the time of a step on `sequence` times `guidance` devices."""
    shared = (parts.step_ms - parts.fixed_ms) / (sequence * guidance)
    added = parts.added * exchanges_ms(parts, video, sequence, guidance)
    return shared + parts.fixed_ms / guidance + added


def meshes(video: Video, devices: int) -> list[tuple[int, int]]:
    """Returns sizes of `sequence` and `guidance` that so many devices can have."""
    return [
        (devices // guidance, guidance)
        for guidance in (1, 2)
        if devices % guidance == 0
        and video.rows % guidance == 0
        and video.heads % (devices // guidance) == 0
    ]


def fastest(parts: Parts, video: Video, devices: int) -> tuple[int, int] | None:
    """Returns the mesh of so many devices with the shortest step; None if none fits."""
    fitting = meshes(video, devices)
    return min(fitting, key=lambda mesh: step_ms(parts, video, *mesh), default=None)


def links(record: Record) -> dict[int, Link]:
    """Returns what measured all-to-alls say, by number of devices.

    Lines go through the two largest: those that are smaller take as long as a call.
    """
    points: dict[int, list[tuple[float, float]]] = {}
    for name, found in record.get("links", {}).items():
        if name.startswith("all-to-all") and "ms" in found:
            point = found["sent_bytes"], found["ms"]
            points.setdefault(found["devices"], []).append(point)
    lines = {}
    for count, measured in points.items():
        most, most_ms = max(measured)
        less, less_ms = max([p for p in measured if p[0] < most], default=(0.0, 0.0))
        slope = (most_ms - less_ms) / (most - less)
        whole = [
            record["links"].get(f"to {name}, {count}", {}).get("ms", most_ms)
            for name in ("heads", "tokens")
        ]
        copies_ms = statistics.mean(whole) - most_ms
        own = most * count / (count - 1)
        lines[count] = Link(
            latency_ms=max(most_ms - slope * most, 0.0),
            gb_per_s=1e-6 / slope,
            reordered_gb_per_s=1e-6 * own / copies_ms if copies_ms > 0 else math.inf,
        )
    return lines


def median_ms(record: Record, part: str, name: str) -> float | None:
    """Returns the time of a step; None if it was not measured."""
    samples = record.get(part, {}).get(name, {}).get("samples_ms")
    return statistics.median(samples) if samples else None


def parts_of(record: Record, wan: Video) -> Parts:
    """Returns the parts of Wan's step.

    Args:
      record: Of a run with the parts "wan" and "links".
      wan: Its video.

    Raises:
      ValueError: The step on one device or the transfers are missing.
    """
    step = median_ms(record, "wan", ONE)
    lines = links(record)
    if step is None or not lines:
        raise ValueError(
            "the record has no step of Wan on one device, or no all-to-all: run "
            "benchmarks.scaling.run with --parts wan links short"
        )
    fixed = median_ms(record, "short", ONE) or 0.0
    parts = Parts(step_ms=step, fixed_ms=fixed, links=lines)
    count = min(lines)
    measured = median_ms(record, "wan", f"step_sequence_{count}")
    if measured is None:
        return parts
    alone = exchanges_ms(parts, wan, count, 1)
    without = step_ms(dataclasses.replace(parts, added=0.0), wan, count, 1)
    return dataclasses.replace(parts, added=(measured - without) / alone)


def parts_of_hunyuan(record: Record, wan: Parts, scale: float) -> Parts | None:
    """Returns the parts of HunyuanVideo's step; None if it was not measured.

    Args:
      record: Of a run.
      wan: Wan's parts, of which links are the same.
      scale: Weights that a step of HunyuanVideo reads over those of a step of Wan.
    """
    step = median_ms(record, "hunyuan", ONE)
    if step is None:
        return None
    fixed = wan.fixed_ms * scale
    return dataclasses.replace(wan, step_ms=step, fixed_ms=fixed)


def mesh_of(text: str) -> tuple[int, int]:
    """Reads `sequence` and `guidance` of a mesh as records have them."""
    sizes = dict(part.split("=") for part in text.split(","))
    return int(sizes["sequence"]), int(sizes["guidance"])


def errors(record: Record, parts: Parts, video: Video, part: str) -> dict[str, float]:
    """Returns by what share the model's time of measured steps is too long.

    Args:
      record: Of a run.
      parts: Of the model of the part.
      video: Its video.
      part: "wan" or "hunyuan".
    """
    found = {}
    for name, step in record.get(part, {}).items():
        measured = median_ms(record, part, name)
        if measured is None or not step.get("mesh") or "step" not in name:
            continue
        found[name] = step_ms(parts, video, *mesh_of(step["mesh"])) / measured - 1
    return found
