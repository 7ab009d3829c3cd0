"""A step of any optax transform on a state that is kept in few bits: Algorithm 1 of the paper.

Where the update can be taken apart by leaf, one leaf at a time is dequantized, and one tile of it
where the step is elementwise; else the whole state is.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowbit.kernels.reference import stored_like
from optax_lowbit.kernels.steps import step_leaf
from optax_lowbit.moments.flax_variables import is_variable, unwrapped, wrapped_like
from optax_lowbit.moments.keys import fold_in_path, noise_key
from optax_lowbit.optimizers.any_init import counter_of, in_float32, moment_names
from optax_lowbit.optimizers.leaf_programs import LeafProgram, LeafPrograms, split_by_leaf
from optax_lowbit.optimizers.ownership import is_state_leaf, owners, slots
from optax_lowbit.quant import is_quantized
from optax_lowbit.quant.array import decode


def update_state(
    update: Callable[..., tuple[Any, Any]],
    updates: Any,
    state: Any,
    params: Any,
    extra_args: dict[str, Any],
    key: jax.Array | int | None,
) -> tuple[Any, Any]:
    """``update(updates, state, params, **extra_args)``, its state kept as it is stored.

    Args:
      update: Of an optax transform with support of extra arguments.
      updates: Gradients.
      state: The transform's state, with quantized leaves.
      params: Parameters, or None.
      extra_args: Arrays in them become arguments of the trace, all else is closed over.
      key: For stochastic rounding.
    """
    if not any(map(is_quantized, jax.tree.leaves(state, is_leaf=is_state_leaf))):
        with jax.numpy_dtype_promotion("standard"):
            return update(updates, state, params, **extra_args)
    call = _Call(update, updates, state, params, extra_args, key)
    with jax.numpy_dtype_promotion("standard"):
        programs = split_by_leaf(call.flat, call.abstract(), call.owners, call.heavy)
    results = _step_together(call) if programs is None else _step_leaves(call, programs)
    return call.wrapped(results[: call.grads], results[call.grads :])


class _Call:
    """One update, its trees flattened: gradients, state, parameters, extra arguments, in a row.

    Attributes:
      values: Everything, as it is stored.
      owners: The parameter that each of them belongs to, or None.
      heavy: Which of them are quantized.
      grads: How many gradients there are; the state follows.
      states: How many leaves the state has.
      names: Of each leaf of the state, its moment.
      keys: Of each gradient, its key.
    """

    def __init__(self, update, updates, state, params, extra_args, key):
        self._update = update
        paths_and_grads, self._grads_def = jax.tree_util.tree_flatten_with_path(
            updates, is_leaf=is_variable
        )
        self._grads = [grad for _, grad in paths_and_grads]
        self._state, self._state_def = jax.tree.flatten(state, is_leaf=is_state_leaf)
        flat_params, self._params_def = jax.tree.flatten(params, is_leaf=is_variable)
        self._extra, self._extra_def = jax.tree.flatten(extra_args)
        self._is_array = [isinstance(x, jax.Array) for x in self._extra]
        # Without what is closed over, but each array under its path.
        arrays = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else None, extra_args)
        self.values = [
            x if is_quantized(x) else unwrapped(x)
            for x in (*self._grads, *self._state, *flat_params, *jax.tree.leaves(arrays))
        ]
        self.grads, self.states, self.params = len(self._grads), len(self._state), len(flat_params)
        state_slots = slots(state, updates)
        self.owners = [
            *range(self.grads),
            *(slot.owner for slot in state_slots),
            *owners(params, updates),
            *owners(arrays, updates),
        ]
        self.heavy = [is_quantized(x) for x in self.values]
        self.names = moment_names(state_slots)
        counter = counter_of(state)
        # Without either nothing is rounded stochastically: init has seen to it.
        step_key = None if key is None or counter is None else noise_key(key, counter)
        self.keys = [fold_in_path(step_key, path) for path, _ in paths_and_grads]

    def abstract(self) -> list[Any]:
        """The arguments of :meth:`flat`."""
        return jax.eval_shape(lambda values: [as_float(x) for x in values], self.values)

    def flat(self, *arguments: Any) -> list[Any]:
        """The update, from floats to updates and leaves of the new state."""
        parts = iter(arguments)
        updates = self._grads_def.unflatten(itertools.islice(parts, self.grads))
        state = self._state_def.unflatten(itertools.islice(parts, self.states))
        params = self._params_def.unflatten(itertools.islice(parts, self.params))
        extra = [next(parts) if is_array else x for x, is_array in zip(self._extra, self._is_array)]
        with jax.numpy_dtype_promotion("standard"):
            new_updates, new_state = self._update(
                updates, state, params, **self._extra_def.unflatten(extra)
            )
        structure = jax.tree.structure(new_state)
        if structure != self._state_def:
            raise ValueError(
                "tx.update must give a state of the structure that tx.init gave, "
                f"{self._state_def}; got {structure}"
            )
        return jax.tree.leaves(new_updates) + jax.tree.leaves(new_state)

    def stored(self, output: int, new: Any, old: Any) -> Any:
        """Result number ``output`` of :meth:`flat`, in the way that ``old`` is stored."""
        new = jnp.asarray(new)
        if not is_quantized(old):
            return new.astype(old.dtype) if jnp.issubdtype(new.dtype, jnp.inexact) else new
        name = self.names[output - self.grads]
        fresh = stored_like(old, new, name, self.keys[self.owners[output]])
        # Codes that are decoded and encoded again are not always the same: a maximum may lie
        # between two codes. What a step left alone must not fade.
        is_same = jnp.all(new == decode(old))
        return jax.tree.map(functools.partial(jnp.where, is_same), old, fresh)

    def wrapped(self, new_updates: Sequence[Any], new_leaves: Sequence[Any]) -> tuple[Any, Any]:
        """Trees as they were given."""
        updates = [
            wrapped_like(grad, new.astype(unwrapped(grad).dtype))
            for grad, new in zip(self._grads, new_updates, strict=True)
        ]
        leaves = [
            new if is_quantized(new) else wrapped_like(old, new)
            for old, new in zip(self._state, new_leaves, strict=True)
        ]
        return self._grads_def.unflatten(updates), self._state_def.unflatten(leaves)


def as_float(x: Any) -> Any:
    """A value as the transform sees it."""
    return decode(x) if is_quantized(x) else in_float32(x)


def _step_together(call: _Call) -> list[Any]:
    """All leaves at once."""
    results = call.flat(*map(as_float, call.values))
    return [call.stored(output, new, call.values[output]) for output, new in enumerate(results)]


def _step_leaves(call: _Call, programs: LeafPrograms) -> list[Any]:
    """One leaf after the other."""
    shared, values = programs.shared([as_float(call.values[i]) for i in programs.shared_inputs])
    results = {
        output: call.stored(output, value, call.values[output])
        for output, value in zip(programs.shared_outputs, values)
    }
    for owner, program in programs.leaves.items():
        indices = {*program.inputs, *program.outputs}
        values = {index: call.values[index] for index in indices}
        step = _step_in_tiles if _is_tileable(call, owner, program) else _step_whole
        step = functools.partial(step, call, owner, program, shared)
        is_low_bit = any(call.heavy[index] for index in indices)
        # Gradients of single examples are not of the shape of the update.
        has_place = program.output_shapes == [values[i].shape for i in program.outputs]
        results |= (
            _alone(step, values, program.outputs) if is_low_bit and has_place else step(values)
        )
    return [results[output] for output in range(len(results))]


def _alone(
    step: Callable[[dict[int, Any]], dict[int, Any]],
    values: dict[int, Any],
    written: Sequence[int],
) -> dict[int, Any]:
    """``step(values)``, which gives new values of those ``written``, in a loop of one turn.

    XLA steps leaves in an order of its own, and holds what it has dequantized of all of them at
    once. What a loop needs is gone when it ends. That there is one turn, and that what is only read
    is the same in all of them, is hidden from the compiler, which would move work out of the loop.
    """
    read_only = {index: value for index, value in values.items() if index not in written}

    def body(turn, old):
        hidden, _ = jax.lax.optimization_barrier((read_only, turn))
        return step({**hidden, **old})

    turns = jax.lax.optimization_barrier(jnp.int32(1))
    return jax.lax.fori_loop(0, turns, body, {index: values[index] for index in written})


def _step_whole(
    call: _Call,
    owner: int,
    program: LeafProgram,
    shared: dict[Any, Any],
    values: dict[int, Any],
) -> dict[int, Any]:
    del owner
    new = program.run([as_float(values[i]) for i in program.inputs], shared)
    return {
        output: call.stored(output, value, values[output])
        for output, value in zip(program.outputs, new)
    }


def _is_tileable(call: _Call, owner: int, program: LeafProgram) -> bool:
    """Whether pieces of the leaf can be stepped, its moments being written where they are read.

    Whether a step left a moment as it was is seen by the whole leaf only.
    """
    written = [output for output in program.outputs if output >= call.grads]
    quantized = [index for index in program.inputs if call.heavy[index]]
    return (
        program.is_elementwise
        and not program.may_keep
        and [output for output in program.outputs if output < call.grads] == [owner]
        and bool(quantized)
        and set(quantized) <= set(written)
        and all(call.values[index].shape == program.shape for index in (*written, *program.inputs))
    )


def _step_in_tiles(
    call: _Call,
    owner: int,
    program: LeafProgram,
    shared: dict[Any, Any],
    values: dict[int, Any],
) -> dict[int, Any]:
    """:func:`step_leaf` with the leaf's program as the step."""
    written = {call.names[output - call.grads]: output for output in program.outputs[1:]}
    read_only = [i for i in program.inputs if i != owner and i not in written.values()]

    def step(grad, moments, constants):
        known = {owner: grad, **{written[name]: x for name, x in moments.items()}}
        known |= dict(zip(read_only, map(in_float32, constants)))
        update, *new = program.run([known[index] for index in program.inputs], shared)
        return update, dict(zip(written, new))

    moments = {name: values[output] for name, output in written.items()}
    constants = [values[index] for index in read_only]
    update, new = step_leaf(
        step, None, "reference", None, values[owner], moments, call.keys[owner], constants
    )
    return {owner: update, **{written[name]: x for name, x in new.items()}}
