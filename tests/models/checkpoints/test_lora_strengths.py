"""The strength of adapters, which tools say in many places."""

import inspect
import json
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from models.checkpoints.conversion import ConversionError
from models.checkpoints.lora import merge, merge_lora
from models.checkpoints.lora.strengths import MOST_BYTES
from models.checkpoints.memory_map import CheckpointError
from models.checkpoints.safetensors_io import load_safetensors

RANK = 4
UNKNOWN = "it does not say its alpha"


@pytest.fixture
def adapter(tmp_path):
    """Writes an adapter of rank 4, and returns the factor of its product."""

    def write(*, header=None, config=None, alpha=None, halves="lora_A lora_B", x="a.x"):
        (tmp_path / "own").mkdir(exist_ok=True)
        file = tmp_path / "own" / "lora.safetensors"
        down, up = halves.split()
        lora = {
            f"{x}.{down}.weight": np.ones((RANK, 3), np.float32),
            f"{x}.{up}.weight": np.ones((2, RANK), np.float32),
        }
        if alpha is not None:
            lora[f"{x}.alpha"] = np.array(alpha, np.float32)
        safetensors.numpy.save_file(lora, file, header)
        if config is not None:
            text = config if isinstance(config, str) else json.dumps(config)
            file.with_name("adapter_config.json").write_text(text)
        return file

    return write


def factor_of(lora, x="a.x"):
    weights = {f"{x}.weight": np.zeros((2, 3), np.float32)}
    merged = np.asarray(merge_lora(weights, lora, {x: x})[f"{x}.weight"])
    assert (merged == merged[0, 0]).all()
    return merged[0, 0] / RANK


PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 16}
KOHYA = {"ss_network_dim": "4", "ss_network_alpha": "16.0"}
ARGUMENTS = {"ss_network_args": json.dumps({"rs_lora": "True"})}


@pytest.mark.parametrize(
    ("places", "factor"),
    [
        ({"config": PEFT}, 4.0),
        ({"config": PEFT | {"use_rslora": True}}, 8.0),
        ({"config": PEFT | {"fan_in_fan_out": True}}, 4.0),
        ({"config": PEFT | {"init_lora_weights": "gaussian"}}, 4.0),
        ({"config": PEFT | {"r": 8, "rank_pattern": {"x": 4}}}, 4.0),
        ({"config": PEFT | {"alpha_pattern": {r"a\.\w+": 2}}}, 0.5),
        ({"header": {"lora_adapter_metadata": json.dumps(PEFT)}}, 4.0),
        ({"header": {"lora_config": json.dumps({"r": 4, "lora_alpha": 16})}}, 4.0),
        ({"header": {"lora_config": json.dumps({"rank": 4, "alpha": 16})}}, 4.0),
        ({"header": {"lora_alpha": "16", "lora_rank": "4"}}, 4.0),
        ({"header": KOHYA, "halves": "lora_down lora_up"}, 4.0),
        ({"header": KOHYA | ARGUMENTS, "halves": "lora_down lora_up"}, 8.0),
        ({"header": KOHYA, "alpha": 2, "halves": "lora_down lora_up"}, 0.5),
        ({"header": KOHYA | ARGUMENTS, "alpha": 32}, 8.0),  # LyCORIS: 16 * sqrt(4)
        ({"header": KOHYA | ARGUMENTS, "alpha": 16}, 8.0),  # its first versions
        ({"config": PEFT, "alpha": 16}, 4.0),
        ({"config": PEFT, "header": {"lora_config": json.dumps(PEFT)}}, 4.0),
        ({"header": {"rank": "high", "alpha": "ζ"}, "alpha": 16}, 4.0),
        ({"header": KOHYA | {"ss_network_args": "{" * 9_999}, "alpha": 16}, 4.0),
    ],
    ids=lambda value: None if isinstance(value, float) else str(value)[:60],
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_every_place_is_read(adapter, places, factor):
    assert factor_of(adapter(**places)) == factor


def test_a_reader_and_a_folder_have_their_settings_too(adapter):
    file = adapter(config=PEFT)
    assert factor_of(load_safetensors(file)) == 4.0
    assert factor_of(file.parent) == 4.0


def test_convolutions_have_an_alpha_of_their_own(tmp_path):
    header = KOHYA | {"ss_network_args": json.dumps({"conv_dim": 2, "conv_alpha": 1})}
    lora = {
        "x.lora_down.weight": np.ones((2, 3, 1, 1, 1), np.float32),
        "x.lora_up.weight": np.ones((2, 2, 1, 1, 1), np.float32),
    }
    safetensors.numpy.save_file(lora, tmp_path / "lora.safetensors", header)
    weights = {"x.weight": np.zeros((2, 3, 1, 1, 1), np.float32)}
    merged = merge_lora(weights, tmp_path / "lora.safetensors", {"x": "x"})
    np.testing.assert_array_equal(np.asarray(merged["x.weight"]), 2 * 1 / 2)


def test_whole_factors_of_lokr_follow_the_tool_that_made_them(tmp_path):
    """PEFT scales them by alpha / r; LyCORIS does not scale them."""
    lora = {
        "x.lokr_w1": np.ones((1, 1), np.float32),
        "x.lokr_w2": np.ones((2, 3), np.float32),
        "x.alpha": np.array(1e10, np.float32),
    }
    file = tmp_path / "lora.safetensors"
    safetensors.numpy.save_file(lora, file, KOHYA)
    weights = {"x.weight": np.zeros((2, 3), np.float32)}
    merged = merge_lora(weights, file, {"x": "x"})
    np.testing.assert_array_equal(np.asarray(merged["x.weight"]), 1)
    config = {"peft_type": "LOKR", "r": 4, "alpha": 16}
    file.with_name("adapter_config.json").write_text(json.dumps(config))
    del lora["x.alpha"]
    safetensors.numpy.save_file(lora, file)
    merged = merge_lora(weights, file, {"x": "x"})
    np.testing.assert_array_equal(np.asarray(merged["x.weight"]), 4)


def test_whole_factors_need_no_alpha_for_lycoris(tmp_path):
    """The header is of all modules; the factor of whole ones is 1 with or without."""
    lora = {
        "x.lokr_w1": np.ones((1, 1), np.float32),
        "x.lokr_w2": np.ones((2, 3), np.float32),
    }
    file = tmp_path / "lora.safetensors"
    safetensors.numpy.save_file(lora, file, KOHYA)
    merged = merge_lora({"x.weight": np.zeros((2, 3), np.float32)}, file, {"x": "x"})
    np.testing.assert_array_equal(np.asarray(merged["x.weight"]), 1)


def test_the_rank_of_lokr_need_not_be_said(tmp_path):
    """PEFT's factor is alpha / r, and r is the size that the factors share."""
    lora = {
        "x.lokr_w1": np.ones((1, 1), np.float32),
        "x.lokr_w2_a": np.ones((2, 2), np.float32),
        "x.lokr_w2_b": np.ones((2, 3), np.float32),
    }
    file = tmp_path / "lora.safetensors"
    safetensors.numpy.save_file(lora, file)
    config = {"peft_type": "LOKR", "alpha": 16}
    file.with_name("adapter_config.json").write_text(json.dumps(config))
    merged = merge_lora({"x.weight": np.zeros((2, 3), np.float32)}, file, {"x": "x"})
    np.testing.assert_array_equal(np.asarray(merged["x.weight"]), 2 * 16 / 2)


def test_places_may_differ_by_a_rounding(adapter):
    """Files of bfloat16 round alpha too, to 18.125 here."""
    alpha = ml_dtypes.bfloat16(18.1)
    file = adapter(config=PEFT | {"lora_alpha": 18.1}, alpha=alpha)
    assert factor_of(file) == 18.125 / 4


def test_warnings_name_the_line_that_merges(monkeypatch):
    """Checks of types, which tests add, stand between; they are taken away here."""
    monkeypatch.setattr(merge, "_warn", inspect.unwrap(merge._warn))
    weights = {"x.weight": np.zeros((2, 3), np.float32)}
    lora = {
        "x.lora_A.weight": np.ones((RANK, 3), np.float32),
        "x.lora_B.weight": np.ones((2, RANK), np.float32),
    }
    with pytest.warns(UserWarning, match=UNKNOWN) as seen:
        inspect.unwrap(merge_lora)(weights, lora, {"x": "x"})
    assert [warning.filename for warning in seen] == [__file__]


@pytest.mark.parametrize(
    "places",
    [{}, {"header": {"ss_network_dim": "Dynamic", "ss_network_alpha": "None"}}],
    ids=["nothing", "dynamic"],
)
def test_a_strength_that_nobody_says_is_told(adapter, places):
    with pytest.warns(UserWarning, match=UNKNOWN) as seen:
        assert factor_of(adapter(**places)) == 1.0
    assert len(seen) == 1


def test_renamed_matrices_have_their_alpha_in_them(adapter):
    """musubi-tuner's convert_lora.py multiplies alpha in and keeps the header."""
    header = KOHYA | {"ss_network_module": "networks.lora_wan"}
    with pytest.warns(UserWarning, match="multiply the strength by 4$"):
        assert factor_of(adapter(header=header)) == 1.0


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (
            {"config": PEFT, "alpha": 8},
            "a.x.alpha=8 means a factor of 2 for a.x, alpha 16 of adapter_config.json "
            "one of 4",
        ),
        (
            {"config": PEFT, "header": {"lora_config": '{"lora_alpha": 4}'}},
            "alpha 16 of adapter_config.json means a factor of 4 for a.x, alpha 4 of "
            "lora_config one of 1",
        ),
        (
            {"config": PEFT | {"r": 16}},
            "adapter_config.json says the rank 16 of a.x, whose matrices have 4; if "
            "that file is another adapter's, give each a folder of its own",
        ),
        (
            {"header": KOHYA | {"ss_network_dim": "8"}, "halves": "lora_down lora_up"},
            "ss_network_alpha says the rank 8 of a.x, whose matrices have 4",
        ),
        *(
            (
                {"header": {"lora_alpha": "16", name: "8"}},
                "says the rank 8 of a.x, whose matrices have 4",
            )
            for name in ("lora_rank", "network_dim", "rank", "r")
        ),
        ({"alpha": 0}, "alpha: a.x.alpha is 0, which tools read as 0 or as rank"),
        (
            {"config": PEFT | {"use_dora": True}},
            "half: a.x.lora_A.weight stands without the magnitude that "
            "adapter_config.json promises by use_dora",
        ),
    ],
    ids=[
        *("tensor", "two settings", "rank", "kohya's rank"),
        *("lora_rank", "network_dim", "plain rank", "r", "zero", "dora"),
    ],
)
def test_places_that_disagree_are_refused(adapter, places, message):
    with pytest.raises(ConversionError, match=re.escape(message)):
        factor_of(adapter(**places))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ("[]", "AttributeError"),
        ({"lora_alpha": "x"}, "could not convert"),
        ({"lora_alpha": True}, "lora_alpha=True must be a positive number"),
        ('{"lora_alpha": NaN}', "lora_alpha=nan must be a positive number"),
        ('{"lora_alpha": 1e999}', "lora_alpha=inf must be a positive number"),
        ({"r": 1.5}, "the rank 1.5 must be a whole number"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model before train"),
        ({"peft_type": "OFT"}, "peft_type='OFT' is none of"),
        ({"alpha_pattern": {"(a+)+b": 1}}, r"alpha_pattern has the pattern '\(a"),
        ({"rank_pattern": {"x": None}}, "rank_pattern has no number for 'x'"),
        ({"rank_pattern": dict.fromkeys(map(str, range(5_000)), 1)}, "5000 entries"),
        (
            {"alpha_pattern": {f"{'.*' * 99}{i}": 1 for i in range(50)}},
            "alpha_pattern has patterns that would take long",
        ),
        (" " * (MOST_BYTES + 1), "more than 1048576 bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_damaged_settings_beside_the_file(adapter, config, message):
    file = adapter(config=config)
    with pytest.raises(CheckpointError, match=message) as error:
        factor_of(file)
    assert "has damaged settings, adapter_config.json" in str(error.value)
    assert len(str(error.value)) < 1_500


def test_long_settings_in_a_header_are_not_parsed(adapter):
    header = {"lora_config": " " * (MOST_BYTES + 1)}
    with pytest.raises(CheckpointError, match="more than 1048576 characters"):
        factor_of(adapter(header=header))
