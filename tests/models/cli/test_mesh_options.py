"""`draft-video generate --mesh`: what is asked for, refused, and written."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from models.cli import generate, main
from models.cli import mesh as cli_mesh
from models.cli.parser import build_parser
from models.diffusion.mesh import DeviceMesh

ROOT = Path(__file__).parents[3]
SMALL = ("--size", "32x32", "--frames", "3", "--steps", "2")


def parse(*options: str):
    return build_parser().parse_args(["generate", "a ball", *options])


def test_axes_make_a_mesh():
    arguments = parse("--mesh", "sequence=2,guidance=4", "--shard-weights")
    expected = DeviceMesh(sequence=2, guidance=4, shard_weights=True)
    assert cli_mesh.mesh_from(arguments) == expected
    assert cli_mesh.mesh_from(parse("--mesh", "guidance=2")) == DeviceMesh(guidance=2)
    assert cli_mesh.mesh_from(parse()) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heads=2", "of the axes sequence and guidance"),
        ("sequence=0", "must be AXIS=N"),
        ("sequence=2,", "must be AXIS=N"),
        ("sequence=2,sequence=3", "names an axis twice"),
    ],
    ids=["axis", "zero", "comma", "twice"],
)
def test_other_texts_are_refused(capsys, text, message):
    assert main(["generate", "a ball", "--mesh", text]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "sequence=2"], "does not divide the 3 heads of the model"),
        (["--mesh", "guidance=3"], "does not divide the 2 rows of a call"),
        (["--mesh", "guidance=2", "--guidance", "1"], "the 1 rows of a call"),
        (
            ["--mesh", "guidance=2", "--guidance-batching", "two_calls"],
            "the 1 rows of a call",
        ),
        (["--mesh", "sequence=3,guidance=2"], "has 6 devices, but there are 4"),
        (["--shard-weights"], "pass --mesh sequence=2, too"),
    ],
    ids=["heads", "rows", "unguided", "two calls", "devices", "no mesh"],
)
def test_a_mesh_that_does_not_fit_is_refused_before_loading(
    capsys, monkeypatch, tmp_path, options, message
):
    counted = SimpleNamespace(returncode=0, stdout="4\n")
    monkeypatch.setattr(cli_mesh.subprocess, "run", lambda *_, **__: counted)
    monkeypatch.setattr(generate, "make_run", None)
    output = tmp_path / "run"
    assert main(["generate", "a red ball", *options, "--output", str(output)]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def command(output: Path, *options: str) -> list[str]:
    start = [sys.executable, "-m", "models.cli", "generate", "a red ball bounces"]
    return [*start, *SMALL, *options, "--output", str(output)]


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_video_of_several_devices_is_that_of_one(tmp_path):
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=6"}
    mesh = ["--mesh", "sequence=3,guidance=2", "--shard-weights"]
    reports = []
    for name, options in (("one", []), ("several", mesh)):
        output = tmp_path / name
        subprocess.run(
            command(output, *options), cwd=ROOT, env=os.environ | devices, check=True
        )
        assert (output / "video.mp4").stat().st_size
        reports.append(json.loads((output / "report.json").read_text()))
    one, several = reports
    assert one["mesh"] is None
    assert several["mesh"] == {"sequence": 3, "guidance": 2, "shard_weights": True}
    assert several["kept_share"] == pytest.approx(one["kept_share"])


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_of_several_processes_the_first_one_writes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = []
    for index in range(2):
        told = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        mesh = ["--mesh", "guidance=2", "--shard-weights"]
        processes.append(
            subprocess.Popen(
                command(tmp_path / f"of {index}", *mesh),
                cwd=ROOT,
                env=os.environ | told,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    printed = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert (tmp_path / "of 0" / "video.mp4").exists()
    assert not (tmp_path / "of 1").exists()
    assert "video.mp4" in printed[0][0]
    assert "of 1" not in printed[1][0]  # the network's own lines are there
    assert "compile" not in printed[1][0]
