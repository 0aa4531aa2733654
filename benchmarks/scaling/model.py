"""A model of the time of a step on many GPUs, from parts that one run has measured.

    time(N, G) = (step - fixed) / (N G) + fixed + exposed * transfers

`N` devices share tokens and `G` the rows of a call, such as prompt and negative prompt.
All of it comes from a record of `benchmarks.scaling.run`:

  step       the step on one device, whose rows are calls of their own
  fixed      a step of a video of a few tokens: weights that are read, launches, text;
             of each row, so `G` devices share it
  transfers  the all-to-alls of all layers: what a device sends to others of its host
             over NVLink, and to those of other hosts over InfiniBand, at once; a line
             through the times of transfers of several sizes gives NVLink's rate, and
             InfiniBand's is given
  exposed    the share of that time in which a device waits, as XLA runs other work
             meanwhile. Fitted to Wan's step with `sequence` alone; other measured steps
             say how far it holds

A device computes its rows, tokens and heads as fast as one device does: products with
few rows, and attention of few heads, are slower than that.
"""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

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
    """Times of an all-to-all on one host: a start, and a rate."""

    latency_ms: float
    gb_per_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Measured parts of a model's step.

    Attributes:
      step_ms: On one device.
      fixed_ms: That does not shrink with the tokens.
      links: All-to-alls on one host, by number of devices.
      exposed: Share of the transfers during which devices wait.
      infiniband_gb_per_s: Rate between hosts, of each device.
    """

    step_ms: float
    fixed_ms: float
    links: Mapping[int, Link]
    exposed: float = 1.0
    infiniband_gb_per_s: float = INFINIBAND_GB_PER_S


def transfers_ms(parts: Parts, video: Video, sequence: int, guidance: int) -> float:
    """Returns the time of all all-to-alls of a step, as if nothing ran meanwhile."""
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
    one_ms = link.latency_ms + max(nvlink_ms, infiniband_ms)
    return EXCHANGES * video.layers * calls * one_ms


def step_ms(parts: Parts, video: Video, sequence: int, guidance: int) -> float:
    """Returns the time of a step on `sequence` times `guidance` devices."""
    shared = (parts.step_ms - parts.fixed_ms) / (sequence * guidance)
    waiting = parts.exposed * transfers_ms(parts, video, sequence, guidance)
    return shared + parts.fixed_ms / guidance + waiting


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
    """Returns the lines through the measured all-to-alls, by number of devices."""
    points: dict[int, list[tuple[float, float]]] = {}
    for name, found in record.get("links", {}).items():
        if name.startswith("all-to-all") and "ms" in found:
            point = found["sent_bytes"], found["ms"]
            points.setdefault(found["devices"], []).append(point)
    lines = {}
    for count, measured in points.items():
        num_bytes, ms = np.array(sorted(measured)).T
        slope = ms[-1] / num_bytes[-1]
        if len(measured) > 1:
            slope = np.polyfit(num_bytes, ms, 1)[0]
        latency = max(float(ms[-1] - slope * num_bytes[-1]), 0.0)
        lines[count] = Link(latency_ms=latency, gb_per_s=float(1e-6 / slope))
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
    unhidden = transfers_ms(parts, wan, count, 1)
    without = step_ms(dataclasses.replace(parts, exposed=0.0), wan, count, 1)
    return dataclasses.replace(parts, exposed=(measured - without) / unhidden)


def parts_of_hunyuan(record: Record, wan: Parts, scale: float) -> Parts | None:
    """Returns the parts of HunyuanVideo's step; None if it was not measured.

    Args:
      record: Of a run.
      wan: Wan's parts, of which transfers are the same.
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
      part: "wan", "hunyuan" or "variants".
    """
    found = {}
    for name, step in record.get(part, {}).items():
        measured = median_ms(record, part, name)
        if measured is None or not step.get("mesh") or "step" not in name:
            continue
        waits = "waiting" in name
        own = dataclasses.replace(parts, exposed=1.0) if waits else parts
        if part == "variants" and not waits:
            continue  # its transfers are others
        found[name] = step_ms(own, video, *mesh_of(step["mesh"])) / measured - 1
    return found
