"""The precision that a device gets for the one that was asked for."""

import inspect
import re

import pytest

from models.diffusion import dtypes
from models.diffusion.dtypes import SlowLinearsWarning, check_linears, choose_linears
from pallas_kernels.common import Device
from tests.warnings_once import forget_warnings

CPU = Device(platform="cpu")
H100 = Device(platform="gpu", kind="H100", compute_capability=(9, 0))
A100 = Device(platform="gpu", kind="A100", compute_capability=(8, 0))


@pytest.fixture
def on(monkeypatch):
    """Makes a device the default one."""

    def make_default(device):
        monkeypatch.setattr(dtypes, "current_device", lambda: device)
        forget_warnings()

    return make_default


@pytest.mark.parametrize(
    ("device", "wish", "expected"),
    [
        (CPU, "bfloat16", "bfloat16"),
        (CPU, "float8", "float8"),
        (H100, "bfloat16", "bfloat16"),
        (H100, "float8", "float8"),
        (H100, "auto", "float8"),
        (A100, "bfloat16", "bfloat16"),
    ],
    ids=lambda value: getattr(value, "kind", value),
)
@pytest.mark.filterwarnings("error")
def test_wishes_that_are_granted(on, device, wish, expected):
    on(device)
    assert choose_linears(wish) == expected


@pytest.mark.parametrize(
    ("device", "reason"),
    [(CPU, "a CPU multiplies FP8 slower"), (A100, r"8\.9 .* not gpu A100 \(sm_80\)")],
    ids=["cpu", "A100"],
)
def test_auto_says_once_that_there_is_no_fast_fp8(on, device, reason, recwarn):
    on(device)
    assert [choose_linears("auto") for _ in range(3)] == ["bfloat16"] * 3
    (warning,) = recwarn.list
    assert warning.category is SlowLinearsWarning
    assert "linears='auto' takes float32, not FP8: " in str(warning.message)
    assert re.search(reason, str(warning.message))


def test_a_card_without_fp8_is_refused_by_name(on):
    on(A100)
    with pytest.raises(
        ValueError, match=r"float8.*A100 \(sm_80\); expected 'bfloat16'"
    ):
        choose_linears("float8")


def test_other_precisions_are_refused():
    unchecked = inspect.unwrap(choose_linears)  # without the types that tests check
    with pytest.raises(ValueError, match="linears='int8' must be one of"):
        unchecked("int8")


@pytest.mark.parametrize("apart", [False, True])
def test_a_card_without_fp8_is_refused_before_it_is_used(on, monkeypatch, apart):
    on(CPU if apart else A100)
    monkeypatch.setattr(dtypes, "_device_apart", lambda: A100 if apart else CPU)
    check_linears("auto", apart=apart)
    with pytest.raises(ValueError, match=r"linears='float8'.*A100 \(sm_80\); expected"):
        check_linears("float8", apart=apart)


def test_another_process_that_cannot_look_refuses_nothing(monkeypatch):
    monkeypatch.setattr(dtypes, "_device_apart", lambda: None)
    check_linears("float8", apart=True)


@pytest.mark.nightly
def test_another_process_sees_the_same_device():
    assert dtypes._device_apart() == dtypes.current_device()
