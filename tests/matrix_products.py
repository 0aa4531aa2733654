"""The matrix products of a program."""

from jax.extend.core import jaxprs_in_params


def products(jaxpr):
    """All matrix products of a program, those of inner ones too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)
