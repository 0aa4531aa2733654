"""Time and memory to decode and encode a video with Wan2.1's autoencoder.

    python -m benchmarks.wan.vae --output benchmarks/results/wan_vae_h100.json
    python -m benchmarks.wan.vae --tiny        # any machine, seconds

Random weights and latents, batch 1; processes as in `benchmarks.common.autoencoders`.
What a record has:

  compile_s        first two chunks, compilation and choice of algorithms included
  first_chunk_ms   the first frame
  chunk_ms         median of the other chunks, `frames_per_chunk` frames each
  chunks_s         the whole video, chunk by chunk, without copies to the host
  total_s          the whole video, into the host's memory (decode) or from it (encode)
  tflops           arithmetic of the other chunks, by XLA's count, over chunk_ms
  difference       with --difference: relative L2 and greatest difference of the video
                   to that in float32 at matmul precision "highest", same weights
  peak_gib         of the device since the process began: weights, chunks, the search
                   for algorithms; on CPUs the process's own
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
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
from benchmarks.common.options import add_output, height_by_width, make_parser
from models.diffusion.video_autoencoder.codec import VideoCodec
from models.wan.vae import codec as steps
from models.wan.vae.autoencoder import WanVAE
from models.wan.vae.codec import WanVAECodec
from models.wan.vae.config import WanVAEConfig
from models.wan.vae.tiling import Tiling

TINY = {"frames": 9, "sizes": [(32, 48)], "base_dim": 8}


def random_model(config: WanVAEConfig) -> WanVAE:
    """Returns an autoencoder of random weights."""
    return random_autoencoder(lambda: WanVAE(config, rngs=nnx.Rngs(0)))


def time_chunks(chunks: Iterable[jax.Array]) -> list[float]:
    """Milliseconds until each chunk is there."""
    times, start = [], time.perf_counter()
    for chunk in chunks:
        jax.block_until_ready(chunk)
        now = time.perf_counter()
        times.append(1e3 * (now - start))
        start = now
    return times


def later_flops(step: Any, model: WanVAE, first: Any, later: Any) -> float | None:
    """Arithmetic of a chunk after the first; None where XLA does not count."""
    graph, state = nnx.split(model)
    _, cache = jax.eval_shape(lambda s, x: step(graph, s, x, None), state, first)
    return count_flops(step.lower(graph, state, later, cache))


def difference_to_float32(
    codec: VideoCodec, source: np.ndarray, direction: str
) -> dict[str, float]:
    """Relative L2 and greatest difference of a codec's results to exact ones."""
    with jax.default_matmul_precision("highest"):
        got, expected = (
            np.asarray(getattr(made, direction)(source), np.float32)
            for made in (codec, codec.in_dtype("float32"))
        )
    return {
        "relative": float(np.linalg.norm(got - expected) / np.linalg.norm(expected)),
        "greatest": float(np.abs(got - expected).max()),
    }


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Measures one direction of one codec at one size."""
    config = WanVAEConfig.wan2_1(
        dtype=case["dtype"], convolution=case["convolution"], base_dim=case["base_dim"]
    )
    tile = case["tile"]
    codec = WanVAECodec(
        model=random_model(config),
        tiling=Tiling(size=(tile,) * 2, overlap=(tile // 4,) * 2) if tile else None,
    )
    rng = np.random.default_rng(1)
    frames = case["frames"]
    height, width = case["size"]
    shape = codec.latent_shape(frames=frames, height=height, width=width)
    whole: Callable[[np.ndarray], jax.Array | np.ndarray]
    split: Callable[[np.ndarray], Iterable[jax.Array]]
    if case["direction"] == "decode":
        source = rng.standard_normal((1, *shape), np.float32)
        whole, split, step = codec.decode_to_host, codec._decode, steps._decode_step
        chunk = 1
    else:
        source = rng.uniform(-1, 1, (1, frames, height, width, 3)).astype(np.float32)
        whole, split, step = codec.encode, codec._encode, steps._encode_step
        chunk = codec.stride[0]
    start = time.perf_counter()
    jax.block_until_ready(whole(source[:, : 1 + chunk]))
    record: dict[str, Any] = {"compile_s": time.perf_counter() - start}
    if not tile:
        times = time_chunks(split(source))
        flops = later_flops(step, codec.model, source[:, :1], source[:, 1 : 1 + chunk])
        record |= {
            "first_chunk_ms": times[0],
            "chunk_ms": statistics.median(times[1:]),
            "chunks_s": sum(times) / 1e3,
        }
        if flops is not None:
            record["tflops"] = flops / statistics.median(times[1:]) / 1e9
    if case["difference"]:
        difference = difference_to_float32(codec, source, case["direction"])
        record |= {"difference": difference}
    start = time.perf_counter()
    result = jax.block_until_ready(whole(source))
    record |= {
        "total_s": time.perf_counter() - start,
        "peak_gib": peak_bytes() / GIB,
        "frames_per_chunk": codec.stride[0],
        "finite": bool(np.isfinite(np.asarray(result)).all()),
        "device": jax.devices()[0].device_kind,
    }
    return record


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--sizes", nargs="+", type=height_by_width, default=[(480, 832), (720, 1280)])
    add("--frames", type=int, default=81)
    add("--dtypes", nargs="+", default=["float32", "bfloat16"])
    add("--convolutions", nargs="+", choices=("3d", "2d"), default=["3d", "2d"])
    directions = ("decode", "encode")
    add("--directions", nargs="+", choices=directions, default=["decode"])
    add("--tile", type=int, default=0, help="side of tiles in pixels; 0 for none")
    add("--difference", action="store_true", help="to float32, too")
    add("--tiny", action="store_true", help="a small model and video")
    add("--limit", type=float, default=240, help="seconds for each case")
    add_output(parser)
    add("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.base_dim = 96
    if options.tiny:
        vars(options).update(TINY)
    return options


def main() -> int:
    """Runs all cases; the exit status says whether one failed."""
    options = parse()
    if options.case:
        print(json.dumps(run_case(options.case)))
        return 0
    cases = (
        {
            "direction": direction,
            "size": size,
            "frames": options.frames,
            "dtype": dtype,
            "convolution": convolution,
            "tile": options.tile,
            "difference": options.difference,
            "base_dim": options.base_dim,
        }
        for direction, size, dtype, convolution in itertools.product(
            options.directions, options.sizes, options.dtypes, options.convolutions
        )
    )
    return run_cases("benchmarks.wan.vae", cases, options.limit, options.output)


if __name__ == "__main__":
    raise SystemExit(main())
