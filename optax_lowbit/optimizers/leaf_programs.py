"""Takes the update of a whole tree apart into one program for each parameter.

An optax transform sees all leaves at once, so a state kept in few bits, or on the host, would have
to be there in float32, or on the device, all at once. Most transforms do to each leaf what depends
on that leaf alone, and on a few scalars: counters, schedules, the norm of all gradients. That is
read from the jaxpr of the update, and each leaf's equations can then be run on their own; where
they are elementwise, on a piece of the leaf.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from optax_lowbit.moments.equations import bind, read

_CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat2": "jaxpr",
}  # fmt: skip
_ELEMENTWISE = frozenset(
    "abs add add_any and atan2 cbrt ceil clamp convert_element_type copy cos cosh div eq erf exp "
    "exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg "
    "nextafter not or pow reduce_precision rem round rsqrt select_n shift_left "
    "shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh xor".split()
)


@dataclasses.dataclass(frozen=True)
class LeafProgram:
    """What an update does to the arrays of one parameter.

    Attributes:
      inputs: Indices of the function's arguments that belong to the parameter and are read.
      outputs: Indices of the function's results that it computes.
      shape: The parameter's shape.
      is_elementwise: Whether every result is of ``shape``, and each of its elements depends on the
        elements of the arguments in the same place: then :meth:`run` takes pieces as well.
      may_keep: Whether a result may be an argument as it was, by a choice for the whole leaf.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    shape: tuple[int, ...]
    is_elementwise: bool
    may_keep: bool
    _equations: tuple[JaxprEqn, ...]
    _invars: tuple[Var, ...]
    _outvars: tuple[Any, ...]

    @property
    def output_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the results, in the order of ``outputs``."""
        return [_shape(var) for var in self._outvars]

    def run(self, arguments: Sequence[Any], shared: dict[Var, Any]) -> list[Any]:
        """The results, in the order of ``outputs``.

        Args:
          arguments: Those of ``inputs``, whole or, if ``is_elementwise``, pieces of one shape.
          shared: What :meth:`LeafPrograms.shared` gave.
        """
        environment = {**shared, **dict(zip(self._invars, arguments, strict=True))}
        piece = arguments[0].shape if self.is_elementwise and arguments else self.shape
        for equation in self._equations:
            operands = [read(environment, var) for var in equation.invars]
            if piece != self.shape and _is_broadcast_of_scalar(equation):
                results = [jnp.broadcast_to(operands[0], piece)]
            else:
                results = bind(equation, operands)
            environment.update(zip(equation.outvars, results))
        return [read(environment, var) for var in self._outvars]


@dataclasses.dataclass(frozen=True)
class LeafPrograms:
    """A function of a tree, taken apart by :func:`split_by_leaf`.

    Attributes:
      leaves: One program for each owner, in their order.
      shared_inputs: Indices of the arguments that :meth:`shared` needs.
      shared_outputs: Indices of the results that belong to no leaf, counters for example.
    """

    leaves: dict[int, LeafProgram]
    shared_inputs: tuple[int, ...]
    shared_outputs: tuple[int, ...]
    _equations: tuple[JaxprEqn, ...]
    _invars: tuple[Var, ...]
    _outvars: tuple[Any, ...]
    _constants: dict[Var, Any]

    def shared(self, arguments: Sequence[Any]) -> tuple[dict[Var, Any], list[Any]]:
        """What all leaves' programs need, and the results of ``shared_outputs``."""
        environment = {**self._constants, **dict(zip(self._invars, arguments, strict=True))}
        _run(self._equations, environment)
        return environment, [read(environment, var) for var in self._outvars]


def split_by_leaf(
    function: Callable[..., Sequence[Any]],
    arguments: Sequence[Any],
    owners: Sequence[int | None],
    heavy: Sequence[bool],
) -> LeafPrograms | None:
    """Takes ``function`` apart by the owners of its arguments.

    Args:
      function: From arrays to a list of arrays.
      arguments: Arrays, or `jax.ShapeDtypeStruct` in their place.
      owners: Of each argument, the number of the parameter that it belongs to, or None.
      heavy: Of each argument, whether it may be used by its owner's program only.

    Returns:
      The programs; None if what is shared depends on a heavy argument, in which case the function
      is not leaf by leaf (a trust region over all parameters, a quasi-Newton step).
    """
    closed = jax.make_jaxpr(_inlined(function, arguments))(*arguments)
    jaxpr = closed.jaxpr
    # A scalar of one leaf, such as the norm of its gradient, is best left to the leaf, unless it is
    # all that keeps the leaf's program from being elementwise.
    slicer, sharing = (
        _Slicer(jaxpr, *_labelled(jaxpr, owners, kept)) for kept in ([True] * len(owners), heavy)
    )
    outputs, fewer_outputs = slicer.outputs_by_owner(), sharing.outputs_by_owner()
    programs, needed = {}, []
    for owner in outputs:
        shape = arguments[owners.index(owner)].shape
        program, shared_vars = slicer.program(owner, outputs[owner], shape)
        if not program.is_elementwise and owner in fewer_outputs:
            other, other_vars = sharing.program(owner, fewer_outputs[owner], shape)
            if other.is_elementwise:
                program, shared_vars = other, other_vars
        programs[owner] = program
        needed += shared_vars
    owned = {index for program in programs.values() for index in program.outputs}
    shared_outputs = [index for index in range(len(jaxpr.outvars)) if index not in owned]
    needed += [jaxpr.outvars[index] for index in shared_outputs]
    equations, inputs = slicer.closure(needed, lambda var: True)
    if any(heavy[index] for index in inputs):
        return None
    return LeafPrograms(
        programs,
        tuple(inputs),
        tuple(shared_outputs),
        tuple(equations),
        tuple(jaxpr.invars[index] for index in inputs),
        tuple(jaxpr.outvars[index] for index in shared_outputs),
        dict(zip(jaxpr.constvars, closed.consts)),
    )


def _labelled(
    jaxpr: Jaxpr, owners: Sequence[int | None], kept: Sequence[bool]
) -> tuple[dict[Var, int | None], dict[Var, JaxprEqn]]:
    """The owner of each variable, and the equation that it comes from.

    What comes from one leaf is that leaf's, but for scalars that need none of the arguments that
    are ``kept`` for their owners.
    """
    labels = dict(zip(jaxpr.invars, owners, strict=True))
    is_kept = dict(zip(jaxpr.invars, kept, strict=True))
    producers: dict[Var, JaxprEqn] = {}
    for equation in jaxpr.eqns:
        read = _variables(equation.invars)
        among = {labels.get(var) for var in read} - {None}
        of_kept = any(is_kept.get(var, False) for var in read)
        is_reduction = any(_shape(var) for var in read)
        for var in equation.outvars:
            is_shared = len(among) != 1 or (is_reduction and not of_kept and not _shape(var))
            labels[var] = None if is_shared else next(iter(among))
            is_kept[var] = of_kept
            producers[var] = equation
    return labels, producers


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of a function, computed one by one, with only what each of them needs.

    Made by :func:`results_of`.
    """

    _slicer: "_Slicer"
    _constants: dict[Var, Any]

    def fill(self, index: int, arguments: Sequence[Any]) -> jax.Array | None:
        """The scalar that result ``index`` is full of, if it is made so; else None."""
        var = self._slicer.jaxpr.outvars[index]
        equation = None if isinstance(var, Literal) else self._slicer.producers.get(var)
        if equation is None or not _is_broadcast_of_scalar(equation):
            return None
        return self._value(equation.invars[0], arguments)

    def compute(self, index: int, arguments: Sequence[Any]) -> jax.Array:
        """Result ``index``."""
        return self._value(self._slicer.jaxpr.outvars[index], arguments)

    def _value(self, var: Any, arguments: Sequence[Any]) -> jax.Array:
        environment = {**self._constants, **dict(zip(self._slicer.jaxpr.invars, arguments))}
        _run(self._slicer.closure([var], lambda var: True)[0], environment)
        return jnp.asarray(read(environment, var))


def results_of(function: Callable[..., Sequence[Any]], arguments: Sequence[Any]) -> Results:
    """Traces ``function``, from arrays to a list of arrays."""
    closed = jax.make_jaxpr(_inlined(function, arguments))(*arguments)
    producers = {var: equation for equation in closed.jaxpr.eqns for var in equation.outvars}
    constants = dict(zip(closed.jaxpr.constvars, closed.consts))
    return Results(_Slicer(closed.jaxpr, {}, producers), constants)


@dataclasses.dataclass(frozen=True)
class _Slicer:
    """Cuts pieces out of a jaxpr whose variables are labelled with their owners."""

    jaxpr: Jaxpr
    labels: dict[Var, int | None]
    producers: dict[Var, JaxprEqn]

    def outputs_by_owner(self) -> dict[int, list[int]]:
        """Indices of each owner's results."""
        owned: dict[int, list[int]] = {}
        for index, var in enumerate(self.jaxpr.outvars):
            label = None if isinstance(var, Literal) else self.labels.get(var)
            if label is not None:
                owned.setdefault(label, []).append(index)
        return owned

    def closure(
        self, targets: Iterable[Any], within: Callable[[Var], bool]
    ) -> tuple[list[JaxprEqn], list[int]]:
        """The equations that ``targets`` need, and the indices of arguments that these need."""
        seen: set[Var] = set()
        pending = _variables(targets)
        while pending:
            var = pending.pop()
            if var not in seen and within(var):
                seen.add(var)
                if var in self.producers:
                    pending += _variables(self.producers[var].invars)
        equations = [e for e in self.jaxpr.eqns if not seen.isdisjoint(e.outvars)]
        inputs = [index for index, var in enumerate(self.jaxpr.invars) if var in seen]
        return equations, inputs

    def program(
        self, owner: int, outputs: list[int], shape: tuple[int, ...]
    ) -> tuple[LeafProgram, list[Var]]:
        """The program of one leaf, and the shared variables that it reads."""

        def is_own(var):
            return self.labels.get(var) == owner or self._is_broadcast_scalar(var)

        outvars = tuple(self.jaxpr.outvars[index] for index in outputs)
        equations, inputs = self.closure(outvars, is_own)
        read = _variables(var for equation in equations for var in equation.invars)
        shared = [var for var in read if not is_own(var)]
        is_elementwise = (
            all(_is_elementwise(equation, shape) for equation in equations)
            and all(_shape(var) == shape for var in outvars)
            and all(_shape(var) == () for var in shared)
        )
        program = LeafProgram(
            tuple(inputs),
            tuple(outputs),
            shape,
            is_elementwise,
            any(self._may_keep(var) for var in outvars),
            tuple(equations),
            tuple(self.jaxpr.invars[index] for index in inputs),
            outvars,
        )
        return program, shared

    def _may_keep(self, var: Any) -> bool:
        equation = None if isinstance(var, Literal) else self.producers.get(var)
        if equation is None:
            return True
        choices = _variables(equation.invars[1:])
        return equation.primitive.name == "select_n" and any(
            choice not in self.producers for choice in choices
        )

    def _is_broadcast_scalar(self, var: Var) -> bool:
        """Whether it is a shared scalar in a leaf's shape: a piece of it is made where needed."""
        equation = self.producers.get(var)
        return equation is not None and _is_broadcast_of_scalar(equation)


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _is_broadcast_of_scalar(equation: JaxprEqn) -> bool:
    return equation.primitive.name == "broadcast_in_dim" and not _shape(equation.invars[0])


def _is_elementwise(equation: JaxprEqn, shape: tuple[int, ...]) -> bool:
    if any(_shape(var) != shape for var in equation.outvars):
        return False
    if _is_broadcast_of_scalar(equation):
        return True
    operands = {_shape(var) for var in equation.invars}
    return equation.primitive.name in _ELEMENTWISE and operands <= {shape, ()}


def _run(equations: Iterable[JaxprEqn], environment: dict[Var, Any]) -> None:
    for equation in equations:
        operands = [read(environment, var) for var in equation.invars]
        environment.update(zip(equation.outvars, bind(equation, operands)))


def _variables(vars: Iterable[Any]) -> list[Var]:
    return [var for var in vars if not isinstance(var, Literal)]


def _inlined(function: Callable[..., Sequence[Any]], arguments: Sequence[Any]):
    """``function`` without calls of jitted functions, which would hide whose arrays they take."""
    closed = jax.make_jaxpr(function)(*arguments)
    return functools.partial(_run_inlined, closed)


def _run_inlined(closed: ClosedJaxpr, *arguments: Any) -> list[Any]:
    environment = dict(zip(closed.jaxpr.constvars, closed.consts))
    environment.update(zip(closed.jaxpr.invars, arguments, strict=True))
    for equation in closed.jaxpr.eqns:
        operands = [read(environment, var) for var in equation.invars]
        if equation.primitive.name in _CALLS:
            called = equation.params[_CALLS[equation.primitive.name]]
            results = _run_inlined(called, *operands)
        else:
            results = bind(equation, operands)
        environment.update(zip(equation.outvars, results))
    return [read(environment, var) for var in closed.jaxpr.outvars]
