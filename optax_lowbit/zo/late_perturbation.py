"""Any function of parameters, evaluated with each of them perturbed right where it is used.

``fun(tree.map(lambda w: w + s * z(w), params))`` needs the perturbed tree: XLA draws the noise of
all leaves first, as it depends on nothing but a key, and keeps it for the update. Here the
function's program is taken apart. A parameter is followed through what only moves or casts it
(:mod:`~optax_lowbit.zo.views`), into jitted functions, scans, loops, branches and rematerialized
blocks. Where arithmetic first needs it, it is perturbed, with a key that is made to depend on what
the program has computed by then: so it can't be perturbed earlier.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from optax_lowbit.kernels.meshes import as_varying, varying_axes
from optax_lowbit.kernels.ordering import first_element
from optax_lowbit.moments.equations import bind, read
from optax_lowbit.zo.factored_dot import factored_dot
from optax_lowbit.zo.noise import Factors
from optax_lowbit.zo.rows import Rows, whole
from optax_lowbit.zo.views import Pending, takes_rows_only, viewed

# The `jax.ad_checkpoint.checkpoint_name` of a parameter that a loop is to have perturbed in each
# turn, where it is used there, and not once before the loop.
IN_EACH_TURN = "optax_lowbit.zo.in_each_turn"

# Gives the perturbed values of rows. The second argument is an element of what the program computed
# last, a float, for :func:`data_zero`.
Perturb = Callable[[Rows, jax.Array], jax.Array]

# Given the same: the factors of what is added to the rows, if it has a low rank.
LowRank = Callable[[Rows, jax.Array], Factors | None]


def call_perturbed(
    fun: Callable[[list[jax.Array]], Any],
    leaves: Sequence[jax.Array],
    perturb: Perturb,
    after: jax.Array,
    companions: Sequence[Any] | None = None,
    factors: LowRank = lambda rows, latest: None,
    axes: frozenset[str] = frozenset(),
) -> Any:
    """``fun`` of leaves perturbed where they are used; each use makes the perturbation anew.

    Args:
      fun: A traceable function of a list of arrays, to any pytree of arrays.
      leaves: Float arrays.
      perturb: Gives the perturbed values of rows.
      after: A float array; nothing is perturbed before it is known. In a loop over evaluations, one
        that differs from turn to turn: else what the first leaf needs is moved out of the loop.
      companions: For each leaf a pytree of arrays with its leading axes, of which ``perturb`` is
        given the same rows.
      factors: Gives the factors of what is added to rows. Then a matmul with them is
        ``x @ W + (x @ left) @ right.T``, and no perturbed copy of ``W`` is made.
      axes: The mesh axes that perturbations differ along inside `jax.shard_map`.

    Returns:
      What ``fun`` gives. Beside what it needs: a perturbed copy of the leaf in use.
    """
    trace = jax.make_jaxpr(fun, return_shape=True)
    closed, shapes = trace(list(leaves))
    # What delays a perturbation may differ along all axes that the data differs along.
    axes = axes.union(*map(varying_axes, closed.consts))
    if axes:
        closed, shapes = trace([as_varying(leaf, axes) for leaf in leaves])
    companions = [()] * len(leaves) if companions is None else companions
    pending = []
    for number, (leaf, companion) in enumerate(zip(leaves, companions, strict=True)):
        rows = jax.tree.map(lambda x: as_varying(x, axes), whole(number, leaf, companion))
        pending.append(Pending(rows))

    def perturbed(rows, latest):
        return as_varying(perturb(rows, latest), axes)

    evaluation = _Evaluation(perturbed, factors, after)
    results = evaluation.run(closed.jaxpr, closed.consts, pending)
    return jax.tree.unflatten(jax.tree.structure(shapes), evaluation.settled(results))


class _Evaluation:
    """Runs a program some of whose values are :class:`Pending`."""

    def __init__(self, perturb: Perturb, factors: LowRank, latest: jax.Array):
        self.perturb = perturb
        self.factors = factors
        # The last float array computed at this level of the program.
        self.latest = latest

    def nested(self, latest: jax.Array | None = None) -> "_Evaluation":
        """For the body of a loop, a branch, ..., whose values may not be seen from outside."""
        return _Evaluation(self.perturb, self.factors, self.latest if latest is None else latest)

    def settled(self, values: Sequence[Any]) -> list[Any]:
        """The values, those that were pending now perturbed."""
        return [
            x.after(self.perturb(x.rows, first_element(self.latest)))
            if isinstance(x, Pending)
            else x
            for x in values
        ]

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
        """The results of a program, pending ones among them."""
        environment: dict[Any, Any] = dict(zip(jaxpr.constvars, consts))
        environment.update(zip(jaxpr.invars, operands, strict=True))
        for equation in jaxpr.eqns:
            results = self._results(equation, [read(environment, var) for var in equation.invars])
            environment.update(zip(equation.outvars, results))
            self.latest = next(filter(_can_delay, results), self.latest)
        return [read(environment, var) for var in jaxpr.outvars]

    def _results(self, equation: JaxprEqn, operands: list[Any]) -> Sequence[Any]:
        if not any(isinstance(x, Pending) for x in operands):
            return bind(equation, operands)
        view = viewed(equation, operands)
        if view is not None:
            return [view]
        handler = _HANDLERS.get(equation.primitive.name)
        if handler is not None:
            return handler(self, equation, operands)
        if equation.primitive.name == "dot_general":
            element = first_element(self.latest)
            product = factored_dot(equation, operands, lambda rows: self.factors(rows, element))
            if product is not None:
                return [product]
        return bind(equation, self.settled(operands))


def _can_delay(x: Any) -> bool:
    is_array = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
    return is_array and x.ndim > 0 and x.size > 0


def _call(evaluation: _Evaluation, equation: JaxprEqn, operands: list[Any]) -> Sequence[Any]:
    called: ClosedJaxpr = equation.params[_CALLED[equation.primitive.name]]
    return evaluation.run(called.jaxpr, called.consts, operands)


def _rematerialized(
    evaluation: _Evaluation, equation: JaxprEqn, operands: list[Any]
) -> Sequence[Any]:
    """Pending values are closed over: they are parameters, which the backward pass has anyway."""
    places = [i for i, x in enumerate(operands) if not isinstance(x, Pending)]

    def block(*arrays):
        values = list(operands)
        for place, array in zip(places, arrays):
            values[place] = array
        inner = evaluation.nested(next(filter(_can_delay, arrays), None))
        return inner.settled(inner.run(equation.params["jaxpr"], (), values))

    checkpointed = jax.checkpoint(
        block, policy=equation.params["policy"], prevent_cse=equation.params["prevent_cse"]
    )
    return checkpointed(*(operands[place] for place in places))


def _scan(evaluation: _Evaluation, equation: JaxprEqn, operands: list[Any]) -> Sequence[Any]:
    """Leaves that are scanned over are perturbed slice by slice, inside the body."""
    params = equation.params
    body: ClosedJaxpr = params["jaxpr"]
    first, last = _places_of_carry(equation)
    consts = _for_loop(evaluation, body.jaxpr, operands[:first], 0)
    carry = evaluation.settled(operands[first:last])
    scanned = [
        x if not isinstance(x, Pending) or _has_row_per_turn(x) else evaluation.settled([x])[0]
        for x in operands[last:]
    ]
    static = [_made_of_rows(x) for x in scanned]
    arrays = [x.rows if isinstance(x, Pending) else x for x in scanned]

    def turn(carry, slices):
        values = [
            like(x) if like is not None else x for like, x in zip(static, slices, strict=True)
        ]
        inner = evaluation.nested(next(filter(_can_delay, carry), None))
        results = inner.run(body.jaxpr, body.consts, [*consts, *carry, *values])
        results = inner.settled(results)
        return results[: len(carry)], results[len(carry) :]

    carry, stacked = jax.lax.scan(
        turn, carry, arrays, params["length"], params["reverse"], params["unroll"]
    )
    return [*carry, *stacked]


def _places_of_carry(equation: JaxprEqn) -> tuple[int, int]:
    """Where among a scan's operands its carry begins and ends; before it is what is closed over.

    From shapes: versions of JAX differ in the parameters that say so.
    """
    body = equation.params["jaxpr"].jaxpr

    def stacked(outside, inside):
        pairs = zip(outside, inside, strict=True)
        return sum(_rank(x) > _rank(part) for x, part in pairs)

    last = len(equation.invars) - stacked(equation.invars, body.invars)
    num_carry = len(equation.outvars) - stacked(equation.outvars, body.outvars)
    return last - num_carry, last


def _rank(var: Any) -> int:
    return len(var.aval.shape)


def _made_of_rows(x: Any) -> Callable[[Rows], Pending] | None:
    """What a pending value is made of again from a slice of its rows."""
    if not isinstance(x, Pending):
        return None
    return lambda rows: Pending(rows, x.casts)


def _has_row_per_turn(x: Pending) -> bool:
    """Whether slices along the first axis are rows: of a vector they are elements."""
    return x.rows.values.ndim > 1 and not x.moves


def _for_loop(evaluation: _Evaluation, body: Jaxpr, consts: Sequence[Any], first: int) -> list[Any]:
    """What a loop closes over: perturbed before it, unless the body reads rows or names it."""
    result = []
    for var, x in zip(body.invars[first:], consts):
        if isinstance(x, Pending) and not _may_be_perturbed_inside(body, var):
            (x,) = evaluation.settled([x])
        result.append(x)
    return result


def _may_be_perturbed_inside(body: Jaxpr, var: Any) -> bool:
    if var in body.outvars:
        return False
    for equation in body.eqns:
        for place, operand in enumerate(equation.invars):
            if operand is not var:
                continue
            if equation.primitive.name == "jit":
                called = equation.params["jaxpr"].jaxpr
                if not _may_be_perturbed_inside(called, called.invars[place]):
                    return False
            elif not takes_rows_only(equation, place) and not _is_for_each_turn(equation):
                return False
    return True


def _is_for_each_turn(equation: JaxprEqn) -> bool:
    return equation.primitive.name == "name" and equation.params["name"] == IN_EACH_TURN


def _while(evaluation: _Evaluation, equation: JaxprEqn, operands: list[Any]) -> Sequence[Any]:
    params = equation.params
    condition, body = params["cond_jaxpr"], params["body_jaxpr"]
    first, last = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    condition_consts = evaluation.settled(operands[:first])
    consts = _for_loop(evaluation, body.jaxpr, operands[first:last], 0)
    carry = evaluation.settled(operands[last:])

    def is_going_on(carry):
        arrays = [*condition_consts, *carry]
        inner = evaluation.nested()
        return inner.run(condition.jaxpr, condition.consts, arrays)[0]

    def turn(carry):
        inner = evaluation.nested(next(filter(_can_delay, carry), None))
        return inner.settled(inner.run(body.jaxpr, body.consts, [*consts, *carry]))

    return jax.lax.while_loop(is_going_on, turn, carry)


def _branches(evaluation: _Evaluation, equation: JaxprEqn, operands: list[Any]) -> Sequence[Any]:
    index, *values = operands

    def branch(closed: ClosedJaxpr):
        def run():
            inner = evaluation.nested()
            return inner.settled(inner.run(closed.jaxpr, closed.consts, values))

        return run

    return jax.lax.switch(index, [branch(closed) for closed in equation.params["branches"]])


_CALLED = {"jit": "jaxpr", "closed_call": "call_jaxpr"}
_HANDLERS = {
    **dict.fromkeys(_CALLED, _call),
    "cond": _branches,
    "remat2": _rematerialized,
    "scan": _scan,
    "while": _while,
}
