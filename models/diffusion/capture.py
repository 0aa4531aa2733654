"""Values from inside a model, for pictures: sown where they arise, read outside."""

from typing import Any

from flax import nnx
from jaxtyping import Array


def sow_if_captured(module: nnx.Module, **arrays: Array) -> None:
    """Stores arrays for `nnx.capture`; does nothing where nobody captures.

    Unasked-for arrays would else become outputs of a scan over layers. flax 0.12.12
    says this with `sow(..., capture_noop=True)`; older ones store and warn.
    """
    if hasattr(module, "__captures__"):
        for name, array in arrays.items():
            module.sow(nnx.Intermediate, name, array)


def call_and_capture(module: nnx.Module, *arguments: Any) -> tuple[Any, dict[str, Any]]:
    """Calls a module and collects what it and its parts sow.

    Returns:
      The module's result, and sown arrays in nested dictionaries by the names of
      modules and arrays.

    Raises:
      ValueError: A module has sown twice by one name.
    """
    result, sown = nnx.capture(module, nnx.Intermediate)(*arguments)
    arrays: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(sown):
        values = variable.get_value()
        if len(values) != 1:
            raise ValueError(f"{path} was sown {len(values)} times; expected once")
        *modules, name = map(str, path)
        inner = arrays
        for part in modules:
            inner = inner.setdefault(part, {})
        inner[name] = values[0]
    return result, arrays
