"""What is read of a device, with stand-ins for those that are not here."""

import types

import pytest

from pallas_kernels.common.device import Device, describe_device


def make_device(platform, kind, version, capability=None):
    return types.SimpleNamespace(
        platform=platform,
        device_kind=kind,
        compute_capability=capability,
        client=types.SimpleNamespace(platform_version=version),
    )


@pytest.mark.usefixtures("without_jaxtyping")
@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (
            make_device("gpu", "NVIDIA H200", "PJRT C API\ncuda 13000", "9.0"),
            Device(platform="gpu", kind="NVIDIA H200", compute_capability=(9, 0)),
        ),
        (
            make_device("gpu", "AMD Instinct", "rocm 70000", "gfx942"),
            Device(platform="gpu", kind="AMD Instinct"),
        ),
        (make_device("cpu", "cpu", "cpu"), Device(platform="cpu", kind="cpu")),
    ],
    ids=["hopper", "amd", "cpu"],
)
def test_a_device_is_described_as_it_names_itself(device, expected):
    assert describe_device(device) == expected
