"""Transformers on 8 simulated devices, in a process of their own.

    python -m tests.models.diffusion.mesh_cases CASE ...

Prints a JSON object: what each case found, for `test_mesh`.
"""

import dataclasses
import functools
import json
import os
import sys
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from draft_jax import AttentionPlan, Compensation, DraftConfig, SparsitySchedule
from models.diffusion.caches import EasyCache, MagCache, MagRatios
from models.diffusion.experts import ResidentExperts
from models.diffusion.interfaces import TextContext
from models.diffusion.mesh import DeviceMesh
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.recording import AttentionRecorder
from models.diffusion.sampler import Sampler, StepInputs
from models.diffusion.sampling import Sampling
from models.diffusion.schedulers import FlowEuler
from models.diffusion.transformer.sharded import ShardedTransformer
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.convert import (
    export_hunyuan_transformer,
    load_hunyuan_transformer,
)
from models.hunyuan.inputs import HunyuanInputs
from models.hunyuan.transformer import HunyuanTransformer
from models.mini.pipeline import pipeline_of
from models.wan.config import WanConfig
from models.wan.convert import export_wan_transformer, load_wan_transformer
from models.wan.inputs import WanInputs
from models.wan.transformer import WanTransformer
from tests import tiny_model, tiny_wan2_2
from tests.collectives import collectives

ROWS, TEXT = 2, 6
# 3 x 3 x 5 tokens: edge tiles, and 45 are no multiple of 2 or 4.
LATENTS = (ROWS, 3, 6, 10, 16)
WAN = WanConfig(
    dim=32,
    ffn_dim=64,
    num_heads=4,
    num_layers=3,
    text_dim=8,
    text_length=TEXT,
    freq_dim=16,
    tile=(2, 4),
    dtype="float32",
)
HUNYUAN = HunyuanConfig(
    dim=32,
    num_heads=4,
    num_double_blocks=2,
    num_single_blocks=2,
    num_refiner_blocks=2,
    text_dim=8,
    pooled_dim=8,
    text_length=TEXT,
    rope_channels=(2, 2, 4),
    freq_dim=16,
    tile=(2, 4),
    dtype="float32",
)
PLANS = {
    "dense": AttentionPlan.dense(),
    "draft": AttentionPlan.draft(DraftConfig.paper(sparsity=0.5)),
    "means": AttentionPlan.draft(
        DraftConfig(
            sparsity=0.5,
            draft_tile=(1, 2),
            compensation=Compensation(sub_tile=(1, 2), frames=1),
            ranking="spread",
        )
    ),
}
LAYOUTS = {
    "sequence": DeviceMesh(sequence=4),
    "guidance": DeviceMesh(guidance=2),
    "both": DeviceMesh(sequence=2, guidance=2),
    "weights": DeviceMesh(sequence=4, guidance=2, shard_weights=True),
}


def make_model(name: str) -> Any:
    """A transformer of random weights, the output layer among them."""
    rngs = nnx.Rngs(0)
    model: Any
    if name.startswith("wan"):
        linears = "float8" if "float8" in name else "bfloat16"
        model = WanTransformer(dataclasses.replace(WAN, linears=linears), rngs=rngs)
    else:
        frames = 1 if "reference" in name else 0
        config = dataclasses.replace(HUNYUAN, reference_frames=frames)
        model = HunyuanTransformer(config, rngs=rngs)
    kernel = model.proj_out.kernel
    kernel[...] = jax.random.normal(rngs.params(), kernel.shape) / 5
    return model


def make_inputs(name: str) -> Any:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    latents, times = normal(*LATENTS), jnp.asarray([300.0, 700.0])
    context, lengths = normal(ROWS, TEXT, 8), jnp.asarray([3, TEXT])
    if name.startswith("wan"):
        first = jnp.zeros(ROWS) if "held" in name else None
        return WanInputs(latents, times, context, lengths, first_timesteps=first)
    reference = normal(ROWS, 1, *LATENTS[2:]) if "reference" in name else None
    return HunyuanInputs(
        latents=latents,
        timesteps=times,
        context=context,
        context_mask=jnp.arange(TEXT) < lengths[:, None],
        pooled=normal(ROWS, 8),
        guidance=jnp.full(ROWS, 6016.0),
        reference=reference,
    )


def error(got: Any, expected: Any) -> float:
    """Largest difference, relative to the largest value."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(
        float(np.abs(np.asarray(x) - np.asarray(y)).max() / np.abs(y).max())
        for x, y in pairs
    )


def step(name: str, plan: str, layout: str) -> dict[str, Any]:
    """Calls a model on all devices and on one, with residual."""
    inputs, mesh = make_inputs(name), LAYOUTS[layout]

    def call(structure, state, inputs):
        model = nnx.merge(structure, state)
        return model.call_with_residual(inputs, attention=PLANS[plan])

    one = nnx.split(make_model(name))
    velocity, masks, residual = jax.jit(functools.partial(call, one[0]))(one[1], inputs)
    model = ShardedTransformer(make_model(name), mesh)
    structure, state = nnx.split(model)
    program = jax.jit(functools.partial(call, structure))
    program = program.lower(state, model.put_everywhere(inputs)).compile()
    got = program(state, model.put_everywhere(inputs))
    tokens = residual.shape[1]
    text = program.as_text() or ""
    reused = jax.jit(lambda state, *x: nnx.merge(structure, state).reuse_residual(*x))(
        state, model.put_everywhere(inputs), got[2]
    )
    return {
        "error": error(got[0], velocity),
        "error of residual": error(got[2][:, -tokens:], residual)
        if "reference" in name
        else error(got[2][:, :tokens], residual),
        "error of reuse": error(reused, velocity),
        "equal masks": masks is None
        or all(
            (np.asarray(x) == np.asarray(y)).all()
            for x, y in zip(
                jax.tree.leaves(got[1]), jax.tree.leaves(masks), strict=True
            )
        ),
        "masks": [str(x.sharding.spec) for x in jax.tree.leaves(got[1])],
        "collectives": [dataclasses.astuple(c) for c in collectives(text)],
        "held": held_share(nnx.state(model)),
    }


def held_share(state: Any) -> float:
    """Share of the bytes of all weights that one device holds."""
    leaves = jax.tree.leaves(state)
    own = sum(x.addressable_data(0).nbytes for x in leaves)
    return own / sum(x.nbytes for x in leaves)


def gradient(name: str, plan: str, layout: str) -> dict[str, Any]:
    """Gradients of a loss by weights and latents, on all devices and on one."""
    inputs, mesh = make_inputs(name), LAYOUTS[layout]

    def loss(structure, arrays, remat):
        state, latents = arrays
        velocity, _ = nnx.merge(structure, state)(
            inputs._replace(latents=latents), attention=PLANS[plan], remat=remat
        )
        return jnp.square(velocity).sum()

    def run(model):
        structure, state = nnx.split(model)
        grad = jax.jit(jax.grad(functools.partial(loss, structure)), static_argnums=1)
        latents = inputs.latents
        if isinstance(model, ShardedTransformer):
            latents = model.put_everywhere(latents)
        return grad((state, latents), True)

    expected = run(make_model(name))
    got = run(ShardedTransformer(make_model(name), mesh))
    assert len(jax.tree.leaves(got)) == len(jax.tree.leaves(expected))
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    differences = [np.abs(np.asarray(x) - np.asarray(y)).max() for x, y in pairs]
    return {"error": float(max(differences) / scale)}


def make_pipeline(mesh: DeviceMesh | None) -> VideoPipeline:
    tiny_model.make_checkpoint.cache_clear()  # its weights are moved
    pipeline = pipeline_of(tiny_model.make_checkpoint())
    return dataclasses.replace(pipeline, mesh=mesh)


def videos(cache: str, plan: str, layout: str) -> dict[str, Any]:
    """Whole runs, with masks that are kept for a second step and a step cache."""
    sampling = dataclasses.replace(tiny_model.SAMPLING, num_steps=6)
    ratios = MagRatios(
        values=((1.0,) * 6,) * 2, model="tiny", attention="dense", shift=3.0, source="-"
    )
    caches = {
        "none": None,
        "easy": EasyCache(threshold=5.0, first_steps=2),
        "mag": MagCache(ratios=ratios, threshold=0.1, max_skips=2, retention=0.2),
    }
    attention = PLANS["dense"]
    if plan == "draft":
        schedule = SparsitySchedule(dense_fraction=0.25, mask_refresh=2)
        attention = AttentionPlan.draft(DraftConfig.paper(sparsity=0.5), schedule)
    mesh = {
        "weights": DeviceMesh(sequence=2, guidance=2, shard_weights=True),
        "two_calls": DeviceMesh(sequence=2),
        "guidance": DeviceMesh(guidance=2),
    }[layout]
    batching = "two_calls" if layout == "two_calls" else "one_call"
    found, records = [], []
    for own, way in ((None, "one_call"), (mesh, batching)):
        recorder = AttentionRecorder()
        found.append(
            make_pipeline(own).generate(
                "a red ball",
                sampling,
                attention=attention,
                cache=caches[cache],
                guidance_batching=way,
                recorder=recorder,
            )
        )
        records.append(recorder.record())
    one, several = found
    return {
        "error": error(several.latents, one.latents),
        "error of video": error(several.video, one.video),
        "equal shares": error(several.kept_density, one.kept_density) < 1e-6,
        "skipped": [int(result.skipped.sum()) for result in found],
        "equal skips": (one.skipped == several.skipped).all().item(),
        "equal records": [
            (getattr(records[0], name) == getattr(records[1], name)).all().item()
            for name in ("masks", "dense")
            if records[0] is not None
        ],
    }


def pair(plan: str, layout: str) -> dict[str, Any]:
    """A run of two transformers that take turns, with a cache that starts anew."""
    config = tiny_wan2_2.make_config("t2v")
    mesh = {
        "both": DeviceMesh(sequence=2, guidance=2),
        "weights": DeviceMesh(sequence=2, guidance=2, shard_weights=True),
    }[layout]
    sampling = Sampling(
        frames=9,
        height=8 * tiny_wan2_2.ROWS,
        width=8 * tiny_wan2_2.COLUMNS,
        num_steps=8,
        solver=FlowEuler(num_steps=8, shift=1.0),
        guidance=4.0,
        low_guidance=2.0,
    )
    found = []
    for own in (None, mesh):
        models = (tiny_wan2_2.make_transformer(config, x) for x in ("high", "low"))
        experts = ResidentExperts(*models, boundary=560.0)
        pipeline = VideoPipeline(
            experts.model,
            None,
            tiny_wan2_2.make_codec(averages=False),
            experts=experts,
            mesh=own,
        )
        result = pipeline.generate(
            tiny_wan2_2.make_context("text"),
            sampling,
            negative_context=tiny_wan2_2.make_context("other"),
            attention=PLANS[plan],
            cache=EasyCache(threshold=1e9, first_steps=1),
        )
        assert pipeline.experts is not None
        low = nnx.state(pipeline.experts.take("low"))
        found.append((result, held_share(low)))
    (one, _), (several, held) = found
    return {
        "error": error(several.latents, one.latents),
        "equal skips": (one.skipped == several.skipped).all().item(),
        "skipped": int(several.skipped.sum()),
        "held": held,
    }


def program(name: str, layout: str) -> dict[str, Any]:
    """What a guided step of the sampler sends, its solver and report among it."""
    model = ShardedTransformer(make_model(name), LAYOUTS[layout])
    of_rows = make_inputs(name)
    sampler = Sampler.create(
        model,
        latent_shape=LATENTS[1:],
        solver=FlowEuler(num_steps=2, shift=1.0),
        attention=PLANS["draft"],
    )
    context = TextContext(of_rows.context, jnp.asarray([3, TEXT]))
    inputs = model.put_everywhere(StepInputs(context, guidance=jnp.float32(4.0)))
    state = sampler.initial_state(1, seed=0, guided=True)
    found = {}
    for kind, lowered in sampler.lower(state, inputs).items():
        text = lowered.compile().as_text() or ""
        name = "dense" if all(kind.dense) else "sparse"
        found[name] = [dataclasses.astuple(c) for c in collectives(text)]
    return found


def prepared() -> dict[str, Any]:
    """Where a run's state lies before and after a step."""
    pipeline = make_pipeline(DeviceMesh(sequence=2, guidance=2))
    sampler, state, inputs = pipeline.start(
        "a red ball", tiny_model.SAMPLING, attention=PLANS["draft"]
    )
    before = [x.sharding for x in jax.tree.leaves(state)]
    programs, _ = pipeline.compile(sampler, state, inputs)
    state, report = sampler.run_step(programs, state, inputs, 3)
    leaves = jax.tree.leaves(state)
    mesh = pipeline.model.mesh
    of_heads = NamedSharding(mesh, P(None, "guidance", "sequence"))
    return {
        "equal": all(
            x.sharding.is_equivalent_to(where, x.ndim)
            for x, where in zip(leaves, before, strict=True)
        ),
        "masks": all(
            x.sharding.is_equivalent_to(of_heads, x.ndim)
            for x in jax.tree.leaves(state.masks)
        ),
        "devices of a report": len(report.estimate.sharding.device_set),
    }


def loaded(name: str) -> dict[str, Any]:
    """Weights that are read to where a mesh wants them, and those of one device."""
    model, mesh = make_model(name), LAYOUTS["weights"]
    export, load = {
        "wan": (export_wan_transformer, load_wan_transformer),
        "hunyuan": (export_hunyuan_transformer, load_hunyuan_transformer),
    }[name.partition("-")[0]]
    weights = export(model)
    one, several = (load(weights, model.config, mesh=m) for m in (None, mesh))
    before = [x.sharding for x in jax.tree.leaves(nnx.state(several))]
    held = held_share(nnx.state(several))
    ShardedTransformer(several, mesh)
    leaves = jax.tree.leaves(nnx.state(several))
    after = [x.sharding for x in leaves]
    pairs = zip(*(jax.tree.leaves(nnx.state(m)) for m in (one, several)), strict=True)
    return {
        "held": held,
        "stays": all(
            x.is_equivalent_to(y, leaf.ndim)
            for x, y, leaf in zip(before, after, leaves, strict=True)
        ),
        "equal": all((np.asarray(x) == np.asarray(y)).all() for x, y in pairs),
    }


CASES = {
    "step": step,
    "gradient": gradient,
    "videos": videos,
    "pair": pair,
    "program": program,
    "prepared": prepared,
    "loaded": loaded,
}


def main() -> None:
    found = {}
    for case in sys.argv[1:]:
        name, *options = case.split("/")
        found[case] = CASES[name](*options)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
