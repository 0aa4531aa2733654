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

from models.checkpoints.listing import list_names, list_problems
from models.checkpoints.rules import Layout, Rule


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
    known = {
        name: sum(any(rule.path_of(key) for rule in rules) for key in keys)
        for name, rules in tables.items()
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
) -> M:
    """Builds a model with the weights of a checkpoint.

    The model is built abstractly, so random parameters are never made. Everything is
    checked by shapes and dtypes alone. Then arrays are read one at a time, in the order
    of `source`. Each goes to its place on the device before the next is read. The host
    never holds a whole model or stack: with a reader that maps its files, it holds one
    array.

    Arrays go to JAX's default device; `jax.default_device` names another.

    Args:
      make_model: Makes the model; run under `nnx.eval_shape`.
      source: Values by checkpoint key, each with `shape` and `dtype` that cost no
        reading; `jnp.asarray` reads it.
      rules: The table. Each key must match exactly one rule, and each parameter
        must be filled exactly once.
      stacked: Attributes whose parameters are stacked over layers.
      float32: Attributes, at any depth, whose parameters are stored in float32
        whatever dtype the model gives them.

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
    shapes = {
        _name(path): jax.ShapeDtypeStruct(
            leaf.shape, jnp.float32 if wide.intersection(path) else leaf.dtype
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
    filled: Mapping[str, tuple[str, Rule]],
    slots: Mapping[str, _Slot],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """Reads the parameters by name; one array at a time is on the host."""
    arrays: dict[str, jax.Array] = {}
    for path, (key, rule) in filled.items():
        slot, layout = slots[path], rule.layout
        shape = shapes[slot.name]
        # Arrays that are read are given no name, which would keep them.
        if slot.layer is None:
            array = _convert(jnp.asarray(source[key]), layout, shape.dtype)
        else:
            stack = arrays.pop(slot.name, None)
            if stack is None:
                stack = jnp.zeros(shape.shape, shape.dtype)
            array = _insert(stack, jnp.asarray(source[key]), slot.layer, layout)
        # Without waiting, the arrays of many transfers would be held at once.
        arrays[slot.name] = jax.block_until_ready(array)
    return arrays


@functools.partial(jax.jit, static_argnums=(1, 2))
def _convert(value: jax.Array, layout: Layout, dtype: Any) -> jax.Array:
    # On CPU the argument may be the mapped file itself, hence the copy.
    return jnp.copy(layout.load(value).astype(dtype))


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _insert(
    stack: jax.Array, value: jax.Array, layer: Any, layout: Layout
) -> jax.Array:
    """Overwrites one layer of a stack, in the stack's own memory."""
    return stack.at[layer].set(layout.load(value).astype(stack.dtype))


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
      dtype: Cast to this; None keeps the parameters' dtypes.

    Returns:
      Arrays by checkpoint key, in the order of the keys.

    Raises:
      ConversionError: A parameter is named by no rule or by several.
    """
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    values = {_name(path): leaf for path, leaf in flat.items()}
    arrays, problems = {}, []
    host: dict[str, np.ndarray] = {}
    for path, slot in _slots(flat, stacked).items():
        matches = [
            (key, rule) for rule in rules if (key := rule.key_of(path)) is not None
        ]
        if len(matches) != 1:
            keys = [key for key, _ in matches]
            problems.append(f"parameter {path} is named by {len(matches)} keys: {keys}")
            continue
        ((key, rule),) = matches
        if slot.name not in host:
            host[slot.name] = np.asarray(jax.device_get(values[slot.name][...]))
        value = host[slot.name]
        value = value if slot.layer is None else value[slot.layer]
        arrays[key] = np.ascontiguousarray(
            rule.layout.save(value), dtype=dtype or value.dtype
        )
    if problems:
        raise _conversion_error(problems, len(values))
    return dict(sorted(arrays.items()))


def _name(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


def _slots(
    flat: Mapping[tuple, nnx.Variable], stacked: Iterable[str]
) -> dict[str, _Slot]:
    """Returns every path to be filled; stacked parameters have one for each layer."""
    stacked = set(stacked)
    slots = {}
    for path, leaf in flat.items():
        name = _name(path)
        if path[0] not in stacked:
            slots[name] = _Slot(name, None, leaf.shape)
            continue
        rest = _name(path[1:])
        for layer in range(leaf.shape[0]):
            layer_path = f"{path[0]}.{layer}.{rest}"
            slots[layer_path] = _Slot(name, layer, leaf.shape[1:])
    return slots


def _checked_assignment(
    source: Mapping[str, Any], rules: Sequence[Rule], slots: Mapping[str, _Slot]
) -> dict[str, tuple[str, Rule]]:
    """Returns key and rule of each path; raises for everything that does not fit."""
    filled, problems = _assign(source, rules, slots)
    problems += [
        f"missing: {_keys_for(path, rules)} for parameter {path}, "
        f"shape {slots[path].shape}"
        for path in slots.keys() - filled.keys()
    ]
    problems += [
        problem
        for path, (key, rule) in filled.items()
        if (problem := _misfit(slots[path], key, rule, source)) is not None
    ]
    if problems:
        raise _conversion_error(problems, len(source))
    return filled


def _assign(
    source: Iterable[str], rules: Sequence[Rule], slots: Mapping[str, _Slot]
) -> tuple[dict[str, tuple[str, Rule]], list[str]]:
    """Finds each key's parameter, and the keys that have none or share one."""
    filled: dict[str, tuple[str, Rule]] = {}
    problems = []
    for key in source:
        matches = [
            (path, rule) for rule in rules if (path := rule.path_of(key)) is not None
        ]
        if not matches:
            problems.append(f"unmatched: no rule knows the key {_place(source, key)}")
        elif len(matches) > 1:
            keys = [rule.key for _, rule in matches]
            place = _place(source, key)
            problems.append(f"ambiguous: {place} matches the rules {keys}")
        else:
            ((path, rule),) = matches
            if path not in slots:
                place = _place(source, key)
                problems.append(
                    f"extra: {place} leads to {path}, which the model lacks"
                )
            elif path in filled:
                both = f"{_place(source, filled[path][0])} and {_place(source, key)}"
                problems.append(f"twice: {both} both fill {path}")
            else:
                filled[path] = key, rule
    return filled, problems


def _misfit(slot: _Slot, key: str, rule: Rule, source: Mapping[str, Any]) -> str | None:
    """Returns the problem of an array's shape or dtype; None if there is none."""
    value, place = source[key], _place(source, key)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return f"dtype: {place} is {value.dtype}; expected floating-point numbers"
    # `save` only moves axes, so an array of strides 0 stands in for the parameter.
    expected = rule.layout.save(np.broadcast_to(np.float32(0), slot.shape)).shape
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


def _keys_for(path: str, rules: Iterable[Rule]) -> str:
    keys = [key for rule in rules if (key := rule.key_of(path)) is not None]
    return " or ".join(keys) or "a key (no rule writes one)"


def _conversion_error(problems: Sequence[str], num_keys: int) -> ConversionError:
    return ConversionError(
        f"{len(problems)} problems in {num_keys} weights:{list_problems(problems)}",
        problems,
    )
