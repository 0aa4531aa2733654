"""Lists what a model's programs move, compiled for an H100 on a machine without a GPU.

A program is one call of a transformer. Listed are gathers, transposes, copies and the
like of arrays with an element for each token and channel (`layers`), and of smaller
ones with a row of 64 or more for each token (`ends`: patches, rotation tables, output).
Weights are counted nowhere. Each kind of step that `models.diffusion.sampler` compiles
is looked at; a conditional would wait for the host. Sizes in gigabytes are what XLA
plans. `products` counts those of cuBLASLt by name; "$f8" ends that of FP8, which
--linears float8 compiles.
"""

import argparse
import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.common.hopper_target import (
    h100_sharding,
    leave_gpus_alone,
    on_h100,
)
from benchmarks.common.machine import GB
from benchmarks.common.moves import token_sized_moves
from benchmarks.common.options import add_output, height_by_width, make_parser
from benchmarks.common.records import ResultFile
from draft_jax import AttentionPlan, DraftConfig, StepKind, VideoGrid
from draft_jax.attention import initial_mask
from models.checkpoints.config_checks import LINEARS
from models.diffusion.interfaces import LatentShape, VideoModel
from models.float8.product import compiler_options

TABLE_WIDTH = 64  # values for each token in the rotation tables, and in patches
DRAFT = DraftConfig.paper(sparsity=0.9)
PRODUCT = re.compile(r'custom_call_target="__(cublas[^"]*matmul[^"]*)"')


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """A call of a model without values.

    Attributes:
      model: From `nnx.eval_shape`.
      latent_shape: Shape of one item's latent.
      inputs: The model's own, of `jax.ShapeDtypeStruct`.
      channels: Width of the residual stream.
    """

    model: VideoModel
    latent_shape: LatentShape
    inputs: Any
    channels: int


def struct(*shape: int, dtype: str = "float32") -> Any:
    """Returns an array without values."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def compile_call(call: Call, kind: StepKind) -> Any:
    """Compiles one call of the model; returns the program."""
    sharding = h100_sharding()
    model = call.model
    structure, state = nnx.split(model)
    grid = model.grid(call.latent_shape)
    mask = jax.eval_shape(
        lambda: initial_mask(grid, DRAFT, batch=1, num_heads=model.num_heads)
    )
    masks = jax.tree.map(
        lambda x: struct(model.num_layers, *x.shape, dtype=x.dtype), mask
    )

    def run(state, inputs, budget, masks):
        return nnx.merge(structure, state)(
            inputs,
            attention=AttentionPlan.draft(DRAFT),
            step=kind.step(budget),
            masks=masks,
        )

    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (state, call.inputs, struct(dtype="int32"), masks),
    )
    with on_h100():
        options = compiler_options(state)
        jitted = jax.jit(run, donate_argnums=3, compiler_options=options)
        traced = jitted.trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).compile()


def moves(text: str, grid: VideoGrid, channels: int) -> dict[str, list[str]]:
    """Lists what the program moves in its layers and outside of them."""
    tokens = grid.num_visual_tokens
    large = token_sized_moves(text, tokens * channels)
    tables = token_sized_moves(text, tokens * TABLE_WIDTH)
    with_tokens = re.compile(rf"[\[,]({tokens}|{grid.num_tokens})[,\]]")
    ends = [move for move in tables if with_tokens.search(move) and move not in large]
    return {"layers": large, "ends": ends}


def describe(call: Call, kind: StepKind) -> tuple[dict[str, Any], str]:
    """Compiles a call; returns its record and its text."""
    program = compile_call(call, kind)
    text, stats = program.as_text(), program.memory_analysis()
    grid = call.model.grid(call.latent_shape)
    record = {
        "tokens": grid.num_tokens,
        "channels": call.channels,
        **moves(text, grid, call.channels),
        "products": dict(collections.Counter(PRODUCT.findall(text))),
        "conditionals": len(re.findall(r" conditional\(", text)),
        "argument_gb": stats.argument_size_in_bytes / GB,
        "temp_gb": stats.temp_size_in_bytes / GB,
    }
    return record, text


def run(
    doc: str | None,
    make_call: Callable[[tuple[int, int], int, str], Call],
    kinds: Mapping[str, StepKind],
    *,
    sizes: list[tuple[int, int]],
    frames: int,
) -> None:
    """Compiles each kind of step at each size and lists what it moves.

    Args:
      doc: Text of the program, for its help.
      make_call: Makes the call of a height and width, a number of frames, and a
        precision of linear layers.
      kinds: Kinds of steps by name.
      sizes: Heights and widths by default.
      frames: Of the video, by default.
    """
    parser: argparse.ArgumentParser = make_parser(doc)
    parser.add_argument("--sizes", nargs="+", type=height_by_width, default=sizes)
    parser.add_argument("--frames", type=int, default=frames)
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=list(kinds))
    parser.add_argument("--linears", choices=LINEARS, default="bfloat16")
    add_output(parser)
    options = parser.parse_args()
    leave_gpus_alone()
    stored = ResultFile(options.output, device="compiled for an H100, not run")
    for size, kind in itertools.product(options.sizes, options.kinds):
        call = make_call(size, options.frames, options.linears)
        record, _ = describe(call, kinds[kind])
        facts = {"size": "x".join(map(str, size)), "step": kind}
        if options.linears != "bfloat16":
            facts["linears"] = options.linears
        stored.add(facts | record)
