"""Lists what a Wan2.1 program compiled for an H100 moves, on a machine without a GPU.

    PYTHONPATH=cuda PATH=cuda/nvidia/cu13/bin:$PATH \
        python -m benchmarks.wan.moves --output benchmarks/results/wan_moves_h100.json

`benchmarks.attention.compile_hopper` says what belongs in the folder `cuda`. The
program is one call of the 14B transformer with draft attention, all sizes but the
number of layers as published: layers are a loop, so two have the program of forty.
Listed are gathers, transposes, copies and the like of arrays with an element for each
token and channel (`layers`), and of smaller ones with a row of 64 or more for each
token (`ends`: patches, rotation tables, output). Weights are counted nowhere. Each kind
of step that `models.diffusion.sampler` compiles is looked at; a conditional would wait
for the host.
"""

import contextlib
import dataclasses
import itertools
import os
import re
import sys
from unittest import mock

# Read when JAX or the plugin loads.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import jax.numpy as jnp
from flax import nnx
from jax._src.lib import cuda_versions

from benchmarks.attention.compile_hopper import h100_sharding
from benchmarks.common.options import add_output, make_parser
from benchmarks.common.records import ResultFile
from benchmarks.layer.account import token_sized_moves
from benchmarks.wan.run import latent_shape
from draft_jax import AttentionPlan, DraftConfig, StepKind
from draft_jax.attention import initial_mask
from models.wan.config import WanConfig
from models.wan.inputs import WanInputs
from models.wan.transformer import WanTransformer
from pallas_kernels.common.device import Device

H100 = Device(platform="gpu", kind="NVIDIA H100", compute_capability=(9, 0))
CUDNN_VERSION = 91900
TABLE_WIDTH = 64  # values for each token in the rotation tables, and in patches


@contextlib.contextmanager
def on_h100():
    """Makes the library choose what it chooses on an H100."""
    with contextlib.ExitStack() as stack:

        def set_result(module, name, value):
            patch = mock.patch.object(module, name, return_value=value)
            stack.enter_context(patch)

        for name, module in list(sys.modules.items()):
            is_own = name.split(".")[0] in ("draft_jax", "pallas_kernels", "models")
            if is_own and hasattr(module, "current_device"):
                set_result(module, "current_device", H100)
        set_result(cuda_versions, "cudnn_get_version", CUDNN_VERSION)
        yield


KINDS = {  # of two layers
    "sparse, new masks": StepKind(dense=(False, False), refresh=True),
    "sparse, old masks": StepKind(dense=(False, False), refresh=False),
    "first layer dense": StepKind(dense=(True, False), refresh=True),
    "dense": StepKind(dense=(True, True), refresh=False),
}


def compile_call(kind: str, height: int, width: int, frames: int):
    """Compiles one call of the model; returns the program, tokens and channels."""
    sharding = h100_sharding()

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def array(*shape, dtype="float32"):
        return place(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))

    config = dataclasses.replace(WanConfig.t2v_14b(), num_layers=2)
    draft = DraftConfig(sparsity=0.9)
    model = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    attention = AttentionPlan.draft(draft)
    structure, state = nnx.split(model)
    latent = latent_shape((height, width), frames)
    grid = model.grid(latent)
    mask = jax.eval_shape(
        lambda: initial_mask(grid, draft, batch=1, num_heads=config.num_heads)
    )
    masks = jax.tree.map(
        lambda x: array(config.num_layers, *x.shape, dtype=x.dtype), mask
    )

    def call(state, latents, timesteps, context, lengths, budget, masks):
        return nnx.merge(structure, state)(
            WanInputs(latents, timesteps, context, lengths),
            attention=attention,
            step=KINDS[kind].step(budget),
            masks=masks,
        )

    context = array(1, config.text_length, config.text_dim, dtype="bfloat16")
    arguments = (
        jax.tree.map(place, state),
        array(1, *latent),
        array(1),
        context,
        array(1, dtype="int32"),
        array(dtype="int32"),
        masks,
    )
    with on_h100():
        lowered = jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",))
        return lowered.compile(), grid.num_tokens, config.dim


def moves(text: str, num_tokens: int, channels: int) -> dict[str, list[str]]:
    """Lists what the program moves in its layers and outside of them."""
    large = token_sized_moves(text, num_tokens * channels)
    tables = token_sized_moves(text, num_tokens * TABLE_WIDTH)
    with_tokens = re.compile(rf"[\[,]{num_tokens}[,\]]")
    ends = [move for move in tables if with_tokens.search(move) and move not in large]
    return {"layers": large, "ends": ends}


def main() -> None:
    """Compiles each kind of step at each size and lists what it moves."""
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["480x832", "768x1280"])
    parser.add_argument("--frames", type=int, default=81)
    add_output(parser)
    options = parser.parse_args()
    stored = ResultFile(options.output, device="compiled for an H100, not run")
    for size, kind in itertools.product(options.sizes, KINDS):
        height, width = map(int, size.split("x"))
        program, num_tokens, channels = compile_call(
            kind, height, width, options.frames
        )
        text = program.as_text()
        found = moves(text, num_tokens, channels)
        conditionals = len(re.findall(r" conditional\(", text))
        stored.add(
            {"size": size, "step": kind, "tokens": num_tokens, "channels": channels}
            | found
            | {
                "conditionals": conditionals,
                "temp_gb": program.memory_analysis().temp_size_in_bytes / 1e9,
            }
        )


if __name__ == "__main__":
    main()
