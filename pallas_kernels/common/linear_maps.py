"""Linear functions whose transpose is given, for derivatives of any order and mode.

`jax.custom_vjp` refuses forward mode. `jax.custom_derivatives.linear_call` takes the
transpose of a tangent, but it has no rule for vmap, and none for derivatives along what
the map depends on, which second derivatives need. A small primitive has both.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Optional

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from pallas_kernels.common.sharding import (
    MAPPED,
    Axes,
    forget_varying,
    over_explicit_axes,
    partitioned,
    vary_alike,
    varying_like,
)
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
      axes: Axes of the residuals, then of the linear arrays, and of the results: each
        device computes the batch items and heads that it has. None leaves it to XLA,
        which is right for what it can look into.
    """

    apply: Callable[..., tuple[Array, ...]]
    transpose: Callable[..., tuple[Array, ...]]
    differentiable: Optional["LinearMap"] = None
    notice: Callable[[], None] | None = None
    axes: Axes | None = None

    def __call__(
        self, residuals: tuple[Array, ...], linear: tuple[Array | None, ...]
    ) -> tuple[Array, ...]:
        """Computes `apply`; derivatives and transposes follow the map's definition."""
        use = _Use(self, tuple(x is not None for x in linear))
        return tuple(_bind(use, residuals, [x for x in linear if x is not None]))

    def mapped(self, residual_axes: tuple[int | None, ...]) -> "LinearMap":
        """Returns the map under vmap; linear arrays and results have the axis first."""
        in_axes, axes = (residual_axes, 0), self.axes
        if axes is not None:
            is_mapped = [axis is not None for axis in residual_axes]
            num_linear = len(axes.operands) - len(is_mapped)
            axes = axes.mapped([*is_mapped, *[True] * num_linear])
        return LinearMap(
            apply=jax.vmap(self.apply, in_axes=in_axes),
            transpose=jax.vmap(self.transpose, in_axes=in_axes),
            differentiable=self.differentiable
            and self.differentiable.mapped(residual_axes),
            notice=self.notice,
            axes=axes,
        )


def sealed(
    function: Callable[..., tuple[Array, ...]],
    *arrays: Array,
    axes: Axes | None = None,
) -> tuple[Array, ...]:
    """Runs a function as one operation: a map that is linear in nothing.

    `jax.custom_jvp` cannot hold a kernel that writes in place, to references of its
    own: JAX has no rule that turns them into values there. A primitive can.

    Args:
      function: Takes and returns arrays. It has no derivative.
      *arrays: Its arguments.
      axes: See `LinearMap`.

    Returns:
      Its results.
    """
    call = LinearMap(lambda arrays, _: function(*arrays), lambda *_: (), axes=axes)
    return call(arrays, ())


def on_own_shards(
    function: Callable[..., tuple[Array, ...]],
    *,
    operation: str,
    operands: Any,
    results: tuple[str, ...],
) -> Callable[..., tuple[Array, ...]]:
    """Makes a function that each device runs on the batch items and heads it has.

    Args:
      function: Takes trees of arrays and returns arrays. It gets no derivative.
      operation: Its name, for messages.
      operands: See `over_explicit_axes`.
      results: Axes of each array that it returns.

    Returns:
      The same function, under any mesh.
    """

    def run(*arguments):
        leaves, tree = jax.tree.flatten(jax.lax.stop_gradient(arguments))
        leaves = [jnp.asarray(x) for x in leaves]  # without jit some are Python's
        names = jax.tree.leaves(jax.tree.broadcast(operands, arguments))
        axes = Axes(operation=operation, operands=tuple(names), results=results)

        def of_leaves(*leaves):
            return function(*jax.tree.unflatten(tree, leaves))

        return tuple(sealed(of_leaves, *leaves, axes=axes))

    return over_explicit_axes(
        run, operation=operation, operands=operands, results=results
    )


def with_derivatives_on_own_shards(
    function: Callable[..., tuple[Array, ...]], axes: Axes
) -> Callable[..., tuple[Array, ...]]:
    """Makes a function that each device runs on the batch items and heads it has.

    Args:
      function: Takes and returns arrays, and JAX can differentiate it. Derivatives
        compute it again. Arrays that it is differentiated along have batch and heads.
      axes: Axes of all arrays, and the operation's name.

    Returns:
      The same function, under any mesh.
    """
    return over_explicit_axes(
        functools.partial(sealed_with_derivatives, function, axes),
        operation=axes.operation,
        operands=axes.operands,
        results=axes.results,
    )


def kernel_on_own_shards(
    kernel: Callable[..., tuple[Array, ...]],
    by_xla: Callable[..., tuple[Array, ...]],
    axes: Axes,
) -> Callable[..., tuple[Array, ...]]:
    """Makes a kernel that each device runs on the batch items and heads it has.

    Args:
      kernel: Takes and returns arrays.
      by_xla: The same function as `with_derivatives_on_own_shards` takes it, for
        derivatives.
      axes: Axes of all arrays, and the operation's name.

    Returns:
      The same function, under any mesh.
    """
    return over_explicit_axes(
        functools.partial(sealed_kernel, kernel, by_xla, axes),
        operation=axes.operation,
        operands=axes.operands,
        results=axes.results,
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def sealed_with_derivatives(
    function: Callable[..., tuple[Array, ...]], axes: Axes, *arrays: Array
) -> tuple[Array, ...]:
    """Runs a function that JAX can differentiate as one operation, and its derivatives.

    Derivatives compute the function again and keep nothing but its arguments.

    Args:
      function: Takes and returns arrays.
      axes: See `LinearMap`.
      *arrays: Its arguments.

    Returns:
      Its results.
    """
    return sealed(function, *arrays, axes=axes)


@functools.partial(sealed_with_derivatives.defjvp, symbolic_zeros=True)
def _differentiate(function, axes, primals, tangents):
    moved = [None if isinstance(x, SymbolicZero) else x for x in tangents]
    along = _Along(function, tuple(x is not None for x in moved))
    results = sealed_with_derivatives(function, axes, *primals)
    return results, along.linear_map(axes)(primals, tuple(moved))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def sealed_kernel(
    kernel: Callable[..., tuple[Array, ...]],
    by_xla: Callable[..., tuple[Array, ...]],
    axes: Axes,
    *arrays: Array,
) -> tuple[Array, ...]:
    """Runs a kernel as one operation whose derivatives are those of XLA.

    Args:
      kernel: Takes and returns arrays.
      by_xla: The same function, which JAX can differentiate.
      axes: See `LinearMap`.
      *arrays: Its arguments.

    Returns:
      Its results.
    """
    return sealed(kernel, *arrays, axes=axes)


@sealed_kernel.defjvp
def _differentiate_kernel(kernel, by_xla, axes, primals, tangents):
    same = functools.partial(sealed_with_derivatives, by_xla, axes)
    _, moved = jax.jvp(same, primals, tangents)
    return sealed_kernel(kernel, by_xla, axes, *primals), moved


@dataclasses.dataclass(frozen=True)
class _Along:
    """The derivative of a function along some of its arguments."""

    function: Callable[..., Sequence[Array]]
    moves: tuple[bool, ...]

    def linear_map(self, axes: Axes | None) -> LinearMap:
        """Returns it as a map; `axes` are those of the function."""
        if axes is not None:
            tangents = (f"tangent of {name}" for name in axes.operands)
            axes = dataclasses.replace(axes, operands=(*axes.operands, *tangents))
        return LinearMap(apply=self._apply, transpose=self._transpose, axes=axes)

    def _of_moving(self, primals: tuple[Array, ...], moves: Sequence[bool]):
        def of_moving(*values):
            rest = iter(values)
            pairs = zip(primals, moves, strict=True)
            return tuple(self.function(*(next(rest) if m else x for x, m in pairs)))

        return of_moving, list(itertools.compress(primals, moves))

    def _apply(self, primals, moved):
        # A higher derivative may be along fewer of them.
        present = [x is not None for x in moved]
        of_moving, moving = self._of_moving(primals, present)
        return jax.jvp(of_moving, moving, [x for x in moved if x is not None])[1]

    def _transpose(self, primals, cotangents):
        of_moving, moving = self._of_moving(primals, self.moves)
        found = iter(jax.vjp(of_moving, *moving)[1](tuple(cotangents)))
        return [next(found) if moves else None for moves in self.moves]


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

    def axes(self, num_residuals: int) -> Axes | None:
        """Returns the axes of all arrays that this use takes and returns."""
        axes = self.linear_map.axes
        if axes is None:
            return None
        residuals = axes.operands[:num_residuals]
        linear = tuple(itertools.compress(axes.operands[num_residuals:], self.present))
        if not self.transposed:
            return dataclasses.replace(axes, operands=(*residuals, *linear))
        for array in linear:  # else devices would have to add their parts up
            assert {"B", "N"} <= {*array.split()}, f"{array} has no batch or no heads"
        cotangents = (f"cotangent: {result}" for result in axes.results)
        return dataclasses.replace(
            axes, operands=(*residuals, *cotangents), results=linear
        )

    def only(self, chosen: Sequence[bool]) -> "_Use":
        """Returns the use with those of its present linear arrays."""
        rest = iter(chosen)
        present = tuple(is_present and next(rest) for is_present in self.present)
        return dataclasses.replace(self, present=present)


_linear_map_p = Primitive("linear_map")
_linear_map_p.multiple_results = True


def _bind(use: _Use, residuals: Sequence[Array], inputs: Sequence[Array]):
    count, axes = len(residuals), use.axes(len(residuals))
    # What moves is cast, so that cotangents of what devices share are summed. What is
    # kept is not: JAX cannot keep the cast itself for a gradient of nested shard_maps.
    inputs = vary_alike((*residuals, *inputs))[count:]
    arguments = (*residuals, *inputs)

    def run(*args):
        return use(args[:count], args[count:])

    with default_promotion():
        types = [*map(forget_varying, arguments)]
        jaxpr = jax.make_jaxpr(run)(*types)
        # Kernels that are interpreted call back, which no partitioned program may.
        if axes is not None and not jaxpr.effects - _effects_of_own_references():
            jaxpr = jax.make_jaxpr(partitioned(run, axes))(*types)
    return _linear_map_p.bind(*arguments, jaxpr=jaxpr, use=use, num_residuals=count)


@_linear_map_p.def_impl
def _run(*args, jaxpr, use, num_residuals):
    if use.linear_map.notice is not None and not use.transposed:
        use.linear_map.notice()
    return jaxpr_as_fun(jaxpr)(*args)


@_linear_map_p.def_effectful_abstract_eval
def _result_types(*args, jaxpr, use, num_residuals):
    types = [varying_like(x, args) for x in jaxpr.out_avals]
    return types, jaxpr.effects - _effects_of_own_references()


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
    moving = [i for i in range(num_residuals) if moves[i]]
    if moving and (axes := use.axes(num_residuals)) is not None:

        def of_all(*args):
            return use.differentiable()(args[:num_residuals], args[num_residuals:])

        own = (i in moving for i in range(len(primals)))
        along = _Along(of_all, tuple(own)).linear_map(axes)
        moved = [tangents[i] if i in moving else None for i in range(len(primals))]
        terms.append(along(tuple(primals), tuple(moved)))
    elif moving:

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
    args = (*args[:num_residuals], *inputs)
    is_mapped = (*(x is not None for x in residual_axes), *(True for _ in inputs))

    def bind(*args):
        return _bind(mapped, args[:num_residuals], args[num_residuals:])

    # Where the new axis is explicitly sharded, each device maps over what it has.
    run = over_explicit_axes(
        bind,
        operation="vmap",
        operands=tuple(map(_axes_of_mapped, args, is_mapped)),
        results=[_axes_of_mapped(x, True, 1) for x in jaxpr.out_avals],
    )
    results = run(*args)
    return results, [0] * len(results)


def _axes_of_mapped(x, is_mapped: bool, more: int = 0) -> str:
    """Returns the axes of an array of which vmap has added the first, if it has."""
    names = [f"axis{i}" for i in range(x.ndim + more)]
    return " ".join([f"{MAPPED}", *names[1:]] if is_mapped else names)


ad.primitive_jvps[_linear_map_p] = _jvp
ad.primitive_transposes[_linear_map_p] = _transpose
batching.primitive_batchers[_linear_map_p] = _batch


def _lower(ctx, *args, jaxpr, **options):
    """Lowers the program as it was traced, without how its arguments vary."""
    lower = mlir.lower_fun(_run, multiple_results=True)
    own = ctx.replace(avals_in=jaxpr.in_avals)
    results = lower(own, *args, jaxpr=jaxpr, **options)
    if own.tokens_out is not None:
        ctx.set_tokens_out(own.tokens_out)
    return results


mlir.register_lowering(_linear_map_p, _lower)
