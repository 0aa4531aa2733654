"""Training steps whose videos are shared among the devices of one host."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

AXIS = "videos"
SAME, SHARED = P(), P(AXIS)  # on all devices; of its videos on each


@dataclasses.dataclass(frozen=True)
class DataParallel:
    """Devices that have a part of the videos of each step and all parameters.

    Args:
      devices: One or more of this process.
    """

    devices: tuple[jax.Device, ...]

    @classmethod
    def of(cls, count: int = 1) -> "DataParallel":
        """Takes the first devices of the process.

        Raises:
          ValueError: There are not as many.
        """
        devices = jax.local_devices()
        if not 1 <= count <= len(devices):
            raise ValueError(
                f"devices={count} must be 1 to {len(devices)}, the number of devices "
                "of this process"
            )
        return cls(tuple(devices[:count]))

    @property
    def count(self) -> int:
        """Number of devices."""
        return len(self.devices)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices in a row."""
        return Mesh(np.array(self.devices), (AXIS,))

    def place(self, tree: Any) -> Any:
        """Puts arrays on all devices."""
        return jax.device_put(tree, self._sharding(SAME))

    def jit(
        self,
        function: Callable[..., Any],
        inputs: Sequence[P],
        outputs: P | tuple[P, ...],
        **options: Any,
    ) -> Any:
        """Compiles what each device does with its videos.

        Args:
          function: Sees the videos of one device; may call `mean_gradients` and
            `own_key`.
          inputs: `SAME` or `SHARED` for each argument.
          outputs: Likewise for each result. Those that are the same must be made so
            by `mean_gradients`.
          **options: Of `jax.jit`.
        """
        mapped = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=tuple(inputs),
            out_specs=outputs,
            # Only of results that are the same is there something to check; and the
            # checks do not pass `switch` of the renderer (jax 0.12.0.1).
            check_vma=outputs != SHARED,
        )
        return jax.jit(
            mapped,
            in_shardings=tuple(map(self._sharding, inputs)),
            out_shardings=jax.tree.map(
                self._sharding, outputs, is_leaf=lambda leaf: isinstance(leaf, P)
            ),
            **options,
        )

    def _sharding(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)


def own_key(key: PRNGKeyArray) -> PRNGKeyArray:
    """Returns a key that differs among devices; within `DataParallel.jit`."""
    return jax.random.fold_in(key, jax.lax.axis_index(AXIS))


def mean_gradients(
    loss_of: Callable[[Any], Float[Array, ""]], parameters: Any
) -> tuple[Float[Array, ""], Any]:
    """Returns a loss and its gradients, their means over the videos of all devices.

    Within `DataParallel.jit`. Gradients are sent once, when all of them are there.

    Args:
      loss_of: Mean over the videos of this device.
      parameters: The same on all devices.
    """
    # Without the cast each use of a parameter would send a gradient of its own.
    own = jax.lax.pcast(parameters, AXIS, to="varying")
    return jax.lax.pmean(jax.value_and_grad(loss_of)(own), AXIS)
