"""A matrix product that its reader finishes: scales and bias are not applied yet.

XLA cannot make them part of a kernel that reads the product, and so would read and
write all of it once more. A kernel that takes a `Product` applies them as it reads.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Union

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.common.arrays import AnyArray, to_jax


class Product(NamedTuple):
    """A product without its scales and bias, of which each may be None.

    It stands for `values * rows * columns + bias`, in float32, rounded to the dtype of
    the values.

    Attributes:
      values: As multiplied. The first axes are those of rows, the others of channels:
        one, or heads and their channels.
      rows: Scale of each row.
      columns: Scale of each channel.
      bias: Of each channel.
    """

    values: Float[AnyArray, "*rows _"]
    rows: Float[AnyArray, "*rows"] | None = None
    columns: Float[AnyArray, "..."] | None = None
    bias: Float[AnyArray, "..."] | None = None

    @classmethod
    def of(cls, x: Union[Float[AnyArray, "..."], "Product"]) -> "Product":
        """Returns a product as it is, and an array as one that is finished."""
        return cls(*to_jax(*x)) if isinstance(x, cls) else cls(*to_jax(x))

    @property
    def is_finished(self) -> bool:
        """Whether the values are what the product stands for."""
        return self.rows is None and self.columns is None and self.bias is None

    def float32(self) -> Float[Array, "..."]:
        """Returns what it stands for in float32, before it is rounded."""
        y = jnp.asarray(self.values, jnp.float32)
        if self.rows is not None:
            rows = jnp.asarray(self.rows, jnp.float32)
            y = y * rows.reshape(rows.shape + (1,) * (y.ndim - rows.ndim))
        if self.columns is not None:
            y = y * jnp.asarray(self.columns, jnp.float32)
        return y if self.bias is None else y + jnp.asarray(self.bias, jnp.float32)

    def finished(self) -> Float[Array, "..."]:
        """Returns what it stands for, in the dtype of the values."""
        return self.values if self.is_finished else self.float32().astype(self.dtype)

    def with_channels(self, change: Callable[[Any], Any]) -> "Product":
        """Returns the product with its axes of channels changed by a function."""
        values, columns, bias = (
            None if x is None else change(x)
            for x in (self.values, self.columns, self.bias)
        )
        return Product(values, self.rows, columns, bias)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the values, and of the finished product."""
        return self.values.dtype


def check_product(name: str, product: Product, num_rows: int) -> None:
    """Raises ValueError unless scales and bias fit the values.

    Args:
      name: Of the product, for the message.
      product: The product.
      num_rows: Axes of its rows.
    """
    rows, channels = product.shape[:num_rows], product.shape[num_rows:]
    for part, expected in (("rows", rows), ("columns", channels), ("bias", channels)):
        array = getattr(product, part)
        if array is not None and array.shape != expected:
            raise ValueError(
                f"{name}.{part} has shape {array.shape}; {name} of shape "
                f"{product.shape} needs {expected}"
            )


def filled(
    product: Product, num_rows: int, needed: Sequence[bool] = (True, True, True)
) -> Product:
    """Returns a product with the parts that it lacks.

    What is added changes nothing: scales of one, and biases of zero.

    Args:
      product: Of any shape.
      num_rows: Axes of its rows.
      needed: Whether rows, columns and bias are to be there.
    """
    rows, channels = product.shape[:num_rows], product.shape[num_rows:]
    neutral = ((1.0, rows), (1.0, channels), (0.0, channels))
    parts = (
        jnp.full(shape, value, jnp.float32) if is_needed and part is None else part
        for part, is_needed, (value, shape) in zip(
            product[1:], needed, neutral, strict=True
        )
    )
    return Product(product.values, *parts)


def filled_alike(products: tuple[Product, ...], num_rows: int) -> tuple[Product, ...]:
    """Returns products that all have the parts which one of them has; see `filled`.

    Args:
      products: Of any shapes.
      num_rows: Axes of their rows.
    """
    needed = [any(x[i] is not None for x in products) for i in (1, 2, 3)]
    return tuple(filled(product, num_rows, needed) for product in products)
