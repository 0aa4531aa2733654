"""No dataclass changes once it is made, and fields of settings are named."""

import dataclasses
import importlib
import pkgutil

import pytest

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


@pytest.fixture(scope="module")
def classes():
    packages = (draft_jax, pallas_kernels, models.checkpoints, models.diffusion)
    return dict(pair for package in packages for pair in dataclasses_of(package))


def test_all_are_frozen(classes):
    assert len(classes) > 50
    changing = [n for n, c in classes.items() if not c.__dataclass_params__.frozen]
    assert not changing


NAMED_FIELDS = [
    *("AttentionPlan", "BlockMask", "DraftConfig", "PooledTokens", "DraftStep"),
    *("DraftAttentionFn", "StepPlan", "SparsitySchedule", "BackendChoice"),
    *("KernelConfig", "Plan", "ChunkConfig", "Device", "Problem", "Backend"),
    *("Geometry", "Tiling", "QKNorm", "NormRopePoolPlan", "PoolPlan", "RankingPath"),
    *("RowsPlan", "Comparison", "AttentionView", "StepReport", "GenerationResult"),
    *("Sampler", "Sampling", "FlowEuler", "FlowUniPC"),
]


@pytest.mark.parametrize("name", NAMED_FIELDS)
def test_fields_of_settings_and_results_are_named(classes, name):
    """A field that is added, or moves, never changes what a call means."""
    (found,) = (cls for full, cls in classes.items() if full.endswith(f".{name}"))
    assert all(field.kw_only for field in dataclasses.fields(found))


@pytest.mark.parametrize("name", ["StepPlan", "AttentionView", "Sampler"])
def test_what_holds_arrays_is_equal_to_itself_only(classes, name):
    """`==` of arrays has no one truth; their owners also stay hashable."""
    (found,) = (cls for full, cls in classes.items() if full.endswith(f".{name}"))
    assert found.__eq__ is object.__eq__
    assert found.__hash__ is object.__hash__
