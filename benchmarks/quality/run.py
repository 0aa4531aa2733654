"""Measures sparse attention against dense: every method, at equal density and time.

    python -m benchmarks.quality.run --output lab --reduced
    python -m benchmarks.quality.run --output lab --limit 500 --times times.json
    python -m benchmarks.quality.run --output lab --parts methods --methods ours paper
    python -m benchmarks.quality.run times --output times.json --shape hunyuan
    python -m benchmarks.quality.document lab

A run goes on where an earlier one with the same folder ended. `--checkpoint` takes any
model that `draft-video generate` takes; a published one needs `--steps`, `--size` and
`--frames` that suit it, and prompts in its own words may be given in a file, half of
them calm. First steps that are dense are run once for all methods. Parts:

floor         dense attention by two kernels: what no figure below can be told from
methods       every method at every density, on the reporting prompts
first_layer   some of them with the first layer dense, as published code has it
layers        error of each layer's output, and softmax mass that is kept
front         splits of a budget between exact blocks and means, on the tuning prompts
schedules     reused masks, and densities that fall or rise, on the tuning prompts
combinations  sparse attention, step caches and FP8 linears, alone and together, on the
              tuning prompts: presets of speed are chosen by them
presets       what was chosen, on the reporting prompts

Times of layers are those of a GPU at a full-size shape, from the command `times`;
without a file of them, nothing is said about equal time.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from benchmarks.common.options import height_by_width
from benchmarks.common.records import write_json
from benchmarks.quality import layers as layers_module
from benchmarks.quality import times as times_module
from benchmarks.quality.clips import Clips, shown_frames
from benchmarks.quality.generations import (
    Generation,
    Generations,
    Work,
    counts_of_steps,
    kept_density,
    steps_ms,
)
from benchmarks.quality.likeness import likeness
from benchmarks.quality.methods import (
    DENSE_FRACTION,
    DENSITIES,
    METHODS,
    config_at,
    first_sparse_step,
)
from benchmarks.quality.presets import StepTimes, choose_presets
from benchmarks.quality.prompts import REPORTING, TUNING, Prompt
from benchmarks.quality.record import RunFolder, what_is_measured
from benchmarks.quality.step_caches import cache_of, flat_ratios
from benchmarks.quality.summary import summarize
from benchmarks.quality.trials import (
    PARTS,
    SMALL,
    WHOLE,
    WHOLE_RUNS,
    Combination,
    Part,
    Trial,
    make_trials,
)
from draft_jax import AttentionPlan, extra_work
from models.diffusion.caches import MagRatios
from models.diffusion.calibration import measure_ratios
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.sampling import Sampling
from models.files import output_file, output_folder
from models.loading import load_pipeline

SHOWN_DENSITY = 0.1  # of the frames and maps that are kept for the document
STEPS_LOOKED_AT = 3
# Of one method, such as too little memory: others still run.
ERRORS = (jax.errors.JaxRuntimeError, FloatingPointError)
AHEAD = 16  # trials whose programs are compiled while others run
# What two cores do within ten minutes, of a third of the frames: all parts and methods.
REDUCED: dict[str, Any] = {
    "clips": 4,
    "tuning_clips": 2,
    "steps": 6,
    "densities": [0.25, 0.1],
    "looks": 1,
    "extent": SMALL,
}


class Lab:
    """A run: a model, its clips, and the folder of what was measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Loads the model and opens the folder."""
        self.options = options
        self.deadline = time.monotonic() + options.limit
        self.pipeline = self.load("bfloat16")
        self.sampling = self._sampling()
        steps = self.sampling.num_steps
        self.looked_at = layers_module.looked_at(steps, options.looks)
        self.generations = Generations(
            self.sampling, first_sparse_step(steps), self.looked_at
        )
        reporting, tuning = _prompts(options)
        batch = options.batch or len(reporting)
        self.reporting = Clips(prompts=reporting, first=0, batch=batch)
        self.tuning = Clips(prompts=tuning, first=len(reporting), batch=batch)
        shape = self.pipeline.latent_shape(self.sampling)
        self.grid = self.pipeline.model.grid(shape)
        self.folder = RunFolder.open(options.output, self._setup())
        self.failed: set[tuple[str, str, float]] = set()

    @functools.cache  # noqa: B019 (one lab lives as long as its process)
    def load(self, linears: Any) -> VideoPipeline:
        """Loads the model with linear layers of a precision.

        Raises:
          ValueError: A tile is given for a model of two transformers.
        """
        pipeline = load_pipeline(self.options.checkpoint, linears=linears)
        if self.options.tile is not None:  # of run time: weights do not depend on it
            if pipeline.experts is not None:
                raise ValueError(
                    f"--tile {self.options.tile} is given, but "
                    f"{self.options.checkpoint} has two transformers, whose tiles "
                    "are their own: leave it out"
                )
            model: Any = pipeline.model
            model.config = dataclasses.replace(model.config, tile=self.options.tile)
        return pipeline

    def _sampling(self) -> Sampling:
        options, sampling = self.options, self.pipeline.sampling
        changes: dict[str, Any] = {}
        if options.steps is not None:
            changes["num_steps"] = options.steps
        if options.frames is not None or options.reduced:
            third = -(-sampling.frames // 3)
            changes["frames"] = options.frames or third
        if options.size is not None:
            changes["height"], changes["width"] = options.size
        return dataclasses.replace(sampling, **changes)

    def _setup(self) -> dict[str, Any]:
        options = self.options
        return {
            "checkpoint": str(options.checkpoint or "shipped"),
            "reporting": [list(prompt) for prompt in self.reporting.prompts],
            "tuning": [list(prompt) for prompt in self.tuning.prompts],
            "batch": self.reporting.batch,
            "sampling": dataclasses.asdict(self.sampling),
            "grid": [self.grid.frames, self.grid.height, self.grid.width],
            "tile": list(self.grid.tile),
            "tiles": self.grid.num_visual_blocks,
            "densities": options.densities,
            "dense_fraction": DENSE_FRACTION,
        }

    @property
    def is_late(self) -> bool:
        """Whether nothing new is to begin."""
        return time.monotonic() > self.deadline

    def clips_of(self, trial: Trial) -> Clips:
        """Returns the clips of a trial."""
        return self.tuning if trial.on_tuning_prompts else self.reporting

    @functools.cache  # noqa: B019
    def dense(self, clips: Clips) -> Generation:
        """Generates dense videos, which every run makes anew."""
        found = self.generations.dense(self.pipeline, clips)
        name = "reporting" if clips == self.reporting else "tuning"
        times = self.folder.record.setdefault("dense_steps_ms", {})
        times[name] = steps_ms(found)
        if clips == self.reporting:
            self.folder.keep_array("frames_dense", shown_frames(found.videos))
        return found

    def top_p(self) -> dict[str, float]:
        """Returns the masses of "top_p" at the densities, chosen on tuning prompts."""
        record = self.folder.record
        if not record["top_p"]:
            found = layers_module.top_p_of_densities(
                self._looks(self.tuning), self.options.densities, self.grid
            )
            record["top_p"] = found
            self.folder.save()
        return record["top_p"]

    def _looks(self, clips: Clips) -> Any:
        few = dataclasses.replace(
            clips, prompts=clips.prompts[: self.options.looked_at]
        )
        seen = self.dense(clips).seen
        return layers_module.looks(
            self.pipeline, few, self.sampling, seen, self.generations.threads
        )

    def measure(self) -> list[str]:
        """Measures the parts that are asked for; returns those that are left."""
        left = []
        for part in self.options.parts:
            finished = self.layers() if part == "layers" else self.trials(part)
            if not finished:
                left.append(part)
        self.generations.stop()
        return left

    def trials(self, part: Part) -> bool:
        """Measures the trials of a part that are missing; returns if none is left."""
        names = list(self.options.methods) if part == "methods" else []
        masses: dict[str, float] = {}
        if "top_p" in names:
            others = [name for name in names if name != "top_p"]
            if not self.is_late:  # they compile while its masses are looked for
                self._prepare(self._missing(part, others, {}))
                masses = self.top_p()
            masses = self.folder.record["top_p"]
            names = names if masses else others
        if part == "presets" and not self.choose_presets():
            return False
        missing = self._missing(part, names, masses)
        is_whole = part != "methods" or len(names) == len(self.options.methods)
        bar = tqdm(missing, desc=part, disable=not missing, file=sys.stdout)
        for place, trial in enumerate(bar):
            if self.is_late:
                return False
            bar.set_postfix_str(f"{trial.name} {trial.density}")
            try:
                self._prepare(missing[place:])
                self.folder.add_trial(self.run_trial(trial))
            except ERRORS as error:
                bar.write(f"{trial.key}: {error}")
                self.failed.add(trial.key)
                is_whole = False
        return is_whole

    def _missing(
        self, part: Part, names: Sequence[str], top_p: dict[str, float]
    ) -> list[Trial]:
        asked = make_trials(
            part,
            names=names,
            densities=self.options.densities,
            top_p=top_p,
            num_steps=self.sampling.num_steps,
            extent=self.options.extent,
            presets=[
                Combination(**fields)
                for fields in self.folder.record.get("presets", {}).values()
            ],
        )
        return [trial for trial in asked if not self.folder.has(trial.key)]

    def choose_presets(self) -> bool:
        """Chooses presets once, when all combinations are measured or have failed.

        Returns:
          Whether they are chosen.
        """
        record = self.folder.record
        if not record.get("presets"):
            missing = self._missing("combinations", [], {})
            if any(trial.key not in self.failed for trial in missing):
                return False
            record["presets"] = choose_presets(record, StepTimes.shipped())
        return True

    def _prepare(self, trials: Sequence[Trial]) -> None:
        """Begins to compile what the next trials need, dense attention before them."""
        for trial in trials[:AHEAD]:
            clips = self.clips_of(trial)
            self.generations.prepare(Work(pipeline=self.pipeline), clips)
            ratios = functools.partial(flat_ratios, self.sampling, trial.attention)
            self.generations.prepare(self._work(trial, ratios), clips)

    def work_of(self, trial: Trial) -> Work:
        """Returns what a trial generates its clips with."""
        return self._work(trial, functools.partial(self.ratios, trial.attention))

    def _work(self, trial: Trial, ratios: Callable[[], MagRatios]) -> Work:
        first = 0 if trial.part in WHOLE_RUNS else self.generations.first_sparse
        return Work(
            pipeline=self.load(trial.linears),
            attention=trial.attention,
            cache=cache_of(trial.cache, ratios),
            first_step=first,
            dense_kernel=trial.dense_kernel,
        )

    @functools.cache  # noqa: B019
    def ratios(self, attention: AttentionPlan) -> MagRatios:
        """Measures the ratios of MagCache on a tuning prompt, in bfloat16."""
        return measure_ratios(
            self.pipeline,
            self.tuning.prompts[0].text,
            self.sampling,
            model=str(self.options.checkpoint or "shipped"),
            attention=attention,
        )

    def run_trial(self, trial: Trial) -> dict[str, Any]:
        """Samples the clips of a trial and compares them with dense ones."""
        clips, work = self.clips_of(trial), self.work_of(trial)
        dense = self.dense(clips)
        if trial.part in WHOLE_RUNS:
            found = self.generations.whole(work, clips)
        else:
            found = self.generations.go_on(work, clips, dense.begun)
        if trial.part == "methods" and trial.density == SHOWN_DENSITY:
            self.folder.keep_array(f"frames_{trial.name}", shown_frames(found.videos))
        return self._describe(trial, found, dense)

    def _describe(
        self, trial: Trial, found: Generation, dense: Generation
    ) -> dict[str, Any]:
        """Returns the record of a trial.

        `kept_density` and `work` are of sparse steps; work counts means and exact rows,
        too. Steps are those of the first batch, times those that this trial ran itself,
        without compiling.
        """
        config, kept = trial.attention.config, kept_density(found)
        extra = 0.0 if config is None else extra_work(self.grid, config)
        return {
            "part": trial.part,
            "name": trial.name,
            "density": trial.density,
            "kept_density": round(kept, 5),
            "work": round(kept + extra, 5),
            "steps": counts_of_steps(found.reports[0]),
            "steps_ms": steps_ms(found),
            "clips": likeness(found.videos, dense.videos),
        }

    def layers(self) -> bool:
        """Measures methods in single layers; returns if none is left."""
        names, densities = self.options.methods, self.options.densities
        steps = self.looked_at
        missing = [
            (name, step)
            for step in steps
            for name in names
            if not self.folder.has_layers(name, step)
        ]
        if not missing or self.is_late:
            return not missing
        top_p = self.top_p() if "top_p" in names else {}
        configs = {
            name: config_at(name, densities, top_p)
            for name in dict.fromkeys(name for name, _ in missing)
        }
        is_whole = True
        bar = tqdm(total=len(missing), desc="layers", file=sys.stdout)
        for look in self._looks(self.reporting):
            layers_module.prepare(look, configs, self.grid)
            masses = layers_module.masses_of_layers(look, self.grid)
            for name in [name for name, step in missing if step == look.step]:
                if self.is_late:
                    return False
                bar.set_postfix_str(f"{name}, step {look.step}")
                try:
                    rows, maps = layers_module.measure_method(
                        look,
                        name,
                        configs[name],
                        densities,
                        grid=self.grid,
                        masses=masses,
                        map_density=SHOWN_DENSITY,
                    )
                except ERRORS as error:
                    bar.write(f"layers, {name}, step {look.step}: {error}")
                    is_whole = False
                    continue
                if maps.size and look.step == steps[len(steps) // 2]:
                    self.folder.keep_array(f"maps_{name}", maps)
                self.folder.add_layers(rows)
                bar.update()
        return is_whole


def _prompts(options: argparse.Namespace) -> tuple[tuple[Prompt, ...], ...]:
    """Returns reporting and tuning prompts, at most as many as asked for.

    Raises:
      ValueError: A prompt is in both.
    """
    reporting, tuning = REPORTING, TUNING
    if options.prompts is not None:
        given = json.loads(options.prompts.read_text())
        reporting, tuning = (
            tuple(Prompt(*pair) for pair in given[name])
            for name in ("reporting", "tuning")
        )
    if shared := {p.text for p in reporting} & {p.text for p in tuning}:
        raise ValueError(f"{sorted(shared)} are reporting and tuning prompts")
    count = options.clips if options.tuning_clips is None else options.tuning_clips
    return reporting[: options.clips], tuning[:count]


def measure(options: argparse.Namespace) -> None:
    """Measures, and prints the floor and the summary."""
    lab = Lab(options)
    print(what_is_measured(lab.folder.record["setup"]), flush=True)
    left = lab.measure()
    record = lab.folder.record
    if options.times is not None:
        record["times"] = json.loads(options.times.read_text())
    record["summary"] = summarize(record)
    lab.folder.save()
    print(json.dumps(record["summary"], indent=1), flush=True)
    if left:
        print(f"--limit: {', '.join(left)} go on when run again", flush=True)


def measure_times(options: argparse.Namespace) -> None:
    """Times on a GPU those layers that the file lacks."""
    layers = times_module.layers_to_time(
        options.methods, options.densities, with_front=options.front
    )
    file, known = options.output, None
    if file.exists():
        known = json.loads(file.read_text())
    save = functools.partial(write_json, file)
    record = times_module.measure_times(
        options.shape, layers, save, known, options.limit
    )
    for row in record["rows"]:
        print(json.dumps(row), flush=True)


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("command", nargs="?", choices=("measure", "times"), default="measure")
    add("--output", type=Path, required=True, help="folder; of times, JSON file")
    add("--checkpoint", type=Path, help="the model that ships if left out")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--densities", nargs="+", type=float, default=list(DENSITIES))
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add(
        "--reduced",
        action="store_true",
        help="all parts and methods with fewer clips, densities, steps and frames: "
        "ten minutes on two cores",
    )
    add("--limit", type=float, default=float("inf"), metavar="SECONDS")
    add("--clips", type=int, help="at most so many; all by default")
    add("--tuning-clips", type=int, help="of tuning prompts; as --clips by default")
    add("--batch", type=int, help="clips sampled together; all by default")
    add("--looks", type=int, default=STEPS_LOOKED_AT, help="steps of layers")
    add("--looked-at", type=int, default=8, help="clips whose layers are measured")
    add("--prompts", type=Path, help='JSON: {"reporting": [[text, "calm"], ...], ...}')
    add("--steps", type=int, help="denoising steps; the model's by default")
    add("--frames", type=int, help="the model's by default")
    add("--size", type=height_by_width, metavar="HEIGHTxWIDTH")
    add("--tile", type=height_by_width, metavar="ROWSxCOLUMNS")
    add("--times", type=Path, help="JSON file that the command times has written")
    add("--shape", choices=times_module.TIME_SHAPES, default="hunyuan")
    add("--front", action="store_true", help="time sizes of means, too")
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; `--reduced` gives way to what is said.

    Exits with a message if it cannot be read, or its output cannot be written.
    """
    parser = make_parser()
    parser.set_defaults(extent=WHOLE)
    if parser.parse_args(arguments).reduced:
        parser.set_defaults(**REDUCED)
    options = parser.parse_args(arguments)
    check = output_file if options.command == "times" else output_folder
    try:
        check(str(options.output))
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --output: {error}")
    return options


def main() -> None:
    """Measures as the command line asks."""
    options = parse()
    {"measure": measure, "times": measure_times}[options.command](options)


if __name__ == "__main__":
    main()
