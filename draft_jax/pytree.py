"""Registers frozen dataclasses and named tuples as pytrees that can be exported."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.common import describe, read, register_export


def register_dataclass[T](cls: type[T]) -> type[T]:
    """Registers a frozen dataclass as a pytree.

    Fields marked `metadata={"static": True}` become part of the tree's structure,
    all others are leaves. It differs from `jax.tree_util.register_dataclass` in one
    point: rebuilding skips `__init__`. JAX rebuilds trees with shapes, axis numbers
    or `None` in place of arrays, which would fail a type-checked constructor.
    Functions that take or return such trees can be exported and serialised.

    The dataclass has `eq=False`: two trees of arrays are not equal or unequal by one
    boolean, so `==` and `hash` go by identity.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    static = tuple(f.name for f in fields if f.metadata.get("static"))
    data = tuple(f.name for f in fields if not f.metadata.get("static"))

    def flatten_with_keys(tree):
        keys = tuple((jax.tree_util.GetAttrKey(n), getattr(tree, n)) for n in data)
        return keys, tuple(getattr(tree, name) for name in static)

    def flatten(tree):
        leaves = tuple(getattr(tree, name) for name in data)
        return leaves, tuple(getattr(tree, name) for name in static)

    jax.tree_util.register_pytree_with_keys(
        cls, flatten_with_keys, _rebuild(cls, data, static), flatten
    )

    def serialize(static_values: tuple[Any, ...]) -> bytes:
        return describe((data, static, static_values))

    def deserialize(description: bytes) -> tuple[Any, ...]:
        *names, static_values = read(description)
        _check_fields(cls, names, [data, static])
        return static_values

    register_export(cls, serialize=serialize, deserialize=deserialize)
    return cls


def register_named_tuple[T: tuple](cls: type[T]) -> type[T]:
    """Registers a named tuple, so that functions of it can be exported and serialised.

    jax knows named tuples as pytrees by themselves.
    """
    fields = cls._fields  # type: ignore[attr-defined]

    def deserialize(description: bytes) -> None:
        _check_fields(cls, read(description), fields)

    register_export(
        cls,
        serialize=lambda _: describe(fields),
        deserialize=deserialize,
        from_children=lambda _, children: cls(*children),
    )
    return cls


def _check_fields(cls: type, found: Any, expected: Any) -> None:
    """Raises unless a class has the fields that it had when a file was written."""
    if tuple(found) != tuple(expected):
        raise ValueError(
            f"the file has {cls.__name__} with the fields {found}; this release has "
            f"{expected}: export the function again"
        )


def _rebuild[T](
    cls: type[T], data: tuple[str, ...], static: tuple[str, ...]
) -> Callable[..., T]:
    def unflatten(static_values, leaves):
        tree = object.__new__(cls)
        for name, value in zip(
            (*data, *static), (*leaves, *static_values), strict=True
        ):
            # The dataclass is frozen, so plain assignment would raise.
            object.__setattr__(tree, name, value)
        return tree

    return unflatten
