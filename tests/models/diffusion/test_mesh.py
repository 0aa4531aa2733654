"""Transformers on several devices: results of one, and what devices send each other."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.diffusion.experts import StreamedExperts
from models.diffusion.mesh import DeviceMesh

ROOT = Path(__file__).parents[3]
# Largest error measured, relative to the largest value: 5e-7; in FP8, where sums are
# rounded to other steps of 8 bits, 2e-6, and 1e-5 of a residual.
MOST_ERROR, MOST_FLOAT8_ERROR = 5e-6, 1e-4
FLOATS, WIDTH = 4, 32  # bytes; channels of the models of `mesh_cases`
ROWS, TOKENS, TEXT, LAYERS = 2, 45, 6, 3
PATCH_BYTES = 64 * FLOATS  # 2 x 2 positions of 16 channels
LAYOUTS = {"sequence": (4, 1), "guidance": (1, 2), "both": (2, 2), "weights": (4, 2)}


def run(*cases: str) -> dict[str, dict]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.diffusion.mesh_cases", *cases],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(case: str, found: dict) -> None:
    most = MOST_FLOAT8_ERROR if "float8" in case else MOST_ERROR
    assert found["error"] <= most, case
    assert found["error of residual"] <= most, case
    assert found["error of reuse"] <= most, case
    assert found["equal masks"], case


def sent(case: str, stacks: int) -> list[list]:
    """What one call without spread weights sends, worked out from sizes.

    In each layer queries, keys and values go to heads and the output back to tokens.
    Wan's norm over all heads gathers two numbers of each token. The text's heads are
    gathered where it attends, too. Then the narrow patches, and the velocity of both
    branches.
    """
    _, name, _, layout = case.split("/")
    sequence, guidance = LAYOUTS[layout]
    rows, frames = ROWS // guidance, 4 if "reference" in name else 3
    local = -(-15 * frames // sequence)
    found: list[list] = []
    if sequence > 1:
        part = rows * local * WIDTH * FLOATS
        found += [["all-to-all", part, True]] * (4 * stacks)
        tokens = rows * sequence * local
        found += [["all-gather", tokens * PATCH_BYTES, False]]
        if name.startswith("wan"):
            found += [["all-gather", tokens * 2 * FLOATS, True]] * stacks
        if name.startswith("hunyuan"):
            found += [["all-gather", rows * TEXT * WIDTH * FLOATS, True]] * stacks
    if guidance > 1:
        found += [["all-gather", ROWS * TOKENS * PATCH_BYTES, False]]
    return sorted(found)


STEPS = [
    "step/wan/draft/both",
    "step/wan-held/means/both",  # two noise levels
    "step/wan/dense/sequence",
    "step/wan/draft/guidance",
    "step/hunyuan/draft/both",
    "step/hunyuan/dense/sequence",
    "step/hunyuan-reference/draft/sequence",
]


@pytest.mark.nightly
@pytest.mark.parametrize("case", STEPS)
def test_a_step_sends_what_it_is_designed_to(case):
    (found,) = run(case).values()
    check(case, found)
    assert found["collectives"] == sent(case, 1 if "wan" in case else 2)
    assert found["held"] == 1.0
    if case == "step/wan/draft/both":
        assert found["masks"] == ["P(None, 'guidance', 'sequence')"] * 2


@pytest.mark.nightly
@pytest.mark.parametrize("layout", ["guidance", "both"])
def test_a_step_of_the_sampler_sends_a_small_sum_more(layout):
    """Shares of computed pairs are added up, once; latents are where they are used.

    A sum over both axes of the mesh is one over each.
    """
    (found,) = run(f"program/wan/{layout}").values()
    axes = sum(size > 1 for size in LAYOUTS[layout])
    shares = ["all-reduce", LAYERS * FLOATS, False]
    assert set(found) == {"dense", "sparse"}
    for kind, collectives in found.items():
        sums = [shares] * (axes if kind == "sparse" else 0)
        expected = sent(f"step/wan/draft/{layout}", 1)
        assert collectives == sorted([*sums, *expected]), kind


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["wan", "wan-float8", "hunyuan-reference"])
def test_weights_are_gathered_layer_by_layer(name):
    """Of 8 devices each holds an eighth of the matrices, and the vectors."""
    case = f"step/{name}/draft/weights"
    (found,) = run(case).values()
    check(case, found)
    assert found["held"] < (0.25 if "float8" in name else 0.16)
    # Nothing that is gathered is as large as a stack of layers, nor as the tokens.
    sizes = [size for kind, size, _ in found["collectives"] if kind == "all-gather"]
    assert max(sizes) <= 2 * WIDTH * 4 * WIDTH * FLOATS
    in_layers = [c for c in found["collectives"] if c[2] and c[0] == "all-to-all"]
    assert len(in_layers) == (4 if "wan" in name else 8)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", ["wan/draft/both", "hunyuan/dense/sequence"])
def test_gradients_are_those_of_one_device(case):
    (found,) = run(f"gradient/{case}").values()
    assert found["error"] <= 1e-5  # measured 1e-6


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_videos_are_those_of_one_device():
    cases = [
        "videos/none/draft/weights",
        "videos/easy/dense/guidance",
        "videos/mag/draft/weights",
        "videos/mag/dense/two_calls",
    ]
    for case, found in run(*cases).items():
        assert found["error"] <= 2e-5, case  # measured 3e-6
        # The codec's norms enlarge it up to thirtyfold; measured 4e-5.
        assert found["error of video"] <= 2e-4, case
        assert found["equal shares"], case
        assert found["equal skips"], case
        assert all(found["skipped"]) == ("none" not in case), case
        assert found["equal records"] == [True] * (2 * ("draft" in case)), case


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_two_transformers_that_take_turns_are_shared():
    """Of 8 steps a cache skips the third and fourth, and after the switch the seventh.

    The same as on one device: see `test_experts`.
    """
    for case, found in run("pair/draft/both", "pair/dense/weights").items():
        assert found["error"] <= 2e-5, case
        assert found["equal skips"], case
        assert found["skipped"] == 3, case
        assert found["held"] < 0.6 if "weights" in case else found["held"] == 1.0


@pytest.mark.nightly
def test_a_step_leaves_its_state_where_it_found_it():
    (found,) = run("prepared").values()
    assert found == {"equal": True, "masks": True, "devices of a report": 1}


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["wan-float8", "hunyuan"])
def test_weights_are_read_to_where_they_are_wanted(name):
    (found,) = run(f"loaded/{name}").values()
    assert found["held"] < (0.25 if "float8" in name else 0.16)
    assert found["stays"]
    assert found["equal"]


def test_transformers_that_wait_in_the_hosts_memory_are_refused():
    experts = object.__new__(StreamedExperts)  # nothing of it is looked at
    with pytest.raises(ValueError, match="give ResidentExperts with a mesh"):
        experts.on_devices(lambda model: model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence": 0}, "sequence=0 must be a positive integer"),
        ({"guidance": True}, "guidance=True must be a positive integer"),
    ],
    ids=["zero", "bool"],
)
def test_sizes_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DeviceMesh(**options)


def test_what_does_not_fit_is_told_with_sizes_that_do():
    mesh = DeviceMesh(sequence=5, guidance=2)
    assert str(mesh) == "sequence=5,guidance=2"
    mesh.check_devices(10, 10)
    mesh.check_devices(16, 16)
    with pytest.raises(ValueError, match=r"has 10 devices, but there are 8: .*most 8"):
        mesh.check_devices(8, 8)
    with pytest.raises(ValueError, match=r"those of all hosts are 16: .*product is 16"):
        mesh.check_devices(16, 8)
    mesh.check_heads(40)
    with pytest.raises(ValueError, match=r"12 heads .*these do: 1, 2, 3, 4, 6, 12"):
        mesh.check_heads(12)
    mesh.check_rows(4)
    with pytest.raises(ValueError, match=r"3 rows .*these sizes do: 1, 3"):
        mesh.check_rows(3)
    mesh.check_tokens(9)  # 2, 2, 2, 2, 1
    for tokens in (4, 6, 8):  # 6 are 2, 2, 2, and none for two devices
        with pytest.raises(ValueError, match=f"any of the {tokens} tokens"):
            mesh.check_tokens(tokens)
    with pytest.raises(ValueError, match=r"these fit: 1, 2, 3, 6$"):
        dataclasses.replace(mesh, sequence=4).check_tokens(6)
