"""Time and memory to decode and encode a video with HunyuanVideo's autoencoder.

    python -m benchmarks.hunyuan.vae --output benchmarks/results/hunyuan_vae_h100.json
    python -m benchmarks.hunyuan.vae --what tile --batches 1 2 4
    python -m benchmarks.hunyuan.vae --tiny        # any machine, a minute

Random weights and latents, the original's tiles; processes as in
`benchmarks.common.autoencoders`. What a record of a whole video has:

  compile_s    the first run, compilation and choice of algorithms included
  total_s      the whole video, into the host's memory (decode) or from it (encode)
  pflop        arithmetic of all tiles, by XLA's count; GPUs do not count
  tflops       that over total_s
  error        of a failed case, its cause
  difference   of narrow dtypes: relative L2 and greatest difference of the largest
               tile to float32 at matmul precision "highest", of the same weights
  peak_gib     of the device since the process began: weights, tiles, the search for
               algorithms; on CPUs the process's own

A record of one tile (`--what tile`), the largest of the video, has `tile_ms`, the
median of several calls, and `tflop` instead, both for each item of a batch.
"""

import argparse
import collections
import itertools
import json
import os
import statistics
import time
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
from flax import nnx

from benchmarks.common.autoencoders import (
    GIB,
    count_flops,
    peak_bytes,
    random_autoencoder,
    run_cases,
)
from benchmarks.common.machine import GB
from benchmarks.common.options import add_output, height_by_width, make_parser
from models.diffusion.video_autoencoder.codec import cut
from models.hunyuan.vae import codec as programs
from models.hunyuan.vae.autoencoder import HunyuanVAE
from models.hunyuan.vae.codec import HunyuanVAECodec
from models.hunyuan.vae.config import HunyuanVAEConfig
from models.hunyuan.vae.tiling import HunyuanTiling, run_tiles

CALLS = 5  # of a tile
# Tiles of the original's ratios, two each way.
TINY = {
    "frames": 21,
    "sizes": [(48, 80)],
    "model": {
        "block_out_channels": [8, 8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "spatial_compression_ratio": 4,
    },
    "tiling": {"size": [16, 32, 64], "step": [12, 24, 48]},
}


def make_codec(case: dict[str, Any], dtype: str) -> HunyuanVAECodec:
    """Returns a codec of random weights, the same for every dtype."""
    config = HunyuanVAEConfig.video(
        dtype=dtype, convolution=case["convolution"], **case["model"]
    )
    model = random_autoencoder(lambda: HunyuanVAE(config, rngs=nnx.Rngs(0)))
    return HunyuanVAECodec(model=model, tiling=HunyuanTiling(**case["tiling"]))


def make_source(codec: HunyuanVAECodec, case: dict[str, Any]) -> np.ndarray:
    """Returns random latents or pixels."""
    rng = np.random.default_rng(1)
    height, width = case["size"]
    frames, batch = case["frames"], case["batch"]
    if case["direction"] == "encode":
        shape: tuple[int, ...] = (batch, frames, height, width, 3)
        return rng.uniform(-1, 1, shape).astype(np.float32)
    size = codec.latent_shape(frames=frames, height=height, width=width)
    return rng.standard_normal((batch, *size), np.float32)


def tile_shapes(codec: HunyuanVAECodec, source: np.ndarray) -> collections.Counter:
    """Returns how many tiles there are of each shape."""
    assert codec.tiling is not None, "made with one"
    shapes: collections.Counter = collections.Counter()
    latent_tiles = codec.tiling.divided(codec.stride)
    encodes = source.shape[-1] == 3
    time_stride, side, _ = codec.stride

    def run(tile):
        shapes[tile.shape] += 1
        _, frames, rows, columns, _ = tile.shape
        if encodes:
            shape = (frames - 1) // time_stride + 1, rows // side, columns // side
        else:
            shape = codec.video_shape(frames, rows, columns)[:3]
        return jax.numpy.zeros((1, *shape, 1))

    order = (codec.tiling, latent_tiles) if encodes else (latent_tiles, codec.tiling)
    collections.deque(run_tiles(run, source[:1], *order), maxlen=0)
    return shapes


def count_all(
    codec: HunyuanVAECodec, source: np.ndarray, direction: str
) -> float | None:
    """Arithmetic of all tiles of a video; None where XLA does not count."""
    graph, state = nnx.split(codec.model)
    step = getattr(programs, f"{direction}_tile")
    total = 0.0
    for shape, count in tile_shapes(codec, source).items():
        tile = jax.ShapeDtypeStruct(shape, "f4")
        flops = count_flops(step.lower(graph, state, tile))
        if flops is None:
            return None
        total += count * flops
    return total


def largest_tile(codec: HunyuanVAECodec, source: np.ndarray) -> jax.Array:
    """Returns the first of the largest tiles, on the device."""
    _, *size, _ = max(tile_shapes(codec, source), key=np.prod)
    return jax.device_put(cut(source, (0, 0, 0), size))


def run_tile(case: dict[str, Any]) -> dict[str, Any]:
    """Measures the largest tile, of several videos at once."""
    codec = make_codec(case, case["dtype"])
    tile = largest_tile(codec, make_source(codec, case))
    graph, state = nnx.split(codec.model)
    step = getattr(programs, f"{case['direction']}_tile")
    start = time.perf_counter()
    result = jax.block_until_ready(step(graph, state, tile))
    record = {"compile_s": time.perf_counter() - start}
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        jax.block_until_ready(step(graph, state, tile))
        times.append((time.perf_counter() - start) / case["batch"])
    flops = count_flops(step.lower(graph, state, tile))
    if flops is not None:
        flops /= case["batch"]
        seconds = statistics.median(times)
        record |= {"tflop": flops / 1e12, "tflops": flops / seconds / 1e12}
    return record | {
        "shape": tile.shape,
        "tile_ms": 1e3 * statistics.median(times),
        "peak_gib": peak_bytes() / GIB,
        "finite": bool(np.isfinite(np.asarray(result)).all()),
    }


def difference_to_float32(case: dict[str, Any]) -> dict[str, float]:
    """Relative L2 and greatest difference of the largest tile."""
    results = []
    for dtype in (case["dtype"], "float32"):
        codec = make_codec(case, dtype)
        tile = largest_tile(codec, make_source(codec, case))
        step = getattr(programs, f"{case['direction']}_tile")
        with jax.default_matmul_precision("highest"):
            results.append(np.asarray(step(*nnx.split(codec.model), tile)))
    got, expected = results
    return {
        "relative": float(np.linalg.norm(got - expected) / np.linalg.norm(expected)),
        "greatest": float(np.abs(got - expected).max()),
    }


def run_video(case: dict[str, Any]) -> dict[str, Any]:
    """Measures a whole video."""
    codec = make_codec(case, case["dtype"])
    source = make_source(codec, case)

    def run(codec):
        if case["direction"] == "decode":
            return codec.decode_to_host(source)
        return np.asarray(codec.encode(source))

    start = time.perf_counter()
    run(codec)
    record: dict[str, Any] = {"compile_s": time.perf_counter() - start}
    start = time.perf_counter()
    result = run(codec)
    seconds = time.perf_counter() - start
    record |= {"total_s": seconds, "peak_gib": peak_bytes() / GIB}
    flops = count_all(codec, source, case["direction"])
    if flops is not None:
        flops *= case["batch"]
        record |= {"pflop": flops / 1e15, "tflops": flops / seconds / 1e12}
    record |= {
        "tile_shapes": len(tile_shapes(codec, source)),
        "finite": bool(np.isfinite(result).all()),
    }
    if case["dtype"] != "float32":
        record["difference"] = difference_to_float32(case)
    return record


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--what", choices=("video", "tile"), default="video")
    add("--sizes", nargs="+", type=height_by_width, default=[(768, 1280)])
    add("--frames", type=int, default=129)
    add("--dtypes", nargs="+", default=["bfloat16"])
    add("--convolutions", nargs="+", choices=("3d", "2d"), default=["2d"])
    directions = ("decode", "encode")
    add("--directions", nargs="+", choices=directions, default=["decode"])
    add("--batches", nargs="+", type=int, default=[1], help="videos at once")
    add("--tiny", action="store_true", help="a small model and video")
    add("--limit", type=float, default=300, help="seconds for each case")
    add_output(parser)
    add("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.model, options.tiling = {}, {}
    if options.tiny:
        vars(options).update(TINY)
    return options


def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns figures of the fastest bfloat16 decoding of the first size."""
    found = [
        record
        for record in records
        if (record["direction"], record["dtype"]) == ("decode", "bfloat16")
        and record["size"] == records[0]["size"]
        and "total_s" in record
    ]
    if not found:
        return {}
    best = min(found, key=lambda record: record["total_s"])
    figures = {
        "vae_decode_s": best["total_s"],
        "vae_compile_s": best["compile_s"],
        "vae_peak_gb": best["peak_gib"] * GIB / GB,
    }
    for name in ("tflops", "pflop"):
        if name in best:
            figures[f"vae_{name}"] = best[name]
    if "difference" in best:
        figures["vae_bf16_difference"] = best["difference"]["relative"]
    return figures


def main() -> int:
    """Runs all cases; the exit status says whether one failed."""
    options = parse()
    if options.case:
        case = options.case
        record = run_tile(case) if case["what"] == "tile" else run_video(case)
        print(json.dumps(record | {"device": jax.devices()[0].device_kind}))
        return 0
    shared = ("what", "frames", "model", "tiling")
    cases = (
        {name: getattr(options, name) for name in shared}
        | {
            "direction": direction,
            "size": size,
            "dtype": dtype,
            "convolution": convolution,
            "batch": batch,
        }
        for direction, size, dtype, convolution, batch in itertools.product(
            options.directions,
            options.sizes,
            options.dtypes,
            options.convolutions,
            options.batches,
        )
    )
    module = "benchmarks.hunyuan.vae"
    return run_cases(module, cases, options.limit, options.output, summarise)


if __name__ == "__main__":
    raise SystemExit(main())
