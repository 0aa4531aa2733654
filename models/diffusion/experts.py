"""Two transformers that share a run: one for high noise, one for low.

Both have one configuration, so they share every compiled program. Either both are on
the device, or the weights of one, and those of the other wait in the host's memory.
"""

import abc
import collections
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from models.diffusion.interfaces import VideoModel

_LOG = logging.getLogger(__name__)

ExpertName = Literal["high", "low"]  # in noise

PIECE_BYTES = 256 << 20  # of weights that are copied to the device at once
STAGED_BYTES = 2 << 30  # that wait on the device before the switch
IN_FLIGHT = 4  # pieces that are copied before the first must have arrived


def expert_names(
    timesteps: Float[np.ndarray, " steps"], boundary: float
) -> list[ExpertName]:
    """Returns which expert each step belongs to; at the boundary it is high noise."""
    return ["high" if timestep >= boundary else "low" for timestep in timesteps]


def first_steps(names: Sequence[ExpertName]) -> tuple[int, ...]:
    """Returns the first step of each expert in a run, rising from 0."""
    changes = (i for i in range(1, len(names)) if names[i] != names[i - 1])
    return (0, *changes)


class Experts(abc.ABC):
    """The transformers of a run.

    Args:
      boundary: Steps whose timestep (0 to 1000) is at or above it are those of the
        expert for high noise.

    Raises:
      ValueError: The boundary is not between 0 and 1000.
    """

    def __init__(self, boundary: float) -> None:
        if not 0.0 < boundary < 1000.0:
            raise ValueError(f"{boundary=} must be a timestep between 0 and 1000")
        self.boundary = boundary

    @property
    @abc.abstractmethod
    def model(self) -> VideoModel:
        """One of the transformers, for what they have in common."""

    @abc.abstractmethod
    def take(self, name: ExpertName) -> VideoModel:
        """Returns a transformer with its weights on the device."""

    @abc.abstractmethod
    def prepare(self, name: ExpertName) -> None:
        """Starts to fetch what `take` will need, while the device works."""

    @abc.abstractmethod
    def on_devices(self, share: Callable[[VideoModel], VideoModel]) -> "Experts":
        """Returns experts whose work several devices share.

        Args:
          share: Puts a transformer on the devices; returns one that is there.

        Raises:
          ValueError: They cannot be shared.
        """


class ResidentExperts(Experts):
    """Experts that are on the device together.

    Args:
      high: The transformer for high noise.
      low: The transformer for low noise.
      boundary: See `Experts`.

    Raises:
      ValueError: The transformers differ in their configuration.
    """

    def __init__(self, high: VideoModel, low: VideoModel, *, boundary: float) -> None:
        super().__init__(boundary)
        if high.config != low.config:
            raise ValueError(
                f"the experts differ: {high.config} and {low.config}; expected "
                "transformers of one configuration"
            )
        self._experts: dict[ExpertName, VideoModel] = {"high": high, "low": low}

    @property
    def model(self) -> VideoModel:
        """The transformer for high noise."""
        return self._experts["high"]

    def take(self, name: ExpertName) -> VideoModel:
        """Returns a transformer."""
        return self._experts[name]

    def prepare(self, name: ExpertName) -> None:
        """Does nothing: both are there."""

    def on_devices(self, share: Callable[[VideoModel], VideoModel]) -> "Experts":
        """Returns both experts on the devices."""
        high, low = (share(self._experts[name]) for name in ("high", "low"))
        return ResidentExperts(high, low, boundary=self.boundary)


class StreamedExperts(Experts):
    """Experts of which one is on the device: weights take each other's places.

    At the switch each array is overwritten piece by piece, so that no second copy of
    the weights is on the device. The first pieces are sent while the step before runs.

    Args:
      model: A transformer on the device, whose weights are copied to the host and then
        replaced.
      other: Weights of the other expert, a tree as `nnx.state` of the model is. Copies
        of both are kept in memory of the host that the device reads directly, where it
        has such; the tree is not kept.
      resident: Whose weights the model has.
      boundary: See `Experts`.

    Raises:
      ValueError: Weights do not have the shapes and dtypes of the model's.
    """

    def __init__(
        self, model: Any, other: Any, *, resident: ExpertName, boundary: float
    ) -> None:
        super().__init__(boundary)
        self._model = model
        self._resident = resident
        own, others = (jax.tree.leaves(tree) for tree in (nnx.state(model), other))
        _check_like(others, own)
        waiting: ExpertName = "low" if resident == "high" else "high"
        self._pieces = {
            # Copies, for other weights are written over the model's.
            resident: [_cut(leaf, copy=True) for leaf in own],
            waiting: [_cut(leaf) for leaf in others],
        }
        self._staged: dict[tuple[int, int], Array] = {}

    @property
    def model(self) -> VideoModel:
        """The transformer, with the weights that it has just now."""
        return self._model

    def take(self, name: ExpertName) -> VideoModel:
        """Returns the transformer with an expert's weights."""
        if name == self._resident:
            return self._model
        _LOG.info("fetching the transformer for %s noise", name)
        leaves, structure = jax.tree.flatten(nnx.state(self._model))
        in_flight: collections.deque[Array] = collections.deque()
        for place, pieces in enumerate(self._pieces[name]):
            for number, piece in enumerate(pieces):
                staged = self._staged.pop((place, number), None)
                array = _send(piece, leaves[place]) if staged is None else staged
                leaves[place] = _put(leaves[place], array, piece.start)
                in_flight.append(array)
                if len(in_flight) > IN_FLIGHT:
                    in_flight.popleft().block_until_ready()
        nnx.update(self._model, jax.tree.unflatten(structure, leaves))
        self._resident = name
        return self._model

    def prepare(self, name: ExpertName) -> None:
        """Sends the first pieces, without waiting for them."""
        if name == self._resident or self._staged:
            return
        leaves, left = jax.tree.leaves(nnx.state(self._model)), STAGED_BYTES
        for place, number, piece in self._in_order(name):
            left -= piece.array.nbytes
            if left < 0:
                return
            self._staged[place, number] = _send(piece, leaves[place])

    def on_devices(self, share: Callable[[VideoModel], VideoModel]) -> "Experts":
        """Refuses: pieces of weights are sent to one device.

        Raises:
          ValueError: Always.
        """
        raise ValueError(
            "experts=StreamedExperts keeps weights in the host's memory and runs on "
            "one device: give ResidentExperts with a mesh (shard_weights=True gives "
            "each device a part of both), or no mesh"
        )

    def _in_order(self, name: ExpertName) -> "Iterator[tuple[int, int, _Piece]]":
        for place, pieces in enumerate(self._pieces[name]):
            for number, piece in enumerate(pieces):
                yield place, number, piece


class _Piece(NamedTuple):
    """Entries of an array's first axis, in the host's memory."""

    start: int
    array: Shaped[Array | np.ndarray, "..."]


def _check_like(leaves: list[Any], arrays: list[Array]) -> None:
    expected = [(array.shape, array.dtype) for array in arrays]
    given = [(leaf.shape, leaf.dtype) for leaf in leaves]
    if given != expected:
        raise ValueError(
            "the other expert's weights do not have the model's shapes and dtypes"
        )


def _cut(
    leaf: Shaped[Array | np.ndarray, "..."], *, copy: bool = False
) -> list[_Piece]:
    """Cuts an array along its first axis, and copies it to pinned memory if it can.

    Args:
      leaf: The array. One of a GPU is copied from there, a piece at a time: as a NumPy
        array JAX would keep all of it on the host a second time.
      copy: Whether the pieces must not share memory with it.
    """
    if not isinstance(leaf, jax.Array) or _is_on_cpu(leaf):
        leaf = np.array(leaf) if copy else np.asarray(leaf)
    count = max(1, -(-leaf.nbytes // PIECE_BYTES)) if leaf.ndim else 1
    count = min(count, len(leaf)) if leaf.ndim else 1
    if count == 1:
        return [_Piece(0, _pin(leaf))]
    step = -(-len(leaf) // count)
    return [
        _Piece(start, _pin(leaf[start : start + step]))
        for start in range(0, len(leaf), step)
    ]


def _is_on_cpu(array: Array) -> bool:
    return all(device.platform == "cpu" for device in array.devices())


def _pin(
    array: Shaped[Array | np.ndarray, "..."],
) -> Shaped[Array | np.ndarray, "..."]:
    """Returns a copy that the device can read by itself; on a CPU the array itself."""
    device = jax.devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if device.platform == "cpu" or "pinned_host" not in kinds:
        return array
    host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    return jax.block_until_ready(jax.device_put(array, host))


def _send(piece: _Piece, target: Array) -> Array:
    """Starts to copy a piece to where an array is."""
    return jax.device_put(piece.array, target.sharding)


def _put(target: Array, piece: Array, start: int) -> Array:
    """Returns the array with a piece in its place; the array's memory is reused."""
    if piece.shape == target.shape:
        return piece
    return _overwrite(target, piece, start)


@functools.partial(jax.jit, donate_argnums=0)
def _overwrite(target: Array, piece: Array, start: Int[Array, ""] | int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(target, piece, start, axis=0)
