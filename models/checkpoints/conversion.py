"""Moves weights between published checkpoints and our modules, by a table of rules."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.checkpoints.float8_weights import read_scaled_rows
from models.checkpoints.listing import list_names, list_problems
from models.checkpoints.rules import Layout, Lookup, Rule, keep, transpose
from models.float8.rows import FLOAT8, ScaledRows, widen_rows


class ConversionError(ValueError):
    """A checkpoint and a model do not fit; the message lists the first offenders.

    Attributes:
      problems: All of them, sorted, in a line each.
    """

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(sorted(problems))


@runtime_checkable
class HasFiles(Protocol):
    """Arrays by key that know where they lie, so that errors can name the file."""

    def file_of(self, key: str) -> Path | None:
        """Returns the file that holds a key; None if no file does."""


@dataclasses.dataclass(frozen=True)
class _Slot:
    """The destination of an array: a parameter, or one layer's slice of it."""

    name: str  # path of the parameter in the module
    layer: int | None
    shape: tuple[int, ...]
    scale: str | None = None  # path of the scales of a weight in FP8

    def stored_shape(self, layout: Layout) -> tuple[int, ...]:
        """Returns the shape that a checkpoint has of it."""
        # `save` only moves axes, so an array of strides 0 stands in for the parameter.
        return layout.save(np.broadcast_to(np.float32(0), self.shape)).shape


# Key and rule of each array of a checkpoint, by the paths that it fills.
type _Assignment = Mapping[tuple[str, ...], tuple[str, Rule]]
# Where parameters of some shapes are to lie, by their paths.
type ChooseShardings = Callable[
    [dict[tuple[str, ...], tuple[int, ...]]],
    Mapping[tuple[str, ...], jax.sharding.Sharding],
]


def best_layout[Name: str](
    keys: Iterable[str], tables: Mapping[Name, Sequence[Rule]]
) -> Name:
    """Returns the layout whose table knows most of a checkpoint's keys.

    Args:
      keys: The checkpoint's keys.
      tables: Rules of each layout, two or more.

    Raises:
      ConversionError: No key is known, or two tables know equally many.
    """
    keys = list(keys)
    lookups = {name: Lookup(rules) for name, rules in tables.items()}
    known = {
        name: sum(bool(lookup.of_key(key)) for key in keys)
        for name, lookup in lookups.items()
    }
    second, first = sorted(known.values())[-2:]
    if first == second:
        raise ConversionError(
            f"cannot tell the layout of {len(keys)} keys, {list_names(sorted(keys))}: "
            f"keys known to each table: {known}"
        )
    return max(known, key=lambda name: known[name])


def load_parameters[M: nnx.Module](
    make_model: Callable[[], M],
    source: Mapping[str, Any],
    rules: Sequence[Rule],
    *,
    stacked: Iterable[str] = (),
    float32: Iterable[str] = (),
    shardings: ChooseShardings | None = None,
) -> M:
    """Builds a model with the weights of a checkpoint.

    The model is built abstractly, so random parameters are never made. Everything is
    checked by shapes and dtypes alone. Then arrays are read one at a time, in the order
    of `source`. Each goes to its place on the device before the next is read. The host
    never holds a whole model or stack: with a reader that maps its files, it holds one
    array.

    Arrays go to JAX's default device; `jax.default_device` names another. With
    `shardings` each goes to several; no device holds more than its part of the model,
    and one array.

    A weight in FP8 (`weight` with a `weight_scale` beside it, rows being output
    channels) is filled by the key of a `kernel`; see `read_scaled_rows`.

    Args:
      make_model: Makes the model; run under `nnx.eval_shape`.
      source: Values by checkpoint key, each with `shape` and `dtype` that cost no
        reading; `jnp.asarray` reads it.
      rules: The table. Each key must match exactly one rule, and each parameter
        must be filled exactly once.
      stacked: Attributes whose parameters are stacked over layers; dots lead to
        attributes of attributes.
      float32: Attributes, at any depth, whose parameters are stored in float32
        whatever dtype the model gives them.
      shardings: Says where parameters lie, by their shapes; None for one device.

    Returns:
      The model. Floating-point weights are cast to the parameters' dtypes.

    Raises:
      ConversionError: Keys match no rule or several, or lead to no parameter;
        parameters are filled twice or never; shapes are wrong, or dtypes not
        floating-point. Names each key's file if `source` is one of `HasFiles`.
    """
    structure, state = nnx.split(nnx.eval_shape(make_model))
    flat = dict(nnx.to_flat_state(state))
    slots = _slots(flat, stacked)
    filled = _checked_assignment(source, rules, slots)
    wide = set(float32)
    names = {path: tuple(map(str, path)) for path in flat}
    places: Mapping[tuple[str, ...], Any] = {}
    if shardings is not None:
        places = shardings({names[path]: leaf.shape for path, leaf in flat.items()})
    shapes = {
        _name(path): jax.ShapeDtypeStruct(
            leaf.shape,
            jnp.float32 if wide.intersection(path) else leaf.dtype,
            sharding=places.get(names[path]),
        )
        for path, leaf in flat.items()
    }
    arrays = _read_arrays(source, filled, slots, shapes)
    for keys, leaf in flat.items():
        flat[keys] = leaf.replace(arrays[_name(keys)])
    return nnx.merge(structure, nnx.from_flat_state(flat))


def check_parameters(
    make_model: Callable[[], nnx.Module],
    source: Mapping[str, Any],
    rules: Sequence[Rule],
    *,
    stacked: Iterable[str] = (),
) -> None:
    """Raises what `load_parameters` would, without reading arrays."""
    state = nnx.state(nnx.eval_shape(make_model))
    _checked_assignment(source, rules, _slots(dict(nnx.to_flat_state(state)), stacked))


def _read_arrays(
    source: Mapping[str, Any],
    filled: _Assignment,
    slots: Mapping[str, _Slot],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """Reads the parameters by name; one array at a time is on the host."""
    arrays: dict[str, jax.Array] = {}
    for paths, (key, rule) in filled.items():
        # A call of its own, or its arrays would be held while the next are read.
        _fill(arrays, source[key], rule.layout, [slots[path] for path in paths], shapes)
    return arrays


def _fill(
    arrays: dict[str, jax.Array],
    stored: Any,
    layout: Layout,
    parts: Sequence[_Slot],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    """Reads an array of a checkpoint and puts each part of it where it belongs."""
    if parts[0].scale is None:
        values = [(jnp.asarray(stored), layout)]
    else:
        assert layout == transpose, "weights in FP8 are those of linear layers"
        values = [(array, keep) for array in read_scaled_rows(stored)]
    start, rows = 0, None
    for slot in parts:
        if len(parts) > 1:
            stop = start + slot.stored_shape(layout)[0]
            rows, start = (start, stop), stop
        names = (slot.name,) if slot.scale is None else (slot.name, slot.scale)
        for name, (value, change) in zip(names, values, strict=True):
            target = shapes[name]
            if slot.layer is None:
                array = _convert(value, change, target.dtype, rows, target.sharding)
            else:
                stack = arrays.pop(name, None)
                if stack is None:
                    stack = jnp.zeros(
                        target.shape, target.dtype, device=target.sharding
                    )
                array = _insert(stack, value, slot.layer, change, rows, target.sharding)
                del stack
            # Without waiting, the arrays of many transfers would be held at once.
            arrays[name] = jax.block_until_ready(array)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _convert(
    value: jax.Array,
    layout: Layout,
    dtype: Any,
    rows: tuple[int, int] | None,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    # On CPU the argument may be the mapped file itself, hence the copy.
    return _at(jnp.copy(layout.load(_part(value, rows)).astype(dtype)), sharding)


@functools.partial(jax.jit, static_argnums=(3, 4, 5), donate_argnums=0)
def _insert(
    stack: jax.Array,
    value: jax.Array,
    layer: Any,
    layout: Layout,
    rows: tuple[int, int] | None,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    """Overwrites one layer of a stack, in the stack's own memory."""
    loaded = layout.load(_part(value, rows))
    return _at(stack.at[layer].set(loaded.astype(stack.dtype)), sharding)


def _at(x: jax.Array, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Says where a result lies; None leaves it to the arguments."""
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def _part(value: jax.Array, rows: tuple[int, int] | None) -> jax.Array:
    return value if rows is None else value[slice(*rows)]


def save_parameters(
    model: nnx.Module,
    rules: Sequence[Rule],
    *,
    stacked: Iterable[str] = (),
    dtype: Any = None,
) -> dict[str, np.ndarray]:
    """Writes a model's parameters as a checkpoint's keys and layouts.

    Args:
      model: The model.
      rules: The table that `load_parameters` reads the same keys by.
      stacked: Attributes whose parameters are stacked over layers.
      dtype: Cast to this; None keeps the parameters' dtypes. Weights in FP8 are
        multiplied by their scales, in float32, first.

    Returns:
      Arrays by checkpoint key, in the order of the keys.

    Raises:
      ConversionError: A parameter is named by no rule or by several.
    """
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    values = {_name(path): leaf for path, leaf in flat.items()}
    problems: list[str] = []
    parts: dict[str, dict[str, np.ndarray]] = {}  # by key and path
    order: dict[str, tuple[str, ...]] = {}  # paths of each key
    host: dict[str, np.ndarray] = {}
    lookup = Lookup(rules)
    for path, slot in _slots(flat, stacked).items():
        matches = lookup.of_path(path)
        if len(matches) != 1:
            keys = [key for key, _ in matches]
            problems.append(f"parameter {path} is named by {len(matches)} keys: {keys}")
            continue
        ((key, rule),) = matches
        value = _parameter(slot.name, slot, values, host)
        if slot.scale is not None:
            scale = _parameter(slot.scale, slot, values, host)
            rows = ScaledRows(jnp.asarray(value), jnp.asarray(scale))
            value = np.asarray(widen_rows(rows)).T
        parts.setdefault(key, {})[path] = np.ascontiguousarray(
            rule.layout.save(value), dtype=dtype or value.dtype
        )
        order[key] = rule.paths_of(key)
    if problems:
        raise _conversion_error(problems, len(values))
    return {key: _join(parts[key], order[key]) for key in sorted(parts)}


def _parameter(
    name: str,
    slot: _Slot,
    values: Mapping[str, nnx.Variable],
    host: dict[str, np.ndarray],
) -> np.ndarray:
    """Returns a parameter, or the slot's layer of it; `host` keeps whole ones."""
    if name not in host:
        host[name] = np.asarray(jax.device_get(values[name][...]))
    return host[name] if slot.layer is None else host[name][slot.layer]


def _join(parts: Mapping[str, np.ndarray], paths: Sequence[str]) -> np.ndarray:
    """Returns the array of a key, whose parts follow each other."""
    if len(paths) == 1:
        return parts[paths[0]]
    return np.concatenate([parts[path] for path in paths])


def _name(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


def _slots(
    flat: Mapping[tuple, nnx.Variable], stacked: Iterable[str]
) -> dict[str, _Slot]:
    """Returns every path to be filled; stacked parameters have one for each layer."""
    stacked = tuple(stacked)
    slots = {}
    for path, leaf in flat.items():
        name, shape, scale = _name(path), leaf.shape, None
        known_as = name
        if leaf.dtype == FLOAT8:
            # To rules it is the kernel, [in, out], that other models have in its place.
            known_as = _name((*path[:-1], "kernel"))
            shape = (*shape[:-2], shape[-1], shape[-2])
            scale = f"{name}_scale"
        elif path[-1] == "weight_scale":
            continue  # filled with its weight
        stack = next((s for s in stacked if name.startswith(f"{s}.")), None)
        if stack is None:
            slots[known_as] = _Slot(name, None, shape, scale)
            continue
        rest = known_as.removeprefix(f"{stack}.")
        for layer in range(shape[0]):
            slots[f"{stack}.{layer}.{rest}"] = _Slot(name, layer, shape[1:], scale)
    return slots


def _checked_assignment(
    source: Mapping[str, Any], rules: Sequence[Rule], slots: Mapping[str, _Slot]
) -> _Assignment:
    """Returns key and rule of paths; raises for everything that does not fit."""
    lookup = Lookup(rules)
    filled, problems = _assign(source, lookup, slots)
    missing: dict[str, list[str]] = {}
    for path in slots.keys() - {path for paths in filled for path in paths}:
        missing.setdefault(_keys_for(path, lookup), []).append(path)
    for keys, paths in missing.items():
        named = ", ".join(
            f"{path}, shape {slots[path].shape}" for path in sorted(paths)
        )
        parameters = "parameter" if len(paths) == 1 else "parameters"
        problems.append(f"missing: {keys} for {parameters} {named}")
    problems += [
        problem
        for paths, (key, rule) in filled.items()
        if (problem := _misfit([slots[path] for path in paths], key, rule, source))
        is not None
    ]
    if problems:
        raise _conversion_error(problems, len(source))
    return filled


def _assign(
    source: Iterable[str], lookup: Lookup, slots: Mapping[str, _Slot]
) -> tuple[dict[tuple[str, ...], tuple[str, Rule]], list[str]]:
    """Finds each key's parameters, and the keys that have none or share one."""
    filled: dict[tuple[str, ...], tuple[str, Rule]] = {}
    key_of: dict[str, str] = {}
    problems = []
    for key in source:
        matches = lookup.of_key(key)
        if not matches:
            problems.append(f"unmatched: no rule knows the key {_place(source, key)}")
        elif len(matches) > 1:
            keys = [rule.key for _, rule in matches]
            place = _place(source, key)
            problems.append(f"ambiguous: {place} matches the rules {keys}")
        else:
            ((paths, rule),) = matches
            place = _place(source, key)
            if lacking := [path for path in paths if path not in slots]:
                names = ", ".join(lacking)
                problems.append(
                    f"extra: {place} leads to {names}, which the model lacks"
                )
            elif taken := [path for path in paths if path in key_of]:
                both = f"{_place(source, key_of[taken[0]])} and {place}"
                problems.append(f"twice: {both} both fill {', '.join(taken)}")
            else:
                filled[paths] = key, rule
                key_of |= dict.fromkeys(paths, key)
    return filled, problems


def _misfit(
    parts: Sequence[_Slot], key: str, rule: Rule, source: Mapping[str, Any]
) -> str | None:
    """Returns the problem of an array's shape or dtype; None if there is none."""
    value, place = source[key], _place(source, key)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return f"dtype: {place} is {value.dtype}; expected floating-point numbers"
    expected, *others = (slot.stored_shape(rule.layout) for slot in parts)
    if others:
        rows = expected[0] + sum(shape[0] for shape in others)
        expected = (rows, *expected[1:])
    if tuple(value.shape) != expected:
        return f"shape: {place} is {tuple(value.shape)}; expected {expected}"
    return None


def file_of(source: Iterable[str], key: str) -> Path | None:
    """Returns the file of a key, if the source knows it."""
    return source.file_of(key) if isinstance(source, HasFiles) else None


def _place(source: Iterable[str], key: str) -> str:
    """Returns a key with the name of its file; a model's shards share a folder."""
    file = file_of(source, key)
    return key if file is None else f"{key} in {file.name}"


def _keys_for(path: str, lookup: Lookup) -> str:
    keys = [key for key, _ in lookup.of_path(path)]
    return " or ".join(keys) or "a key (no rule writes one)"


def _conversion_error(problems: Sequence[str], num_keys: int) -> ConversionError:
    return ConversionError(
        f"{len(problems)} problems in {num_keys} weights:{list_problems(problems)}",
        problems,
    )
