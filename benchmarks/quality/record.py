"""The folder of a run: its record, and frames and maps for the document.

Everything is written as it comes, so a run that was stopped goes on where it ended.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.records import environment
from benchmarks.quality.methods import DENSITIES
from benchmarks.quality.prompts import REPORTING, TUNING
from models.files import write_whole

RECORD = "quality.json"
# A record of other values of these does not compare with this run's.
FIXED = ("setup", "device", "jax")


def what_is_measured(setup: Mapping[str, Any]) -> str:
    """Says how many prompts and densities a run has, and of how many.

    Args:
      setup: See `RunFolder.open`.
    """
    sampling, grid = setup["sampling"], setup["grid"]
    full = set(DENSITIES) <= set(setup["densities"])
    is_whole = full and len(setup["reporting"]) >= len(REPORTING)
    densities = ", ".join(f"{density:g}" for density in setup["densities"])
    return (
        f"{'A whole' if is_whole else 'A reduced'} run: {len(setup['reporting'])} "
        f"reporting prompts (a whole one has {len(REPORTING)}), "
        f"{len(setup['tuning'])} tuning prompts ({len(TUNING)}), densities {densities} "
        f"({', '.join(f'{density:g}' for density in DENSITIES)}); "
        f"{sampling['num_steps']} steps, {sampling['frames']} frames of "
        f"{sampling['height']} x {sampling['width']} pixels, "
        f"{grid[0]} x {grid[1]} x {grid[2]} tokens in {setup['tiles']} tiles."
    )


@dataclasses.dataclass
class RunFolder:
    """A folder with what a run has measured so far.

    Attributes:
      path: The folder.
      record: Contents of `quality.json`.
    """

    path: Path
    record: dict[str, Any]

    @classmethod
    def open(cls, path: Path, setup: dict[str, Any]) -> "RunFolder":
        """Goes on with a folder, or begins one.

        Args:
          path: The folder.
          setup: What all figures depend on: model, prompts, sizes and steps.

        Raises:
          ValueError: The folder is of another setup, device or version of JAX.
        """
        head = environment()
        fixed = {
            "setup": json.loads(json.dumps(setup)),
            "device": head["device"],
            "jax": head["versions"]["jax"],
        }
        file = path / RECORD
        record = {**fixed, "trials": [], "layers": [], "top_p": {}, "environments": []}
        if file.exists():
            record = json.loads(file.read_text())
            for name in FIXED:
                if record[name] != fixed[name]:
                    raise ValueError(
                        f"{file} has {name}={record[name]!r}, this run has "
                        f"{fixed[name]!r}: pass another folder as --output"
                    )
        record["environments"].append(head)
        path.mkdir(parents=True, exist_ok=True)
        return cls(path, record)

    def save(self) -> None:
        """Writes the record, whole or not at all."""
        text = json.dumps(self.record, indent=1) + "\n"
        write_whole(self.path / RECORD, text.encode())

    def has(self, key: tuple[str, str, float]) -> bool:
        """Whether a trial is finished."""
        known = ((r["part"], r["name"], r["density"]) for r in self.record["trials"])
        return key in known

    def add_trial(self, row: dict[str, Any]) -> None:
        """Keeps a trial."""
        self.record["trials"].append(row)
        self.save()

    def has_layers(self, name: str, step: int) -> bool:
        """Whether a method's layers were measured at a step."""
        rows = self.record["layers"]
        return any(row["name"] == name and row["step"] == step for row in rows)

    def add_layers(self, rows: list[dict[str, Any]]) -> None:
        """Keeps what a method does to the layers at a step."""
        self.record["layers"] += rows
        self.save()

    def keep_array(self, name: str, array: np.ndarray) -> None:
        """Keeps an array, such as frames for the document."""
        np.save(self.path / f"{name}.npy", array)
