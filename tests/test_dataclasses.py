"""No dataclass changes once it is made, and fields of settings are named."""

import dataclasses
import importlib
import pkgutil

import draft_jax
import models.checkpoints
import models.diffusion
import pallas_kernels


def dataclasses_of(package):
    """Those that a package's modules define, by name."""
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        for value in vars(module).values():
            is_own = getattr(value, "__module__", None) == info.name
            if is_own and isinstance(value, type) and dataclasses.is_dataclass(value):
                yield f"{info.name}.{value.__name__}", value


NAMED_FIELDS = [
    *("AttentionPlan", "BlockMask", "DraftConfig", "PooledTokens", "DraftStep"),
    *("DraftAttentionFn", "StepPlan", "SparsitySchedule", "BackendChoice"),
    *("KernelConfig", "Plan", "ChunkConfig", "Device", "Problem", "Backend"),
    *("SubTiles", "MeansByHead", "Compensation", "Correction"),
    *("Geometry", "Tiling", "QKNorm", "NormRopePoolPlan", "PoolPlan", "RankingPath"),
    *("RowsPlan", "Comparison", "AttentionView", "StepReport", "GenerationResult"),
    *("Sampler", "Sampling", "FlowEuler", "FlowUniPC", "Settings", "FewSteps"),
]
# What adds up problems while it reads.
COLLECTORS = {"models.checkpoints.lora.modules.ModuleReader"}
# `==` of arrays has no one truth: their owners are equal to themselves only.
OWN_EQUALITY = ["StepPlan", "AttentionView", "Sampler"]


def test_all_are_frozen_and_settings_are_named():
    """A field that is added, or moves, never changes what a call means."""
    packages = (draft_jax, pallas_kernels, models.checkpoints, models.diffusion)
    classes = dict(pair for package in packages for pair in dataclasses_of(package))
    assert len(classes) > 50
    changing = {n for n, c in classes.items() if not c.__dataclass_params__.frozen}
    assert changing <= COLLECTORS
    by_name = {name.rpartition(".")[2]: cls for name, cls in classes.items()}
    by_position = [
        name
        for name in NAMED_FIELDS
        if not all(field.kw_only for field in dataclasses.fields(by_name[name]))
    ]
    assert not by_position
    for name in OWN_EQUALITY:
        assert by_name[name].__eq__ is object.__eq__
        assert by_name[name].__hash__ is object.__hash__
