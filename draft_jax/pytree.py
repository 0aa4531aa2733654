"""Registers frozen dataclasses as pytrees without running their constructor."""

import dataclasses
from collections.abc import Callable

import jax


def register_dataclass[T](cls: type[T]) -> type[T]:
    """Registers a frozen dataclass as a pytree.

    Fields marked `metadata={"static": True}` become part of the tree's structure,
    all others are leaves. It differs from `jax.tree_util.register_dataclass` in one
    point: rebuilding skips `__init__`. JAX rebuilds trees with shapes, axis numbers
    or `None` in place of arrays, which would fail a type-checked constructor.
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
    return cls


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
