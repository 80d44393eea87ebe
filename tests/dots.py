"""The matmuls of a traced function."""

import math

import jax.extend
from jax.interpreters import partial_eval


def used_dots(jaxpr):
    """[(FLOPs, shapes of the left operand and of the result, batch dimensions)] of the dots whose results are used.

    Those inside loops are counted as often as these run.
    """
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return list(_dots(needed, 1))


def _dots(jaxpr, times):
    for equation in jaxpr.eqns:
        loops = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _dots(inner, loops)
        if equation.primitive.name not in ("dot_general", "ragged_dot_general"):
            continue
        left, shape = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        numbers = equation.params.get("dimension_numbers")
        numbers = numbers or equation.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        flops = times * 2 * math.prod(shape) * math.prod(left[axis] for axis in numbers[0][0])
        yield flops, left, shape, numbers[1][0]
