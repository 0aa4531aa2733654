"""Weights spread over the devices of a mesh, and gathered where they are used.

Of each matrix every device has some of the rows, or of its other axis where their
number does not divide. Vectors are whole on each device. Layers of a stack are gathered
one by one, each while the one before is computed; what lies around them, at once.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from pallas_kernels.common import register_configuration

Path = tuple[str, ...]


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightShards:
    """Which axis of each parameter is spread over the devices.

    Attributes:
      mesh_axes: Names of the mesh axes that they are spread over, all together.
      axes: Path and axis of each parameter that is.
    """

    mesh_axes: tuple[str, ...]
    axes: tuple[tuple[Path, int], ...]

    @classmethod
    def of(
        cls,
        shapes: Mapping[Path, tuple[int, ...]],
        *,
        stacks: Collection[str],
        mesh_axes: tuple[str, ...],
        count: int,
    ) -> "WeightShards":
        """Chooses the axes.

        Args:
          shapes: Shape of each parameter by its path.
          stacks: Attributes of the model whose parameters have a leading layer axis.
          mesh_axes: Names of the mesh axes.
          count: Devices along them.
        """
        found = {
            path: axis
            for path, shape in shapes.items()
            if (axis := _axis(shape, int(path[0] in stacks), count)) is not None
        }
        return cls(mesh_axes=mesh_axes, axes=tuple(found.items()))

    def spec(self, path: Path) -> P:
        """Returns how a parameter is sharded."""
        axis = dict(self.axes).get(path)
        return P() if axis is None else P(*(None,) * axis, self.mesh_axes)

    def gather_rest(self, state: Any, stacks: Collection[str]) -> Any:
        """Returns a model's state, of which all but the stacks is whole."""
        return self._gather(state, (), 0, leave=stacks)

    def gather_layer(self, stack: str, layer: Any) -> Any:
        """Returns the whole parameters of one layer of a stack."""
        return self._gather(layer, (stack,), 1)

    def _gather(
        self,
        state: Any,
        prefix: Path,
        taken: int,
        leave: Collection[str] = (),
    ) -> Any:
        """Gathers parameters, of whose axes the first `taken` are gone."""
        axes = dict(self.axes)
        flat: list[tuple[Any, Any]] = []
        for path, leaf in nnx.to_flat_state(state):
            axis = axes.get((*prefix, *map(str, path)))
            if axis is not None and path[0] not in leave:
                whole = _all_gather(leaf[...], self.mesh_axes, axis - taken)
                leaf = leaf.replace(whole)
            flat.append((path, leaf))
        return nnx.from_flat_state(flat)


def gather_of(weights: WeightShards | None, stack: str) -> Callable[[Any], Any] | None:
    """Returns what makes a layer of a stack whole; None where all devices have it."""
    return None if weights is None else functools.partial(weights.gather_layer, stack)


def state_paths(state: Any) -> dict[Path, Any]:
    """Returns the variables of a model by their paths, in words."""
    return {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def _axis(shape: tuple[int, ...], taken: int, count: int) -> int | None:
    """Returns the axis of a matrix that the devices divide; None to leave it whole."""
    if len(shape) - taken < 2:
        return None
    fitting = (i for i, size in enumerate(shape) if i >= taken and size % count == 0)
    return next(fitting, None)


def _all_gather(x: jax.Array, mesh_axes: tuple[str, ...], axis: int) -> jax.Array:
    if x.dtype.itemsize > 1:
        return jax.lax.all_gather(x, mesh_axes, axis=axis, tiled=True)
    # Libraries know no numbers of 8 bits but integers.
    integers = jax.lax.bitcast_convert_type(x, jnp.uint8)
    whole = jax.lax.all_gather(integers, mesh_axes, axis=axis, tiled=True)
    return jax.lax.bitcast_convert_type(whole, x.dtype)
