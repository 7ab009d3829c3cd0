"""Equations of a traced program, run one by one."""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import JaxprEqn, Literal, Var


def bind(equation: JaxprEqn, operands: Sequence[Any], **changed: Any) -> Sequence[Any]:
    """The results of an equation for these operands, some of its parameters ``changed``."""
    parameters = equation.primitive.get_bind_params(equation.params | changed)
    with equation.ctx.manager:
        results = equation.primitive.bind(*operands, **parameters)
    return results if equation.primitive.multiple_results else [results]


def read(environment: dict[Var, Any], var: Any) -> Any:
    """The value of a variable or a literal."""
    return var.val if isinstance(var, Literal) else environment[var]
