"""The command's imports and its time to start, in processes of its own."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest

from draft_jax import Compensation, Correction, DraftConfig, SparsitySchedule
from draft_jax.config import EdgeTiles, Pooling, Ranking, Selection
from models.cli import choices
from models.cli.parser import build_parser
from models.diffusion import sampling, schedulers
from models.diffusion.dtypes import Linears
from models.diffusion.sampler import GuidanceBatching
from models.hunyuan.sampling import HUNYUAN_PIXELS
from models.wan.sampling import WAN_PIXELS

ROOT = Path(__file__).parents[3]
# Packages of which none is needed to parse options or to print help.
HEAVY = (
    *("jax", "jaxlib", "flax", "numpy", "einops", "jaxtyping", "tqdm", "matplotlib"),
    *("gradio", "fastapi", "pandas"),
)
# 0.30 to 0.37 s on two busy cores, 2026-11-29; with jax 1.8 to 3.6 s.
MOST_SECONDS = 1.0
LIGHT = f"""
import sys
from models.cli import main
status = main(sys.argv[1:])
print("loaded:", sorted(set({HEAVY}) & set(sys.modules)))
sys.exit(status)
"""


def python(*arguments, cwd=ROOT, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["generate", "--help"], 0),
        (["inspect", "--help"], 0),
        (["calibrate", "--help"], 0),
        (["decode", "--help"], 0),
        (["app", "--help"], 0),
        (["generate"], 2),
    ],
    ids=str,
)
def test_parsing_and_help_import_nothing_heavy(arguments, status):
    done = python("-c", LIGHT, *arguments)
    assert done.stdout.splitlines()[-1] == "loaded: []"
    assert done.returncode == status


def test_only_the_page_imports_gradio():
    """An import would fail: Gradio is made one that cannot be imported."""
    code = (
        "import sys; sys.modules['gradio'] = None\n"
        "import draft_jax, models, models.loading\n"
        "import models.cli.generate, models.cli.inspect, models.app.runner\n"
        "print(sorted({'starlette', 'fastapi', 'uvicorn'} & set(sys.modules)))"
    )
    done = python("-c", code)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_the_version_comes_at_once():
    def seconds():
        start = time.monotonic()
        done = python("-m", "models.cli", "--version")
        assert done.stdout.startswith("draft-video ")
        return time.monotonic() - start

    # The fastest of five: other processes may hold both cores.
    assert min(seconds() for _ in range(5)) < MOST_SECONDS


def test_the_command_finds_ours_before_a_folder_of_the_same_name(tmp_path):
    for name in ("models", "draft_jax", "pallas_kernels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('theirs')")
    start = "import sys; sys.argv[1:] = ['--version']; import draft_video as start\n"
    code = start + "sys.path.insert(0, sys.path[1]); sys.exit(start.main())"
    done = python("-c", code, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.stdout.startswith("draft-video ")
    assert (done.returncode, done.stderr) == (0, "")
    code = start + (
        "sys.meta_path.insert(0, start.NeighbourFinder)\n"
        "import draft_jax, models.wan, pallas_kernels\n"
        "print([m.__file__ for m in (draft_jax, models.wan, pallas_kernels)])"
    )
    done = python("-c", code, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    files = ("draft_jax", "models/wan", "pallas_kernels")
    assert ast.literal_eval(done.stdout) == [
        str(ROOT / name / "__init__.py") for name in files
    ]


# ------------------------------------------- plain data says what the classes say


def test_choices_are_those_of_the_configurations():
    assert get_args(Selection) == choices.SELECTIONS
    assert get_args(Pooling) == choices.POOLINGS
    assert get_args(EdgeTiles) == choices.EDGE_TILES
    assert get_args(Ranking) == choices.RANKINGS
    assert get_args(GuidanceBatching) == choices.GUIDANCE_BATCHINGS
    assert get_args(Linears) == choices.LINEARS
    assert get_args(schedulers.SolverName) == tuple(choices.GRIDS_OF_SOLVERS)
    for solver, grids in (
        ("euler", schedulers.EulerGrid),
        ("unipc", schedulers.UniPCGrid),
    ):
        assert get_args(grids) == choices.GRIDS_OF_SOLVERS[solver]
    assert {
        name: (width, height)
        for name, (height, width) in (WAN_PIXELS | HUNYUAN_PIXELS).items()
    } == choices.NAMED_SIZES
    shared = WAN_PIXELS.keys() & HUNYUAN_PIXELS.keys()
    assert all(WAN_PIXELS[name] == HUNYUAN_PIXELS[name] for name in shared)


def test_defaults_are_those_of_the_configurations():
    default = sampling.Sampling()
    for name, value in choices.SamplingDefaults()._asdict().items():
        assert getattr(default, name) == value, name
    for name, value in choices.MeansDefaults()._asdict().items():
        assert getattr(Compensation(), name) == value, name
    for name, value in choices.CorrectionDefaults()._asdict().items():
        assert getattr(Correction(), name) == value, name
    for name, value in choices.PaperDefaults()._asdict().items():
        assert getattr(DraftConfig.paper(), name) == value, name
    draft, schedule = DraftConfig(), SparsitySchedule.paper()
    for name, value in choices.DraftDefaults()._asdict().items():
        owner = draft if hasattr(draft, name) else schedule
        expected = getattr(owner, name)
        assert expected == value or (not expected and not value), name


def test_every_choice_is_offered():
    """A list of choices that no option uses would pass the tests above."""
    parser = build_parser()
    for option, values in (
        ("--selection", choices.SELECTIONS),
        ("--pooling", choices.POOLINGS),
        ("--edge-tiles", choices.EDGE_TILES),
        ("--ranking", choices.RANKINGS),
        ("--guidance-batching", choices.GUIDANCE_BATCHINGS),
        ("--image-fit", choices.IMAGE_FITS),
        ("--text-device", choices.TEXT_DEVICES),
        ("--linears", choices.LINEARS),
        ("--method", choices.METHODS),
        ("--vae-dtype", choices.VAE_DTYPES),
        ("--preset", choices.PRESETS),
        ("--solver", choices.GRIDS_OF_SOLVERS),
        ("--size", choices.NAMED_SIZES),
    ):
        for value in values:
            parser.parse_args(["generate", "a cat", option, value])
