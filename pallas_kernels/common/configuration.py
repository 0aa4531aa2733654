"""Configurations: frozen dataclasses of plain values, static wherever jax takes them.

A class of configurations says `make_plain(self)` first in its `__post_init__` and
stands under `@register_configuration`. Equal ones then hash alike, and jax takes them
as an argument of any transformed function: as part of its structure, not of its data.
"""

import dataclasses
import json
from fractions import Fraction
from typing import Any

import jax
import jax.export
import numpy as np

VERSION = 1  # of the descriptions that exported functions carry

_classes: dict[str, type] = {}


def make_plain(config: Any) -> None:
    """Turns the fields of a frozen dataclass into values of Python's own types.

    NumPy's numbers compare equal to Python's where they hash differently, and small
    integers overflow in the products that sizes are. Lists are not hashable at all.

    Args:
      config: A dataclass that is being made; its fields are replaced.
    """
    for field in dataclasses.fields(config):
        # The dataclass is frozen, so plain assignment would raise.
        object.__setattr__(config, field.name, plain(getattr(config, field.name)))


def plain(value: Any) -> Any:
    """Returns a value of Python's own types: NumPy's numbers and lists are converted.

    A float of fewer bits means the shortest decimal that rounds to it:
    `np.float32(0.9)` is 0.9. What is none of these is returned as it is.
    """
    if isinstance(value, np.floating):
        return float(str(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Fraction):
        return float(value)
    if isinstance(value, np.ndarray) and not value.ndim:
        return plain(value[()])
    if isinstance(value, (list, range, np.ndarray)) or type(value) is tuple:
        return tuple(plain(item) for item in value)
    return value


def register_configuration[T](cls: type[T]) -> type[T]:
    """Registers a frozen dataclass as a pytree without leaves.

    jax then takes its instances where it takes arrays, and nothing has to be said of
    them: `jax.jit(f)(x, config)` needs no static_argnames, `jax.vmap` no in_axes. They
    may be named static all the same. Functions that take or return them can be
    exported and serialised.
    """
    jax.tree_util.register_static(cls)
    register_export(cls, serialize=describe, deserialize=read)
    return cls


def register_export(cls: type, **functions: Any) -> None:
    """Registers how jax.export writes the structure of a pytree of ours.

    Args:
      cls: The class; its name and that of its package are written.
      **functions: `serialize` and `deserialize` of its static part, and where the class
        is not registered as a pytree `from_children`.
    """
    name = name_of(cls)
    if name in _classes:  # the module was reloaded: jax knows the name already
        return
    _classes[name] = cls
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=name,
        serialize_auxdata=functions["serialize"],
        deserialize_auxdata=functions["deserialize"],
        from_children=functions.get("from_children"),
    )


def name_of(cls: type) -> str:
    """Returns what a class is called in files: stays as modules are moved about."""
    return f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}"


def describe(value: Any) -> bytes:
    """Writes plain values and configurations as JSON, with the version of the form.

    Raises:
      TypeError: The value, or one inside it, is of another kind.
    """
    return json.dumps({"version": VERSION, "value": _encode(value)}).encode()


def read(description: bytes | bytearray) -> Any:
    """Reads what `describe` wrote; configurations are checked as on construction.

    Raises:
      ValueError: It is of another version, or names a class that there is not.
      TypeError: A configuration has a field that its class lacks.
    """
    found = json.loads(bytes(description))
    if found["version"] != VERSION:
        raise ValueError(
            f"the description has version {found['version']}; this release reads "
            f"{VERSION}: export the function again"
        )
    return _decode(found["value"])


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if _classes.get(name_of(type(value))) is not type(value):
        raise TypeError(
            f"{value!r} can't be written with an exported function: it is neither a "
            "plain value nor a configuration"
        )
    fields = dataclasses.fields(value)  # type: ignore[arg-type]
    return {
        "class": name_of(type(value)),
        "fields": {field.name: _encode(getattr(value, field.name)) for field in fields},
    }


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    if value["class"] not in _classes:
        raise ValueError(
            f"{value['class']} is not known here: import the package that has it"
        )
    fields = {name: _decode(item) for name, item in value["fields"].items()}
    return _classes[value["class"]](**fields)
