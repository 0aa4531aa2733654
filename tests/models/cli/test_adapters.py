"""Adapters on the command line: what is told before anything is loaded."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from models.cli import main
from models.cli import model as cli_model
from models.cli.adapters import suggest_few_steps
from models.wan.sampling import a14b_sampling
from tests.wan_folders import TEXT_TO_VIDEO

COMMAND = ("generate", "a cat", "--checkpoint", TEXT_TO_VIDEO, "--size", "48x32")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs up to the loading; returns what `load_pipeline` is given."""
    seen = []

    def stop(path, **arguments):
        seen.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_model, "load_pipeline", stop)

    def run(*arguments):
        output = ("--output", tmp_path / "out", "--frames", "5")
        status = main([str(part) for part in (*COMMAND, *output, *arguments)])
        return status, seen

    return run


@pytest.fixture
def adapter(tmp_path):
    file = tmp_path / "wan_lightx2v_4step.safetensors"
    safetensors.numpy.save_file({"head.diff_m": np.zeros((1, 2, 16))}, file)
    return file


def test_steps_and_guidance_of_a_fast_adapter_are_suggested(run, adapter, capsys):
    status, seen = run("--lora", adapter)
    assert (status, len(seen)) == (130, 1)
    notes = [line for line in capsys.readouterr().err.splitlines() if "4step" in line]
    assert notes == [
        "draft-video: note: wan_lightx2v_4step.safetensors was made for few steps (its "
        "name says '4step'): --steps 4 --guidance 1 suit it; this run has 50 steps and "
        "guidance 5"
    ]


@pytest.mark.parametrize("steps", ["4", "8"])
def test_nothing_is_said_to_who_knows(run, adapter, capsys, steps):
    status, _ = run("--lora", adapter, "--steps", steps, "--guidance", "1")
    assert status == 130
    assert "few steps" not in capsys.readouterr().err


@pytest.mark.nightly
def test_both_strengths_of_two_transformers_are_suggested(adapter):
    sampling = a14b_sampling(num_steps=4, guidance=1.0)
    with pytest.warns(UserWarning, match="--guidance 1 --low-guidance 1 suit it; .* 3"):
        suggest_few_steps([Path(f"high:{adapter}")], sampling)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known = dataclasses.replace(sampling, low_guidance=1.0)
        suggest_few_steps([Path(f"high:{adapter}")], known)


def test_the_run_keeps_what_it_was_given(run, adapter, monkeypatch):
    requests = []
    load = cli_model.Request.load
    monkeypatch.setattr(
        cli_model.Request, "load", lambda self: requests.append(self) or load(self)
    )
    run("--lora", adapter, "--steps", "30")
    assert (requests[0].sampling.num_steps, requests[0].sampling.guidance) == (30, 5.0)


def test_a_missing_adapter_is_refused_before_anything_is_loaded(run, tmp_path, capsys):
    status, seen = run("--lora", tmp_path / "absent.safetensors")
    assert (status, seen) == (2, [])
    assert "absent.safetensors does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "strict"),
    [((), True), (("--lora-strict", "yes"), True), (("--lora-strict", "no"), False)],
    ids=["default", "yes", "no"],
)
def test_strictness_is_passed_on(run, adapter, flags, strict):
    _, seen = run("--lora", adapter, *flags)
    assert seen[0]["lora_strict"] is strict
    assert seen[0]["loras"] == [(adapter, 1.0)]
