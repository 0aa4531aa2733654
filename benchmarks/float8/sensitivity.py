"""Tells how much a model loses by linear layers in FP8.

    python -m benchmarks.float8.sensitivity --prompts 4 \
        --output benchmarks/results/float8_sensitivity_cpu.json

The same weights are run wide (float32 on a CPU, bfloat16 elsewhere) and in FP8. By
default it is the model that ships; --checkpoint names another, which is then in memory
in both precisions. What a record says; errors are relative, in the L2 norm:

  levels        for each noise level of a video that the wide model made:
    step        error of the velocity, and with guidance of the guided one
    layers      for each block `output`, the error of the residual stream after it from
                the wide model's own input; `update`, that error over what the block
                adds; `accumulated`, the error of the stream with all blocks in FP8
  only          error of the velocity at the middle level with one kind of layer in FP8
  videos        PSNR against the wide dense video, by prompt: FP8 alone, also with the
                last step's activations in FP8 as the others' are; sparsity alone (dense
                for a quarter of the steps, as in the paper); and both
"""

import argparse
import dataclasses
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.common.options import add_output, make_parser
from benchmarks.common.records import environment, write_json
from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.sampler import StepInputs
from models.diffusion.transformer.float8 import use_float8_linears
from models.float8.product import compiler_options
from models.loading import load_pipeline
from models.media.metrics import psnr
from models.mini.captions import SAMPLE_PROMPTS

LEVELS = (0.95, 0.75, 0.5, 0.25, 0.05)  # share of noise
SPARSITY = 0.5
EMBEDDINGS = ("patch_embedding", "x_embedder")  # convolutions

Record = dict[str, Any]


def in_float8(model: Any, only: str | None = None) -> Any:
    """Returns a copy of a model with linear layers in FP8.

    Args:
      model: A wide model.
      only: The layers that are, one of `kinds_of`; None for all of these.
    """
    copy = nnx.merge(*nnx.split(model))
    wide = list(sys.modules[type(model).__module__].WIDE_LINEARS)
    for kind, paths in kinds_of(model).items():
        wide += paths if only not in (None, kind) else []
    use_float8_linears(copy, leave=wide)
    copy.config = dataclasses.replace(model.config, linears="float8")
    return copy


def kinds_of(model: Any) -> dict[str, list[str]]:
    """Returns the layers that FP8 is for, as paths by kind.

    Layers that read one rounded input are one kind: queries, keys and values, and in
    HunyuanVideo's single blocks the network beside them.
    """
    wide = sys.modules[type(model).__module__].WIDE_LINEARS
    state = nnx.to_flat_state(nnx.state(model))
    kinds: dict[str, list[str]] = {}
    for *path, leaf in (path for path, _ in state):
        name = ".".join(map(str, path))
        left = any(f"{name}.".startswith(f"{other}.") for other in wide)
        if leaf == "kernel" and not left and path[-1] not in EMBEDDINGS:
            kind = re.sub(r"attn(\d?)\.to_[qkv]$", r"attn\1.to_qkv", name)
            kind = re.sub(r"add_[qkv]_proj$", "add_qkv_proj", kind)
            kind = re.sub(r"proj_mlp$", "attn.to_qkv", kind)
            kinds.setdefault(kind, []).append(name)
    return kinds


def relative(found: Any, expected: Any, of: Any = None) -> float:
    """Returns the distance of two trees of arrays over the norm of the second."""
    distance = norm(jax.tree.map(jnp.subtract, found, expected))
    return distance / norm(expected if of is None else of)


def norm(tree: Any) -> float:
    """Returns the L2 norm of all arrays together."""
    squares = [jnp.square(x.astype(jnp.float32)).sum() for x in jax.tree.leaves(tree)]
    return float(jnp.sqrt(sum(squares)))


def predict(model: Any, rows: Any) -> Any:
    """Returns the velocity of a model's own inputs, with dense attention."""
    structure, state = nnx.split(model)

    def call(state, rows):
        return nnx.merge(structure, state)(
            rows, attention=AttentionPlan.dense(), step=None, masks=None
        )[0]

    return jax.jit(call, compiler_options=compiler_options(state))(state, rows)


def record_blocks(model: Any, rows: Any) -> list[tuple[Any, Any, Any]]:
    """Returns each stack of blocks of a model with the stream and inputs it gets."""
    module = sys.modules[type(model).__module__]
    run, seen = module.run_blocks, []

    def keep(blocks, x, shared, **options):
        seen.append((blocks, x, shared))
        return run(blocks, x, shared, **options)

    with mock.patch.object(module, "run_blocks", keep):
        model(rows, attention=AttentionPlan.dense(), step=None, masks=None)
    return seen


def block_runner(blocks: nnx.Module) -> Callable[[int, Any, Any], Any]:
    """Returns a function of a layer's index, the stream and the shared inputs."""
    structure, stack = nnx.split(blocks)

    def call(index, stack, x, shared):
        layer = jax.tree.map(lambda leaf: leaf[index], stack)
        return nnx.merge(structure, layer)(x, shared, None, None)[0]

    jitted = jax.jit(call, compiler_options=compiler_options(stack))
    return lambda index, x, shared: jitted(index, stack, x, shared)


def measure_layers(wide: Any, narrow: Any, rows: Any) -> list[Record]:
    """Returns the errors of each block; see the module."""
    found = []
    stacks = zip(record_blocks(wide, rows), record_blocks(narrow, rows), strict=True)
    for (wide_stack, x, shared), (narrow_stack, far, narrow_shared) in stacks:
        run_wide, run_narrow = block_runner(wide_stack), block_runner(narrow_stack)
        for index in range(len(jax.tree.leaves(nnx.state(wide_stack))[0])):
            out = run_wide(index, x, shared)
            near = run_narrow(index, x, shared)
            far = run_narrow(index, far, narrow_shared)
            added = jax.tree.map(jnp.subtract, out, x)
            found.append(
                {
                    "output": relative(near, out),
                    "update": relative(near, out, of=added),
                    "accumulated": relative(far, out),
                }
            )
            x = out
    return found


def rows_at(model: Any, inputs: StepInputs, clean: Any, level: float) -> Any:
    """Returns a model's inputs for a clean latent with a share of noise."""
    noise = jax.random.normal(jax.random.key(1), clean.shape)
    latents = (1 - level) * clean + level * noise
    return model.step_inputs(
        latents,
        1000.0 * level,
        inputs.context,
        inputs.image,
        inputs.embedded_guidance,
    )


def guided(velocity: Any, inputs: StepInputs, batch: int) -> Any:
    """Returns the guided velocity; the velocity itself without guidance."""
    if len(velocity) == batch:
        return velocity
    positive, negative = velocity[:batch], velocity[batch:]
    return negative + inputs.guidance * (positive - negative)


def measure_steps(
    wide: Any, narrow: Any, inputs: StepInputs, clean: Any, levels: Sequence[float]
) -> list[Record]:
    """Returns the errors of a step and of its layers at some noise levels."""
    found = []
    for level in levels:
        rows = rows_at(wide, inputs, clean, level)
        expected, got = predict(wide, rows), predict(narrow, rows)
        after = [guided(v, inputs, len(clean)) for v in (got, expected)]
        found.append(
            {
                "level": level,
                "step": relative(got, expected),
                "guided_step": relative(*after),
                "layers": measure_layers(wide, narrow, rows),
            }
        )
        print({k: v for k, v in found[-1].items() if k != "layers"}, flush=True)
    return found


def measure_kinds(wide: Any, inputs: StepInputs, clean: Any) -> dict[str, float]:
    """Returns the error of a step with one kind of layer in FP8, by kind."""
    rows = rows_at(wide, inputs, clean, 0.5)
    expected = predict(wide, rows)
    return {
        kind: relative(predict(in_float8(wide, kind), rows), expected)
        for kind in kinds_of(wide)
    }


def measure_videos(
    pipeline: VideoPipeline, narrow: Any, prompts: Sequence[str], dense: Any
) -> Record:
    """Returns the PSNR of each prompt's video against the wide dense one."""
    sparse = AttentionPlan.draft(
        DraftConfig.paper(sparsity=SPARSITY), SparsitySchedule.paper()
    )
    in_fp8 = dataclasses.replace(pipeline, model=narrow)
    found: Record = {}
    for name, one, attention in (
        ("float8", in_fp8, AttentionPlan.dense()),
        (
            "float8_in_the_last_step_too",
            dataclasses.replace(in_fp8, weight_only_steps=0),
            AttentionPlan.dense(),
        ),
        (f"sparsity_{SPARSITY}", pipeline, sparse),
        (f"float8_and_sparsity_{SPARSITY}", in_fp8, sparse),
    ):
        result = one.generate(list(prompts), attention=attention)
        decibels = [psnr(*pair) for pair in zip(result.video, dense, strict=True)]
        found[name] = {
            "psnr_db": [round(float(value), 2) for value in decibels],
            "psnr_db_mean": float(np.mean(decibels)),
            "psnr_db_min": float(np.min(decibels)),
        }
        print(name, found[name], flush=True)
    return found


def measure(
    pipeline: VideoPipeline,
    prompts: Sequence[str],
    levels: Sequence[float],
    report: Callable[[Record], None],
) -> None:
    """Measures a model; `report` takes its record whenever it has grown."""
    wide = pipeline.model
    narrow = in_float8(wide)
    dense = pipeline.generate(list(prompts))
    _, _, inputs = pipeline.start(list(prompts), pipeline.sampling)
    clean = jnp.asarray(dense.latents)
    record: Record = {
        "prompts": list(prompts),
        "sampling": dataclasses.asdict(pipeline.sampling),
    }
    record["videos"] = measure_videos(pipeline, narrow, prompts, dense.video)
    report(record)
    record["levels"] = measure_steps(wide, narrow, inputs, clean, levels)
    report(record)
    record["only"] = measure_kinds(wide, inputs, clean)
    report(record)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoint", type=pathlib.Path, help="another model")
    parser.add_argument("--prompts", type=int, default=4, help="how many")
    parser.add_argument("--steps", type=int, help="of a video; those of the model")
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS)
    add_output(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measures a model and writes its record."""
    options = parse(arguments)
    pipeline = load_pipeline(options.checkpoint)
    if options.steps is not None:
        sampling = dataclasses.replace(pipeline.sampling, num_steps=options.steps)
        pipeline = dataclasses.replace(pipeline, sampling=sampling)

    def report(record: Record) -> None:
        if options.output is not None:
            write_json(options.output, {"environment": environment(), **record})

    measure(pipeline, SAMPLE_PROMPTS[: options.prompts], options.levels, report)


if __name__ == "__main__":
    main()
