"""Puts what was measured of new weights of the small model into two records.

    python -m benchmarks.mini.record --run outputs/run --codec outputs/codec \
        --measured outputs/measured --commit 0123abc --codec-commit 0123abc

`--run` is the output folder of `models.mini.train`, with a file commands.txt, a command
a line; `--codec` that of `models.mini.train_codec`. In the folder `--measured` the
folder `faithfulness` has the report of `models.mini.prompt_scores`, others those of
`models.mini.evaluate`. In it and in `--run` gpus.txt is what nvidia-smi says of each
GPU. The records are `mini_training.json` and `mini_means_h200.json`;
`benchmarks.mini.document` writes what they say into the site.
"""

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.options import make_parser
from benchmarks.common.records import ROOT, write_json

RESULTS = ROOT / "benchmarks" / "results"
TRAINING, MEANS = RESULTS / "mini_training.json", RESULTS / "mini_means_h200.json"
LAST_STEPS = 500  # over which the last loss is a mean
CODEC_STEPS = 200  # between losses of the codec that are kept

Log = Mapping[str, Any]
Size = tuple[int, int, int]  # frames, rows and columns of pixels


def training_record(
    run: Path, codec: Path, measured: Path, *, commit: str, codec_commit: str
) -> dict[str, Any]:
    """Returns what the training was and what its weights do.

    Args:
      run: Folder of the training.
      codec: Folder of the codec's training.
      measured: Folder of the reports.
      commit: What was run.
      codec_commit: What the codec's training ran.
    """
    log, gpus = read(run / "log.json"), read_lines(run / "gpus.txt")
    return {
        "what": "training and evaluation of the weights in models/mini/weights",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
        "device": log["device"],
        "gpus": gpus,
        "versions": log["versions"],
        "commands": read_lines(run / "commands.txt"),
        "training": {
            **totals(log),
            "last_loss": last_losses(log["losses"]),
            "stages": stages(log),
            "config": log["config"],
            "losses": rounded(log["losses"]),
        },
        "codec": {"commit": codec_commit, **codec_record(codec)},
        "faithfulness": read(measured / "faithfulness" / "faithfulness.json"),
        "attention": [
            {name: report[name] for name in ("size", "tile", "prompts", "attention")}
            for report in reports(measured)
            if report["attention"]
        ],
    }


def means_record(measured: Path, *, commit: str) -> dict[str, Any]:
    """Returns how close sparse videos come to dense ones, by size of the video.

    Args:
      measured: Folder of the reports.
      commit: What was run.
    """
    by_size: dict[str, dict[str, Any]] = {}
    for report in reports(measured):
        if not report["quality"]:
            continue
        width, height = report["size"]
        merged = by_size.setdefault(
            f"{height}x{width}",
            {name: value for name, value in report.items() if name != "attention"}
            | {"quality": []},
        )
        trials = [row["trial"] for row in merged["quality"]]
        # Reports of fewer prompts are of attention alone.
        if report["prompts"] == merged["prompts"]:
            merged["quality"] += [
                {name: value for name, value in row.items() if name != "config"}
                for row in report["quality"]
                if row["trial"] not in trials
            ]
    gpus = read_lines(measured / "gpus.txt")
    return {"commit": commit, "gpus": gpus, "sizes": by_size}


def reports(measured: Path) -> list[dict[str, Any]]:
    """Returns the reports of `models.mini.evaluate`.

    Small videos come first; of a size, the reports of most prompts.
    """
    found = [read(file) for file in sorted(measured.glob("*/evaluation.json"))]
    return sorted(found, key=lambda report: (report["size"], -len(report["prompts"])))


def codec_record(folder: Path) -> dict[str, Any]:
    """Returns what the codec's training was and what its videos lose."""
    log = read(folder / "log.json")
    losses = [entry for entry in log["losses"] if entry["step"] % CODEC_STEPS == 0]
    return {
        "device": log["device"],
        "versions": log["versions"],
        **totals(log),
        "stages": log["stages"],
        "config": log["config"],
        "held_out": read(folder / "codec_report.json"),
        "losses": rounded(losses),
    }


def totals(log: Log) -> dict[str, Any]:
    """Returns how long a training was."""
    return {
        "devices": log.get("devices", 1),
        "steps": log["steps"],
        "videos": log["videos"],
        "seconds_of_stepping": round(log["seconds"], 1),
        "steps_skipped": log["skipped"],
        "optimizer_started_at_steps": log["starts"],
    }


def stages(log: Log) -> list[dict[str, Any]]:
    """Returns the stages with the steps and the seconds that each took.

    Losses are logged for each size since the last entry, so that these tell the stage
    of an interval. One that is of two stages counts as the later, and so does one of
    sizes that two stages have, unless a later interval is of an earlier stage. One that
    a new start has cut short need not have all sizes of its stage: it tells nothing.
    """
    seen: dict[int, set[Size]] = {}
    seconds = {0: 0.0}
    for entry in log["losses"]:
        seen.setdefault(entry["step"], set()).add(tuple(entry["size"]))
        seconds[entry["step"]] = entry["seconds"]
    named = [{size_of(turn) for turn in stage["turns"]} for stage in log["stages"]]
    longest = max(len(stage["turns"]) for stage in log["stages"])
    rows = [stage | {"steps": 0, "seconds": 0.0} for stage in log["stages"]]
    last, stage = max(seen), len(rows) - 1
    for step in sorted(seen, reverse=True):
        before = max(number for number in seconds if number < step)
        begun = max(before, *(start for start in log["starts"] if start < step))
        if step - begun >= longest:
            fitting = (
                i for i, own in enumerate(named[: stage + 1]) if own == seen[step]
            )
            stage = max(fitting, default=stage)
        rows[stage]["steps"] += step - before
        rows[stage]["seconds"] += seconds[step] - seconds[before]
    rows[-1]["steps"] += log["steps"] - last
    rows[-1]["seconds"] += log["seconds"] - seconds[last]
    return [row | {"seconds": round(row["seconds"], 1)} for row in rows]


def size_of(turn: Mapping[str, int]) -> Size:
    """Returns the size of a step's videos."""
    return turn["frames"], turn["height"], turn["width"]


def last_losses(losses: Sequence[Log]) -> list[dict[str, Any]]:
    """Returns the mean loss of the last steps, for each size that they have."""
    end = losses[-1]["step"]
    by_size: dict[Size, list[float]] = {}
    for entry in losses:
        if entry["step"] > end - LAST_STEPS:
            by_size.setdefault(tuple(entry["size"]), []).append(entry["loss"])
    return [
        {"size": list(size), "loss": round(sum(values) / len(values), 5)}
        for size, values in sorted(by_size.items())
    ]


def rounded(losses: Iterable[Log]) -> list[dict[str, Any]]:
    """Returns losses with as many digits as they tell."""
    return [{**entry, "loss": round(entry["loss"], 5)} for entry in losses]


def read(file: Path) -> dict[str, Any]:
    """Reads a JSON object."""
    return json.loads(file.read_text())


def read_lines(file: Path) -> list[str]:
    """Returns the lines of a text that are not empty."""
    return [line for line in file.read_text().splitlines() if line.strip()]


def main(arguments: list[str] | None = None) -> None:
    """Writes both records."""
    parser = make_parser(__doc__)
    for name in ("--run", "--codec", "--measured"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--commit", required=True, help="what was run")
    parser.add_argument("--codec-commit", help="for the codec; the same by default")
    parser.add_argument("--measured-commit", help="for the reports; the same, too")
    options = parser.parse_args(arguments)
    record = training_record(
        options.run,
        options.codec,
        options.measured,
        commit=options.commit,
        codec_commit=options.codec_commit or options.commit,
    )
    write_json(TRAINING, record)
    measured_commit = options.measured_commit or options.commit
    write_json(MEANS, means_record(options.measured, commit=measured_commit))


if __name__ == "__main__":
    main()
