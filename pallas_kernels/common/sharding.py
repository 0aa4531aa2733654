"""Arrays sharded over devices: each device computes the batch items and heads it has.

An operation says what the axes of each array are, in a string: "q: B T N D". Those
called B (batch) and N (heads) may be sharded, as their parts do not influence each
other. All others are whole on each device. So nothing is communicated.

A mesh has axes of three types, and each is met where its sharding is known:

Explicit   The type of an array says how it is sharded. `over_explicit_axes` runs the
           operation in a `jax.shard_map` that is made from the arrays' types.
Automatic  Only the compiler knows. `partitioned` tells it what may be sharded and gives
           it the program of one device. Without, XLA gathers all arrays for a loop over
           heads, or for a kernel, which it cannot look into.
Manual     Inside a `jax.shard_map` arrays are those of one device, and their types say
           along which mesh axes devices differ. `vary_alike` makes this equal for all
           arrays of an operation.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import SdyShardingRule, custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.common.slow_paths import warn_once

MAPPED = "vmap"  # begins the names of axes that vmap adds: they may be sharded
_WORDS = {"B": "batch", "T": "tokens", "N": "heads", "D": "channels of a head"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axes:
    """What the axes of an operation's arrays are.

    Attributes:
      operation: Its name, for messages.
      operands: Name and axes of each array that it takes, such as "q: B T N D".
      results: Axes of each array that it returns, such as "B T N D".
    """

    operation: str
    operands: tuple[str, ...]
    results: tuple[str, ...]

    def mapped(self, is_mapped: Sequence[bool]) -> "Axes":
        """Returns the axes under vmap: operands that it maps have one more, first."""
        new = f"{MAPPED}{' '.join(self.results).count(MAPPED)}"
        pairs = zip(self.operands, is_mapped, strict=True)

        def add(axes: str) -> str:
            name, colon, own = axes.rpartition(":")
            return f"{name}{colon} {new} {own}"

        return dataclasses.replace(
            self,
            operands=tuple(add(axes) if mapped else axes for axes, mapped in pairs),
            results=tuple(map(add, self.results)),
        )


def lists_of_maps(count: int) -> str:
    """Returns the axes of lists that stand in `count` axes, such as batch and heads."""
    return "B N" if count == 2 else " ".join(f"{MAPPED}_{i}" for i in range(count))


def _axes(text: str) -> list[str]:
    """Returns the axes of an array: "q: B T N D" has four."""
    return text.rpartition(":")[2].split()


def _may_be_sharded(axis: str) -> bool:
    return axis in ("B", "N") or axis.startswith(MAPPED)


def _word(array: str, axis: str) -> str:
    return _WORDS.get(axis, f"axis {_axes(array).index(axis)}")


class _Split:
    """Along which mesh axes an operation is split, and arrays that do not fit."""

    def __init__(
        self, operands: Sequence[str], shapes: Sequence[tuple[int, ...]], mesh: Any
    ):
        self.mesh_axes: dict[str, tuple[str, ...]] = {}
        self.faults: list[str] = []
        self._operands, self._shapes, self._mesh = operands, shapes, mesh

    def add(self, specs: Sequence[P | None]) -> "_Split":
        """Adds the specs of the operands; the first that is sharded decides."""
        for operand, shape, spec in zip(
            self._operands, self._shapes, specs, strict=True
        ):
            if spec is None:
                name = operand.partition(":")[0]
                self.faults.append(f"{name} is sharded along parts of axes")
                continue
            for axis, size, names in zip(_axes(operand), shape, spec, strict=False):
                names = (names,) if isinstance(names, str) else tuple(names or ())
                if math.prod(self._mesh.shape[name] for name in names) > 1:
                    self._add(operand, axis, size, names)
        return self

    def _add(self, operand: str, axis: str, size: int, names: tuple[str, ...]) -> None:
        known = self.mesh_axes.get(axis)
        if known == names:
            return
        count = math.prod(self._mesh.shape[name] for name in names)
        taken = {name for names in self.mesh_axes.values() for name in names}
        if not _may_be_sharded(axis):
            cause = "which are needed whole"
        elif size % count:
            cause = f"of which there are {size}, no multiple of {count}"
        elif known is not None or taken.intersection(names):
            cause = "unlike the arrays before it"
        else:
            self.mesh_axes[axis] = names
            return
        self.faults.append(
            f"{operand.partition(':')[0]} is sharded over "
            f"{', '.join(map(repr, names))} along its {_word(operand, axis)}, {cause}"
        )

    def spec(self, axes: str) -> P:
        """Returns the spec of an array of which only batch and heads are split."""
        return P(*(self.mesh_axes.get(axis) for axis in _axes(axes)))


# ----------------------------------------------------------------- automatic mesh axes


def partitioned(run: Callable[..., Any], axes: Axes) -> Callable[..., Any]:
    """Makes a function of which XLA's partitioner gives each device its own part.

    Arrays that are sharded otherwise than along batch and heads, or unevenly, are
    gathered, and devices compute the same. That warns once, when it is compiled.

    Args:
      run: Takes arrays, which are `axes.operands`, and returns a tuple or list of
        arrays, `axes.results`. It closes over no traced value.
      axes: What the arrays are.

    Returns:
      The same function. It has no derivative, and no rule for vmap.
    """
    if jax.config.jax_disable_jit:
        return run
    # jit keeps the constants of its program, which are not accepted here.
    call = custom_partitioning(jax.jit(run))

    def partition(mesh, operands, results):
        shapes, tree = [x.shape for x in operands], jax.tree.structure(results)
        shardings = [x.sharding for x in operands]
        if mesh.empty:  # within a shard_map over other mesh axes
            _check_unnamed(axes, shapes, shardings)
            of_results = jax.tree.map(lambda x: x.sharding, results)
            return mesh, run, of_results, tuple(shardings)
        specs = [_spec_of(x.sharding, len(x.shape), mesh) for x in operands]
        split = _Split(axes.operands, shapes, mesh).add(specs)
        for fault in split.faults[:1]:  # the others have the same cause
            warn_once(
                f"{axes.operation}: {fault}. It is gathered, and devices compute the "
                "same. Shard batch and heads alone, such as by jax.lax."
                "with_sharding_constraint(q, P('x', None, 'y', None))"
            )

        def shard(names: str) -> NamedSharding:
            return NamedSharding(mesh, split.spec(names))

        of_results = jax.tree.unflatten(tree, map(shard, axes.results))
        return mesh, run, of_results, tuple(map(shard, axes.operands))

    call.def_partition(partition, sharding_rule=_rule(axes), decode_shardings=False)
    return call


def _rule(axes: Axes) -> SdyShardingRule:
    """Returns the rule by which a sharding spreads from one array to others.

    Batch and heads are the same factors in all arrays. Any other axis is a factor of
    its own: it spreads nowhere, and must not be sharded in results.
    """
    mappings: list[Any] = [
        tuple(
            tuple(
                axis if _may_be_sharded(axis) else f"{kind}{i}axis{j}"
                for j, axis in enumerate(_axes(array))
            )
            for i, array in enumerate(arrays)
        )
        for kind, arrays in (("operand", axes.operands), ("result", axes.results))
    ]
    operands, results = mappings
    whole = (name for names in results for name in names if name.startswith("result"))
    return SdyShardingRule(
        operand_mappings=operands,
        result_mappings=results,
        need_replication_factors=tuple(whole),
    )


def _spec_of(sharding: Any, ndim: int, mesh: Any) -> P | None:
    """Returns the spec of a sharding that the compiler chose.

    It may be none of whole mesh axes: a sharding of eight parts over four heads of two
    channels. Then it is None.
    """
    names = [name for name, size in mesh.shape.items() if size > 1]
    for places in itertools.product(range(-1, ndim), repeat=len(names)):
        own: list[Any] = [None] * ndim
        for place in {*places} - {-1}:
            pairs = zip(names, places, strict=True)
            own[place] = tuple(name for name, there in pairs if there == place)
        if NamedSharding(mesh, P(*own)).is_equivalent_to(sharding, ndim):
            return P(*own)
    return None


def _check_unnamed(
    axes: Axes, shapes: Sequence[tuple[int, ...]], shardings: Sequence[Any]
) -> None:
    """Raises unless batch and heads alone are sharded, by shardings without names."""
    counts: dict[str, int] = {}
    for array, shape, sharding in zip(axes.operands, shapes, shardings, strict=True):
        local = sharding.shard_shape(shape)
        for axis, size, part in zip(_axes(array), shape, local, strict=True):
            count = -(-size // part)
            is_alike = counts.setdefault(axis, count) == count
            if count > 1 and not (is_alike and _may_be_sharded(axis)):
                raise ValueError(
                    f"{axes.operation}: {array.partition(':')[0]} is sharded along its "
                    f"{_word(array, axis)}, within jax.shard_map over other axes. Only "
                    "batch and heads may be, alike in all arrays: name all mesh axes "
                    "in jax.shard_map, and give each device whole sequences"
                )


# ------------------------------------------------------------------ explicit mesh axes


def over_explicit_axes(
    function: Callable[..., Any], *, operation: str, operands: Any, results: Any
) -> Callable[..., Any]:
    """Makes a function that runs where its arrays are, if their types say where.

    Args:
      function: Takes and returns trees of arrays, and treats each batch item and head
        apart. It communicates nothing.
      operation: Its name, for messages.
      operands: Name and axes of each array of the arguments, such as "q: B T N D": a
        tree of them, or one for all arrays of a part of the tree.
      results: Axes of each array of the results, likewise.

    Returns:
      The same function. Where no mesh axis is explicit it is called as it is.
    """

    @functools.wraps(function)
    def run(*arguments):
        leaves, tree = jax.tree.flatten(arguments)
        types = [jax.typeof(x) for x in leaves]
        mesh = next((x.sharding.mesh for x in types if _is_explicit(x)), None)
        if mesh is None:
            return function(*arguments)
        names = jax.tree.leaves(jax.tree.broadcast(tuple(operands), arguments))
        split = _split_of_types(operation, names, types, mesh)
        specs = [split.spec(name) for name in names]
        # No names are all names but those of axes along which vmap maps.
        has_others = mesh.auto_axes or mesh.manual_axes
        mapped = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=tuple(jax.tree.unflatten(tree, specs)),
            out_specs=jax.tree.map(split.spec, results),
            axis_names={*mesh.explicit_axes} if has_others else set(),
        )
        # An array that is whole on each device is cut where it lies.
        moved = (
            jax.sharding.reshard(x, NamedSharding(mesh, spec))
            for x, spec in zip(leaves, specs, strict=True)
        )
        return mapped(*jax.tree.unflatten(tree, moved))

    return run


def _split_of_types(
    operation: str, operands: Sequence[str], types: Sequence[Any], mesh: Any
) -> _Split:
    """Returns how arrays are split by their types; raises if one does not fit."""
    split = _Split(operands, [x.shape for x in types], mesh)
    if faults := split.add([x.sharding.spec for x in types]).faults:
        raise ValueError(
            f"{operation}: {faults[0]}. Only batch and heads may be sharded, alike "
            "in all arrays: call jax.sharding.reshard before, such as with "
            "P('x', None, 'y', None) for [batch, tokens, heads, head_dim]"
        )
    return split


def _is_explicit(type_of_array: Any) -> bool:
    """Returns whether the type of an array says that it is sharded."""
    return any(type_of_array.sharding.spec) and bool(
        type_of_array.sharding.mesh.explicit_axes
    )


# -------------------------------------------------------------------- manual mesh axes


def vary_alike(arrays: Sequence[Any]) -> list[Any]:
    """Returns arrays of one `jax.shard_map` as ones that differ along the same axes."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = frozenset().union(*varying)
    return [
        jax.lax.pcast(x, tuple(sorted(union - own)), to="varying") if union - own else x
        for x, own in zip(arrays, varying, strict=True)
    ]


def alike(tree: Any, names: Any, *, operation: str) -> Any:
    """Returns arrays as ones that are sharded alike, and that vary alike.

    The branches of a conditional must return arrays of the same type.

    Args:
      tree: Arrays, of which the first that is explicitly sharded decides.
      names: Name and axes of each, as in `over_explicit_axes`.
      operation: Its name, for messages.

    Raises:
      ValueError: An explicit sharding is not of batch and heads, alike in all arrays.
    """
    leaves, structure = jax.tree.flatten(tree)
    operands = jax.tree.leaves(jax.tree.broadcast(names, tree))
    types = [jax.typeof(x) for x in leaves]
    mesh = next((x.sharding.mesh for x in types if _is_explicit(x)), None)
    if mesh is not None:
        split = _split_of_types(operation, operands, types, mesh)
        leaves = [
            jax.sharding.reshard(x, NamedSharding(mesh, split.spec(name)))
            for x, name in zip(leaves, operands, strict=True)
        ]
    return jax.tree.unflatten(structure, vary_alike(leaves))


def forget_varying(x: Any) -> Any:
    """Returns an array's type without the mesh axes along which devices differ.

    Programs that communicate nothing are traced for it: then their loops may start from
    constants, and kernels need not say how their results vary.
    """
    if not jax.typeof(x).manual_axis_type.varying:
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type)


def varying_like(result: Any, arguments: Sequence[Any]) -> Any:
    """Returns the type of a result that varies along the mesh axes of any argument.

    A program that was traced for `forget_varying` types knows no mesh.
    """
    varying = [x.manual_axis_type.varying for x in arguments]
    union = frozenset().union(*varying)
    if not union:
        return result
    argument = next(x for x, own in zip(arguments, varying, strict=True) if own)
    sharding = result.sharding
    if sharding.mesh.empty:
        whole = P(*(None for _ in result.shape))
        sharding = NamedSharding(argument.sharding.mesh, whole)
    kind = argument.manual_axis_type.update(varying=union)
    return result.update(sharding=sharding, manual_axis_type=kind)
