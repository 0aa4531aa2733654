"""The sampler that a published folder names, and what the solvers here have of it."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from models.checkpoints.memory_map import CheckpointError

# Settings that the solvers here have; others in a scheduler's file are refused.
_SCHEDULER_ALWAYS = {
    "num_train_timesteps": 1000,
    "shift_terminal": None,
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
_SCHEDULER_FIXED: dict[str, dict[str, Any]] = {
    "UniPCMultistepScheduler": _SCHEDULER_ALWAYS
    | {
        "disable_corrector": [],
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "predict_x0": True,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_p": None,
        "solver_type": "bh2",
        "thresholding": False,
        "use_flow_sigmas": True,
    },
    "FlowMatchEulerDiscreteScheduler": _SCHEDULER_ALWAYS
    | {"invert_sigmas": False, "stochastic_sampling": False},
}
# Values that diffusers takes for settings left out, if they are others than these.
_SCHEDULER_DEFAULTS: dict[str, dict[str, Any]] = {
    "UniPCMultistepScheduler": {
        "prediction_type": "epsilon",
        "use_flow_sigmas": False,
    },
    "FlowMatchEulerDiscreteScheduler": {},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """The sampler that a folder names for its model.

    Attributes:
      solver: UniPC of order 2, or Euler steps.
      grid: Noise levels of Wan's own code, or of diffusers.
      shift: Shift of the noise levels. The original says 5, or 3 for videos from an
        image at 480p; its folders do not hold it, and it is 5 then.
    """

    solver: Literal["unipc", "euler"] = "unipc"
    grid: Literal["wan", "diffusers"] = "wan"
    shift: float = 5.0


def read_scheduler(stored: dict[str, Any], file: Path) -> SchedulerSettings:
    """Reads the settings of a scheduler of diffusers.

    Args:
      stored: Its `scheduler_config.json`.
      file: Where that is, for messages.

    Raises:
      CheckpointError: It asks for what no solver here computes; all such settings are
        named.
    """
    name = stored.get("_class_name")
    if name not in _SCHEDULER_FIXED:
        raise CheckpointError(
            f"{file} has _class_name={name!r}; expected one of {list(_SCHEDULER_FIXED)}"
        )
    fixed, stored = _SCHEDULER_FIXED[name], _SCHEDULER_DEFAULTS[name] | stored
    if other := {
        key: stored[key] for key in fixed if stored.get(key, fixed[key]) != fixed[key]
    }:
        needed = {key: fixed[key] for key in other}
        raise CheckpointError(f"{file} asks for {other}; this port has {needed}")
    is_unipc = name == "UniPCMultistepScheduler"
    shift = stored.get("flow_shift" if is_unipc else "shift", 1.0)
    if not isinstance(shift, int | float) or not 0.0 < shift < float("inf"):
        raise CheckpointError(f"{file} has {shift=}; expected a positive number")
    return SchedulerSettings(
        solver="unipc" if is_unipc else "euler",
        grid="diffusers",
        shift=float(shift),
    )
