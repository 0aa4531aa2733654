"""Linear functions whose transpose is given, for derivatives of any order and mode.

`jax.custom_vjp` refuses forward mode. `jax.custom_derivatives.linear_call` takes the
transpose of a tangent, but it has no rule for vmap, and none for derivatives along what
the map depends on, which second derivatives need. A small primitive has both.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Optional

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from pallas_kernels.common.static import default_promotion


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """A function that is linear in some of its arrays, and its transpose.

    Both are traced whenever they are needed and must not close over traced values.

    Attributes:
      apply: Takes a tuple of residuals and a tuple of linear arrays, of which some may
        be None for zero; returns a tuple of arrays.
      transpose: Takes the residuals and a cotangent for each result of `apply`; returns
        a cotangent for each linear array, also for those that are None.
      differentiable: The same map in functions that can be differentiated with respect
        to the residuals; None where `apply` and `transpose` can.
      notice: Called when `apply` is compiled or run. Reverse mode traces it too, but
        runs the transpose alone.
    """

    apply: Callable[..., tuple[Array, ...]]
    transpose: Callable[..., tuple[Array, ...]]
    differentiable: Optional["LinearMap"] = None
    notice: Callable[[], None] | None = None

    def __call__(
        self, residuals: tuple[Array, ...], linear: tuple[Array | None, ...]
    ) -> tuple[Array, ...]:
        """Computes `apply`; derivatives and transposes follow the map's definition."""
        use = _Use(self, tuple(x is not None for x in linear))
        return tuple(_bind(use, residuals, [x for x in linear if x is not None]))

    def mapped(self, residual_axes: tuple[int | None, ...]) -> "LinearMap":
        """Returns the map under vmap; linear arrays and results have the axis first."""
        axes = (residual_axes, 0)
        return LinearMap(
            apply=jax.vmap(self.apply, in_axes=axes),
            transpose=jax.vmap(self.transpose, in_axes=axes),
            differentiable=self.differentiable
            and self.differentiable.mapped(residual_axes),
            notice=self.notice,
        )


def sealed(
    function: Callable[..., tuple[Array, ...]], *arrays: Array
) -> tuple[Array, ...]:
    """Runs a function as one operation: a map that is linear in nothing.

    `jax.custom_jvp` cannot hold a kernel that writes in place, to references of its
    own: JAX has no rule that turns them into values there. A primitive can.

    Args:
      function: Takes and returns arrays. It has no derivative.
      *arrays: Its arguments.

    Returns:
      Its results.
    """
    call = LinearMap(lambda arrays, _: function(*arrays), lambda *_: ())
    return call(arrays, ())


@dataclasses.dataclass(frozen=True)
class _Use:
    """A map or its transpose, between the results and some of the linear arrays."""

    linear_map: LinearMap
    present: tuple[bool, ...]  # of the linear arrays
    transposed: bool = False

    def __call__(
        self, residuals: Sequence[Array], inputs: Sequence[Array]
    ) -> list[Array]:
        if self.transposed:
            results = self.linear_map.transpose(tuple(residuals), tuple(inputs))
            pairs = zip(results, self.present, strict=True)
            return [x for x, is_present in pairs if is_present]
        rest = iter(inputs)
        linear = tuple(
            next(rest) if is_present else None for is_present in self.present
        )
        return list(self.linear_map.apply(tuple(residuals), linear))

    def differentiable(self) -> "_Use":
        twin = self.linear_map.differentiable or self.linear_map
        return dataclasses.replace(self, linear_map=twin)

    def only(self, chosen: Sequence[bool]) -> "_Use":
        """Returns the use with those of its present linear arrays."""
        rest = iter(chosen)
        present = tuple(is_present and next(rest) for is_present in self.present)
        return dataclasses.replace(self, present=present)


_linear_map_p = Primitive("linear_map")
_linear_map_p.multiple_results = True


def _bind(use: _Use, residuals: Sequence[Array], inputs: Sequence[Array]):
    count = len(residuals)
    with default_promotion():
        jaxpr = jax.make_jaxpr(lambda *args: use(args[:count], args[count:]))(
            *residuals, *inputs
        )
    return _linear_map_p.bind(
        *residuals, *inputs, jaxpr=jaxpr, use=use, num_residuals=count
    )


@_linear_map_p.def_impl
def _run(*args, jaxpr, use, num_residuals):
    if use.linear_map.notice is not None and not use.transposed:
        use.linear_map.notice()
    return jaxpr_as_fun(jaxpr)(*args)


@_linear_map_p.def_effectful_abstract_eval
def _result_types(*args, jaxpr, use, num_residuals):
    return jaxpr.out_avals, jaxpr.effects - _effects_of_own_references()


@functools.lru_cache(maxsize=1)
def _effects_of_own_references() -> frozenset:
    """Returns the effects that end with a program; callbacks of a debugger do not."""
    return frozenset(jax.make_jaxpr(lambda x: jax.freeze(jax.new_ref(x)))(0.0).effects)


def _jvp(primals, tangents, *, jaxpr, use, num_residuals):
    """Adds the map of the tangents and its derivatives along those of residuals."""
    residuals, inputs = primals[:num_residuals], primals[num_residuals:]
    results = _linear_map_p.bind(
        *primals, jaxpr=jaxpr, use=use, num_residuals=num_residuals
    )
    moves = [not isinstance(tangent, ad.Zero) for tangent in tangents]
    terms = []
    if any(chosen := moves[num_residuals:]):
        own = tangents[num_residuals:]
        if use.transposed:
            terms.append(_bind(use, residuals, [*map(ad.instantiate_zeros, own)]))
        else:
            own = [x for x, is_chosen in zip(own, chosen, strict=True) if is_chosen]
            terms.append(_bind(use.only(chosen), residuals, own))
    if moving := [i for i in range(num_residuals) if moves[i]]:

        def of_moving(*values):
            everything = list(residuals)
            for i, value in zip(moving, values, strict=True):
                everything[i] = value
            return use.differentiable()(everything, inputs)

        _, along = jax.jvp(
            of_moving, [residuals[i] for i in moving], [tangents[i] for i in moving]
        )
        terms.append(along)
    if len(terms) == 1:
        return results, terms[0]
    return results, [x + y for x, y in zip(*terms, strict=True)]


def _transpose(cotangents, *args, jaxpr, use, num_residuals):
    residuals, inputs = args[:num_residuals], args[num_residuals:]
    is_asked = [ad.is_undefined_primal(x) for x in inputs]
    cotangents = [ad.instantiate_zeros(x) for x in cotangents]
    if use.transposed:
        back = dataclasses.replace(use, transposed=False)
        found = _bind(back, residuals, cotangents)
        gradients = [
            x if asked else None for x, asked in zip(found, is_asked, strict=True)
        ]
    else:
        back = dataclasses.replace(use.only(is_asked), transposed=True)
        rest = iter(_bind(back, residuals, cotangents))
        gradients = [next(rest) if asked else None for asked in is_asked]
    return [None] * num_residuals + gradients


def _batch(args, axes, *, jaxpr, use, num_residuals):
    size = next(
        x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None
    )
    args = [
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(args, axes, strict=True)
    ]
    inputs = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else x
        for x, axis in zip(args[num_residuals:], axes[num_residuals:], strict=True)
    ]
    residual_axes = tuple(None if axis is None else 0 for axis in axes[:num_residuals])
    mapped = dataclasses.replace(use, linear_map=use.linear_map.mapped(residual_axes))
    results = _bind(mapped, args[:num_residuals], inputs)
    return results, [0] * len(results)


ad.primitive_jvps[_linear_map_p] = _jvp
ad.primitive_transposes[_linear_map_p] = _transpose
batching.primitive_batchers[_linear_map_p] = _batch
mlir.register_lowering(_linear_map_p, mlir.lower_fun(_run, multiple_results=True))
