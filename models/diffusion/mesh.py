"""A mesh of devices for one transformer: which axes it has, and what fits it."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Shaped

from pallas_kernels.common import make_plain, register_configuration

# Neighbours in the order of devices share a sequence: they exchange the most.
GUIDANCE, SEQUENCE = AXES = ("guidance", "sequence")


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceMesh:
    """How a transformer is spread over devices; changes time and memory alone.

    Args:
      sequence: Devices that share the tokens of a video, and its heads in attention.
      guidance: Devices, or groups of these, that share the rows of the batch: prompts
        and negative prompts.
      shard_weights: Whether each device holds a part of the weights only, and gets
        those of a layer when it needs them; else all are on each device.

    Raises:
      ValueError: A size is not a positive integer.
    """

    sequence: int = 1
    guidance: int = 1
    shard_weights: bool = False

    def __post_init__(self) -> None:
        make_plain(self)
        for name in AXES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")

    def __str__(self) -> str:
        """Returns it as `--mesh` takes it."""
        return ",".join(f"{name}={getattr(self, name)}" for name in reversed(AXES))

    @property
    def num_devices(self) -> int:
        """Number of devices of the mesh."""
        return self.sequence * self.guidance

    def make(self) -> Mesh:
        """Returns the mesh of the first devices, those of all hosts together.

        Raises:
          ValueError: There are too few, or a host would have none of them.
        """
        self.check_devices(jax.device_count(), jax.local_device_count())
        devices = np.asarray(jax.devices()[: self.num_devices])
        return Mesh(devices.reshape(self.guidance, self.sequence), AXES)

    def check_devices(self, available: int, of_a_host: int) -> None:
        """Raises ValueError unless there are enough devices, and each host has some.

        Args:
          available: Devices of all hosts.
          of_a_host: Those of one host.
        """
        count = self.num_devices
        if count > available:
            raise ValueError(
                f"mesh {self} has {count} devices, but there "
                f"{'is' if available == 1 else 'are'} {available}: take sizes whose "
                f"product is at most {available}"
            )
        if available > of_a_host and count != available:
            raise ValueError(
                f"mesh {self} has {count} devices, but those of all hosts are "
                f"{available}: take sizes whose product is {available}, or fewer hosts"
            )

    def check_heads(self, num_heads: int) -> None:
        """Raises ValueError unless `sequence` divides the heads of the model.

        Heads are not padded: the devices with the most heads would take as long as
        with a smaller size that divides them.
        """
        if num_heads % self.sequence:
            fitting = _fitting(num_heads, lambda size: num_heads % size == 0)
            raise ValueError(
                f"sequence={self.sequence} does not divide the {num_heads} heads of "
                f"the model; these do: {fitting}"
            )

    def check_tokens(self, num_tokens: int) -> None:
        """Raises ValueError if a device would have no token of the video."""

        def fits(size: int) -> bool:
            return -(-num_tokens // size) * (size - 1) < num_tokens

        if not fits(self.sequence):
            raise ValueError(
                f"sequence={self.sequence} leaves devices without any of the "
                f"{num_tokens} tokens; these fit: {_fitting(num_tokens, fits)}"
            )

    def check_rows(self, rows: int) -> None:
        """Raises ValueError unless `guidance` divides the rows of a call.

        Args:
          rows: Prompts and negative prompts that one call of the model takes.
        """
        if rows % self.guidance:
            fitting = _fitting(rows, lambda size: rows % size == 0)
            raise ValueError(
                f"guidance={self.guidance} does not divide the {rows} rows of a call: "
                "a prompt, and with guidance (of a strength other than 1, in one call) "
                f"its negative prompt; these sizes do: {fitting}"
            )


def on_one_device(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Returns an array that all devices have as one of a device of this host."""
    return x.addressable_data(0) if len(x.sharding.device_set) > 1 else x


def _fitting(most: int, fits: Callable[[int], bool]) -> str:
    """Returns the sizes of an axis that fit, the first ones if they are many."""
    sizes = [str(size) for size in range(1, min(most, 1024) + 1) if fits(size)]
    return ", ".join([*sizes[:16], *(["..."] if len(sizes) > 16 else [])])
