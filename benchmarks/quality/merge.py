"""Joins the folders of runs that went side by side, such as on two GPUs.

    CUDA_VISIBLE_DEVICES=0 python -m benchmarks.quality.run --output a --parts methods &
    CUDA_VISIBLE_DEVICES=1 python -m benchmarks.quality.run --output b --parts layers
    python -m benchmarks.quality.merge a b --times times.json --output lab

The folder is one that `benchmarks.quality.run` goes on with. What two runs have both is
taken from the first.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.record import FIXED, RECORD, RunFolder
from benchmarks.quality.summary import summarize
from models.files import output_folder

Record = dict[str, Any]


def merge(records: Sequence[Record], names: Sequence[str]) -> Record:
    """Returns the record of several runs of the same setup, device and JAX.

    Args:
      records: Contents of each `quality.json`.
      names: What they are called in messages.

    Raises:
      ValueError: They do not compare: the field is named.
    """
    first = records[0]
    for name, other in zip(names[1:], records[1:], strict=True):
        for field in FIXED:
            if other[field] != first[field]:
                raise ValueError(
                    f"{name} has {field}={other[field]!r}, {names[0]} has "
                    f"{first[field]!r}: only runs that agree in it can be joined"
                )
    merged: Record = {}
    for record in records:
        for field, value in record.items():
            if field in ("trials", "layers"):
                known = set(map(_key, merged.setdefault(field, [])))
                merged[field] += [row for row in value if _key(row) not in known]
            elif field == "environments":
                merged[field] = merged.get(field, []) + value
            elif isinstance(value, dict):
                merged[field] = value | merged.get(field, {})
            else:
                merged.setdefault(field, value)
    merged["summary"] = summarize(merged)
    return merged


def _key(row: Record) -> tuple[Any, ...]:
    """Tells a trial, or a layer at a step and a density, from all others."""
    fields = ("part", "name", "density", "step", "layer")
    return tuple(row.get(field) for field in fields)


def main(arguments: Sequence[str] | None = None) -> None:
    """Joins the folders that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--output", type=output_folder, required=True)
    parser.add_argument("--times", type=Path, help="see benchmarks.quality.run")
    options = parser.parse_args(arguments)
    records = [json.loads((folder / RECORD).read_text()) for folder in options.folders]
    if options.times is not None:
        times = json.loads(options.times.read_text())
        records = [record | {"times": times} for record in records]
    merged = merge(records, list(map(str, options.folders)))
    options.output.mkdir(parents=True, exist_ok=True)
    for folder in reversed(options.folders):  # the first one's pictures stay
        for file in folder.glob("*.npy"):
            if folder.resolve() != options.output.resolve():
                shutil.copy(file, options.output)
    RunFolder(options.output, merged).save()
    print(f"{len(merged['trials'])} trials, {len(merged['layers'])} rows of layers")


if __name__ == "__main__":
    main()
