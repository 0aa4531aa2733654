"""Adapters made for few steps, by the names that are in use."""

import json

import numpy as np
import pytest
import safetensors.numpy

from models.checkpoints.lora import find_few_steps
from models.checkpoints.memory_map import CheckpointError

TENSORS = {"x.diff": np.zeros(2, np.float32)}


def save(folder, name, header=None):
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.safetensors"
    safetensors.numpy.save_file(TENSORS, file, header)
    return file


@pytest.mark.parametrize(
    ("name", "num_steps", "reason"),
    [
        ("wan2.1_t2v_14b_lora_rank64_lightx2v_4step", 4, "'4step'"),
        ("Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64", 4, "'stepdistill'"),
        ("Wan2.2-Lightning_T2V-A14B-4steps-lora_HIGH_fp16", 4, "'4steps'"),
        ("Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32", 6, "'causvid'"),
        ("Wan21_AccVid_T2V_14B_lora_rank32_fp16", 8, "'accvid'"),
        ("Wan2.1_T2V_14B_FusionX_LoRA", 8, "'fusionx'"),
        ("FastWan2.1-T2V-1.3B", 3, "'fastwan2'"),
        ("Wan21_self_forcing_lora", 4, "'selfforcing'"),
        ("my-turbo", 4, "'turbo'"),
        ("rCM_8-step", 8, "'8-step'"),
        ("style_2000steps", None, ""),
        ("style-step00001000", None, ""),
        ("style-epoch-10-steps", None, ""),
        ("style-000010-step500", None, ""),
        ("turbolent_waters", None, ""),
        ("footstep", None, ""),
    ],
)
def test_names(tmp_path, name, num_steps, reason):
    found = find_few_steps(save(tmp_path, name))
    if num_steps is None:
        assert found is None
        return
    assert (found.num_steps, found.guidance) == (num_steps, 1.0)
    assert found.reason.startswith("its name says ")
    assert found.reason.endswith(reason)
    assert found.suits(num_steps, 1.0)
    assert not found.suits(num_steps, 5.0)
    assert not found.suits(50, 1.0)


MADE_FOR = {  # steps, and the most that are in use, by what names say
    (3, 6): ["fastwan"],
    (6, 8): ["FastHunyuan", "hyvideo_FastVideo_LoRA"],
    (4, 8): [
        *("lightx2v", "lightning", "step-distill", "cfg_distill", "selfforcing"),
        *("distill", "distilled", "turbo", "turbowan", "TurboDiffusion", "lcm"),
        *("dmd", "dmd2", "rCM", "x-4steps"),
    ],
    (6, 10): ["CausVid"],
    (8, 10): ["fusionx", "accvid", "accvideo"],
    (16, 32): ["x_16_steps"],
}


@pytest.mark.parametrize("steps", MADE_FOR, ids=str)
def test_steps_and_the_most_of_each_name(tmp_path, steps):
    for name in MADE_FOR[steps]:
        found = find_few_steps(save(tmp_path, name))
        assert (found.num_steps, found.most_steps) == steps, name
        assert found.suits(steps[1], 1.0)
        assert not found.suits(steps[1] + 1, 1.0)


@pytest.mark.parametrize("name", ["x-0steps", "x-17steps"])
def test_numbers_that_are_no_few_steps(tmp_path, name):
    assert find_few_steps(save(tmp_path, name)) is None


def test_headers_and_folders_say_it_too(tmp_path):
    header = {"ss_output_name": "wan_lightx2v", "ss_steps": "4 steps"}
    found = find_few_steps(save(tmp_path, "x", header))
    assert found.reason == "ss_output_name in its header says 'lightx2v'"
    file = save(tmp_path / "Wan21-CausVid", "pytorch_lora_weights")
    assert find_few_steps(file).reason == "its folder says 'causvid'"
    header = {"ss_datasets": json.dumps(["lightx2v"]), "ss_steps": "4 steps"}
    assert find_few_steps(save(tmp_path, "y", header)) is None


def test_long_texts_are_not_searched(tmp_path):
    header = {"modelspec.description": "a" * 1_000 + " lightx2v"}
    assert find_few_steps(save(tmp_path, "x", header)) is None
    fits = {"modelspec.description": "a" * (1_000 - len(" turbo")) + " turbo"}
    assert find_few_steps(save(tmp_path, "x", fits)).num_steps == 4
    too_long = {"modelspec.description": "a" + fits["modelspec.description"]}
    assert find_few_steps(save(tmp_path, "x", too_long)) is None


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="absent does not exist"):
        find_few_steps(tmp_path / "absent")
