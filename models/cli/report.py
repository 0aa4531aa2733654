"""Details of a run that its report names, so that it can be repeated."""

import argparse
import dataclasses
import os
import platform
import re
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from draft_jax import DraftConfig, SparsitySchedule
from models.cli.version import package_version
from models.diffusion.sampling import Sampling

_VERSIONS = ("jax", "jaxlib", "flax", "numpy")


def run_details(
    arguments: argparse.Namespace,
    sampling: Sampling,
    config: DraftConfig,
    schedule: SparsitySchedule,
) -> dict[str, Any]:
    """Returns what a reader of a report needs to repeat the run.

    JAX is not used: it would take the GPU from text encoders that run beside it. See
    `device_details`.
    """
    checkpoint = arguments.checkpoint
    return {
        "prompt": arguments.prompt,
        "command": command_line(arguments.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": "shipped" if checkpoint is None else str(checkpoint),
        "sampling": dataclasses.asdict(sampling),
        "loras": [[str(path), strength] for path, strength in arguments.lora],
        "method": arguments.method,
        "preset": arguments.preset,
        "draft": dataclasses.asdict(config),
        "schedule": dataclasses.asdict(schedule),
        "hardware": {
            "processor": processor_name(),
            "cpu_cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
        },
        "versions": {
            "draft-attention-jax": package_version(),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _VERSIONS},
        },
    }


def device_details() -> dict[str, str]:
    """Returns the device that JAX runs on, as part of the details' "hardware"."""
    device = jax.devices()[0]
    return {"platform": device.platform, "device": device.device_kind}


def command_line(argv: Sequence[str]) -> str:
    """Returns the command as one would type it."""
    return shlex.join(["draft-video", *argv])


def processor_name() -> str:
    """Returns the name of the processor as the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        match = re.search(r"^model name\s*: (.*)$", information.read_text(), re.M)
        if match is not None:
            return match[1]
    return platform.processor() or platform.machine()
