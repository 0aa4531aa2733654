"""The device that a call is compiled for."""

import dataclasses

import jax

NUM_MULTIPROCESSORS = 132  # of an H100 or H200 SXM, where no GPU can be asked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """The device a call is compiled for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: Its name, for messages.
      compute_capability: (9, 0) for Hopper; None when it is not an NVIDIA GPU.
    """

    platform: str
    kind: str = "unknown"
    compute_capability: tuple[int, int] | None = None

    @property
    def is_hopper(self) -> bool:
        """Whether kernels compiled for sm_90 run on it: H100, H200."""
        return self.compute_capability == (9, 0)

    def why_not_hopper(self) -> str | None:
        """Returns why kernels for sm_90 do not run here, or None if they do."""
        if self.is_hopper:
            return None
        capability = self.compute_capability
        found = "" if capability is None else f" (sm_{capability[0]}{capability[1]})"
        return (
            f"it needs an NVIDIA Hopper GPU (sm_90), not {self.platform} "
            f"{self.kind}{found}"
        )


def current_device(*arrays: object) -> Device:
    """Describes the device that a call on these arrays runs on.

    A concrete array answers for itself. Under a transformation arrays carry no
    device, and jit compiles for the default device (`jax.default_device`, else the
    first one), so that one is described. Code jitted for another platform than the
    default one should name its backend.
    """
    for array in arrays:
        if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
            return describe_device(next(iter(array.devices())))
    default = jax.config.jax_default_device
    if default is None:
        return describe_device(jax.devices()[0])
    if isinstance(default, str):
        return describe_device(jax.devices(default)[0])
    return describe_device(default)


def describe_device(device: jax.Device) -> Device:
    """Reads platform, name and compute capability of a jax device."""
    capability = None
    is_cuda = "cuda" in device.client.platform_version.lower()
    if device.platform == "gpu" and is_cuda:
        major, minor = str(device.compute_capability).split(".")
        capability = int(major), int(minor)
    return Device(
        platform=device.platform,
        kind=device.device_kind,
        compute_capability=capability,
    )


def num_multiprocessors() -> int:
    """Returns how many CTAs the GPU runs at a time: one on each multiprocessor."""
    if jax.default_backend() != "gpu":
        return NUM_MULTIPROCESSORS
    return jax.local_devices()[0].core_count
