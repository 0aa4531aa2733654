"""Plans of dense and of draft attention."""

import numpy as np
import pytest

from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule, VideoGrid

CONFIG = DraftConfig.paper(sparsity=0.5)
GRID = VideoGrid(1, 16, 32)  # 4 tiles, hence 16 pairs


def test_dense_has_neither_config_nor_steps():
    plan = AttentionPlan.dense()
    assert plan.is_dense
    assert (plan.config, plan.schedule) == (None, None)
    assert plan.steps(np.array([900.0]), num_layers=2, grid=GRID) is None


def test_draft_takes_the_papers_schedule_by_default():
    plan = AttentionPlan.draft(CONFIG)
    assert not plan.is_dense
    assert plan.config is CONFIG
    assert plan.schedule == SparsitySchedule(dense_fraction=0.25)


def test_steps_follow_schedule_and_config():
    schedule = SparsitySchedule(
        dense_above_timestep=925.0, dense_layers=(1,), sparsity=0.75
    )
    plan = AttentionPlan.draft(CONFIG, schedule)
    steps = plan.steps(np.array([1000.0, 500.0, 100.0]), num_layers=3, grid=GRID)
    dense = [[True, True, True], [False, True, False], [False, True, False]]
    np.testing.assert_array_equal(steps.dense, dense)
    np.testing.assert_array_equal(steps.budget, [4, 4, 4])
    np.testing.assert_array_equal(steps.refresh, [False, True, True])


def test_equal_plans_are_one_key():
    plans = [
        AttentionPlan.dense(),
        AttentionPlan.draft(CONFIG),
        AttentionPlan.draft(DraftConfig.paper(sparsity=0.9)),
        AttentionPlan.draft(CONFIG, SparsitySchedule()),
    ]
    again = [
        AttentionPlan(config=None, schedule=None),
        AttentionPlan.draft(DraftConfig.paper(sparsity=0.5), SparsitySchedule.paper()),
    ]
    assert len({*plans, *again}) == len(plans)


@pytest.mark.usefixtures("without_annotations")
@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"config": CONFIG, "schedule": None}, ValueError, "but schedule=None"),
        ({"config": None, "schedule": SparsitySchedule()}, ValueError, "config=None"),
        ({"config": "draft", "schedule": None}, TypeError, "config is str"),
        ({"config": CONFIG, "schedule": CONFIG}, TypeError, "schedule is DraftConfig"),
    ],
    ids=["no_schedule", "no_config", "config_type", "schedule_type"],
)
def test_bad_fields(fields, error, message):
    with pytest.raises(error, match=message):
        AttentionPlan(**fields)


@pytest.mark.usefixtures("without_annotations")
def test_draft_without_config_names_dense():
    with pytest.raises(TypeError, match=r"exact attention is AttentionPlan\.dense"):
        AttentionPlan.draft(None)


@pytest.mark.parametrize("given", ["config", "schedule"])
def test_one_part_of_draft_attention_names_the_other(given):
    parts = {"config": DraftConfig.paper(), "schedule": SparsitySchedule.paper()}
    (missing,) = parts.keys() - {given}
    message = f"^{given} is given, but {missing}=None"
    with pytest.raises(ValueError, match=message):
        AttentionPlan(**{given: parts[given], missing: None})
