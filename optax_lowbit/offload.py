"""Optimizer state that lives in the host's memory and visits the device one leaf at a time.

The update is taken apart into one program for each parameter, see
:mod:`optax_lowbit.optimizers.leaf_programs`. Each is the body of a loop of its own, which is gone
through once; that the compiler can't know. XLA starts copies between host and device as early as it
likes, across optimization barriers too, but does not move them out of a loop: so the order of the
loops bounds what is on the device, and within a body copies and arithmetic still overlap.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import optax

from optax_lowbit.moments.flax_variables import unwrapped
from optax_lowbit.optimizers.descent import FusibleOptimizer
from optax_lowbit.optimizers.leaf_programs import LeafProgram, LeafPrograms, split_by_leaf
from optax_lowbit.optimizers.leafwise import checked_transform
from optax_lowbit.optimizers.ownership import is_state_leaf, owners

# The memory kind that `jax.memory.Space.Host` stands for.
_HOST_KIND = "pinned_host"
# Of an update's arguments.
_GRADS, _STATE, _PARAMS = range(3)


def offload(
    tx: optax.GradientTransformation, *, min_size: int = 4096, memory_kind: str = _HOST_KIND
) -> optax.GradientTransformationExtraArgs:
    """``tx``, with its state in the host's memory: a paged optimizer.

    The arrays of a parameter's state come to the device just before its own update and go back
    after it. While one leaf is updated, the next one's state is on its way: at most two leaves'
    states are on the device at once, however many leaves there are. What is computed does not
    change. Counters, and arrays of ``min_size`` elements or fewer, stay on the device.

    **Memory.** The state's bytes on the host; on the device, the states of two leaves.

    **Transfers.** The state's bytes in each direction, in each step: 8 bytes a parameter for
    :func:`optax.adamw`, about 1 for :func:`adamw4bit`.

    Args:
      tx: A transform that is leaf by leaf: what it does to one parameter depends on the state of no
        other, except counters. Most of optax is, also in :func:`optax.chain` or
        :func:`optax.masked`, with the norm of all gradients or not. :class:`optax.MultiSteps` and
        the like are not: they go outside, ``optax.MultiSteps(offload(tx), 4)``. An optimizer that
        :func:`fused_apply` takes it takes offloaded, too.
      min_size: Arrays of the state of this many elements or fewer stay on the device.
      memory_kind: The memory to keep the state in: ``"pinned_host"``, the only one that compiled
        programs copy from and to.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with a state like that of ``tx``. Arrays on
      the host are of memory kind ``"pinned_host"``, on the devices' hosts, sharded as on the
      devices. Donate parameters (or gradients) and state together, and return them in that order:
      JAX pairs donated arguments with results by shape and dtype alone, the first with the first,
      and a result that is paired with an array on the host is written there.

    Raises:
      TypeError: If ``tx`` is no transform.
      ValueError: If ``min_size`` is negative or no int, or ``memory_kind`` is another. At init, or
        at the first update if ``tx`` needs extra arguments: if it is not leaf by leaf. The message
        names the arrays that mix.

    Warns:
      UserWarning: At init, if the devices have no such memory. The state stays on the device then.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_lowbit
      >>> tx = optax_lowbit.offload(optax_lowbit.adamw4bit(1e-3))
      >>> params = {"w": jnp.ones((256, 256)), "b": jnp.zeros(256)}
      >>> state = tx.init(params)
      >>> state[0].mu["w"].codes.sharding.memory_kind, state[0].mu["b"].sharding.memory_kind
      ('pinned_host', 'device')
      >>> update = jax.jit(tx.update, donate_argnums=(0, 1))
      >>> updates, state = update(params, state, {"w": jnp.ones((256, 256)), "b": jnp.zeros(256)})
      >>> updates["w"].sharding.memory_kind, state[0].mu["w"].codes.sharding.memory_kind
      ('device', 'pinned_host')

    References:
      Dettmers et al, `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, Section 3, "Paged
      Optimizers". Differs in that the state is always on the host, and moved by the compiled
      program, where CUDA's unified memory moves it when the device runs out.
    """
    if type(min_size) is not int or min_size < 0:
        raise ValueError(f"min_size must be an int of at least 0, got {min_size!r}")
    if memory_kind != _HOST_KIND:
        raise ValueError(f"memory_kind must be {_HOST_KIND!r}, got {memory_kind!r}")
    update = checked_transform(tx).update

    def init_fn(params):
        state = tx.init(params)
        if not _has_host_memory():
            warnings.warn(
                f"offload leaves the state on the device: devices of platform "
                f"{jax.default_backend()!r} have no memory of kind {_HOST_KIND!r}",
                stacklevel=2,
            )
            return state
        abstract = jax.eval_shape(lambda *trees: trees, params, state, params)
        try:
            _Call(update, abstract, _GRADS, min_size).split()
        except TypeError:
            pass  # It can't be traced without extra arguments: the first update tells.
        return _placed(state, _is_paged(state, params, min_size))

    def update_fn(updates, state, params=None, **extra_args):
        def step(updates, state, params):
            return update(updates, state, params, **extra_args)

        if not _has_host_memory():
            return step(updates, state, params)
        return _Call(step, (updates, state, params), _GRADS, min_size).run()

    if not isinstance(tx, FusibleOptimizer):
        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    def apply(grads, state, params, key):
        def step(grads, state, params):
            return tx.apply(grads, state, params, key)

        if not _has_host_memory():
            return step(grads, state, params)
        return _Call(step, (grads, state, params), _PARAMS, min_size).run()

    optimizer = FusibleOptimizer(init_fn, update_fn)
    optimizer.apply = apply
    return optimizer


def _has_host_memory() -> bool:
    memories = jax.local_devices()[0].addressable_memories()
    return _HOST_KIND in {memory.kind for memory in memories}


def _to_host(x: Any) -> jax.Array:
    return jax.device_put(x, jax.memory.Space.Host)


def _to_device(x: Any) -> jax.Array:
    return jax.device_put(x, jax.memory.Space.Device)


def _placed(state: Any, is_paged: Sequence[bool]) -> Any:
    """The state with paged arrays on the host, and the others where an update leaves them."""
    leaves, treedef = jax.tree.flatten(state)
    leaves = [_to_host(x) if paged else x for x, paged in zip(leaves, is_paged, strict=True)]
    on_host: list[Any] = list(itertools.compress(leaves, is_paged))
    if on_host and not any(isinstance(x, jax.core.Tracer) for x in leaves):
        # Arrays on the host are committed to their devices, and so is all that is computed with
        # them: a counter that is not would be of another type in the second update.
        beside = on_host[0].sharding.with_memory_kind("device")
        if isinstance(beside, jax.sharding.NamedSharding):
            beside = jax.sharding.NamedSharding(beside.mesh, jax.sharding.PartitionSpec())
        leaves = [x if x.committed else jax.device_put(x, beside) for x in leaves]
    return treedef.unflatten(leaves)


def _array_owners(tree: Any, params: Any) -> list[int | None]:
    """For each array of ``tree``, the index of its parameter, or None."""
    leaves = jax.tree.leaves(tree, is_leaf=is_state_leaf)
    pairs = zip(leaves, owners(tree, params), strict=True)
    return [owner for leaf, owner in pairs for _ in jax.tree.leaves(leaf)]


def _is_paged(state: Any, params: Any, min_size: int) -> list[bool]:
    """For each array of ``state``, whether it lives on the host."""
    sizes = [math.prod(unwrapped(x).shape) for x in jax.tree.leaves(state)]
    pairs = zip(sizes, _array_owners(state, params), strict=True)
    return [owner is not None and size > min_size for size, owner in pairs]


class _Call:
    """One call of ``step(grads, state, params)``, as a function from arrays to arrays.

    Args:
      step: Gives a tree like ``trees[written]``, which it is written over, and the new state.
      trees: Its arguments.
      written: Index of one of them.
      min_size: As in :func:`offload`.
    """

    def __init__(
        self,
        step: Callable[..., tuple[Any, Any]],
        trees: tuple[Any, Any, Any],
        written: int,
        min_size: int,
    ):
        self._trees = trees
        leaves, treedef = jax.tree.flatten(trees)
        ends = itertools.accumulate((len(jax.tree.leaves(tree)) for tree in trees), initial=0)
        of_tree = [range(*pair) for pair in itertools.pairwise(ends)]
        self._first_of_state = of_tree[_STATE].start
        # Of each result, the argument that it takes the place of.
        self._replaced = [*of_tree[written], *of_tree[_STATE]]
        paged = _is_paged(trees[_STATE], trees[_GRADS], min_size)
        self._paged = {i for i, is_paged in zip(of_tree[_STATE], paged) if is_paged}
        self._values = [unwrapped(x) for x in leaves]
        self._function = lambda arrays: step(*treedef.unflatten(arrays))
        # All of them on the device.
        self._types = jax.eval_shape(lambda xs: [_to_device(x) for x in xs], self._values)

    def split(self) -> LeafPrograms:
        """The programs of the leaves.

        Raises:
          ValueError: If an array of the state that is to be paged is needed by more than one leaf.
        """
        owners = [owner for tree in self._trees for owner in _array_owners(tree, self._trees[0])]
        programs = split_by_leaf(
            lambda *arrays: jax.tree.leaves(self._function(arrays)),
            self._types,
            owners,
            heavy=[False] * len(owners),  # It would say that some mix, not which.
        )
        assert programs is not None
        mixed = sorted(self._paged.intersection(programs.shared_inputs))
        if mixed:
            paths = jax.tree_util.tree_leaves_with_path(self._trees[_STATE])
            names = [jax.tree_util.keystr(paths[i - self._first_of_state][0]) for i in mixed]
            raise ValueError(
                "tx can't be offloaded: what it does to one parameter depends on the state of "
                f"others, in {', '.join(names[:4])}{', ...' if names[4:] else ''}, so all of that "
                "must be on the device at once; in a chain, offload the other transforms alone"
            )
        return programs

    def run(self) -> tuple[Any, Any]:
        """What the step returns."""
        programs = self.split()
        types, treedef = jax.tree.flatten(jax.eval_shape(self._function, self._types))
        for i in self._paged:  # They may be of a state that is not offloaded yet.
            self._values[i] = _to_host(self._values[i])
        environment, shared = programs.shared([self._values[i] for i in programs.shared_inputs])
        results = dict(zip(programs.shared_outputs, shared))
        visitors = []
        for program in programs.leaves.values():
            if self._paged.isdisjoint(program.inputs):
                arrays = [self._values[i] for i in program.inputs]
                results |= zip(program.outputs, program.run(arrays, environment))
            else:
                visitors.append(program)
        for index, result in results.items():
            if self._replaced[index] in self._paged:
                results[index] = _to_host(result)
        if visitors:
            results |= self._run_in_turn(visitors, environment, types)
        return treedef.unflatten(results[index] for index in range(len(types)))

    def _run_in_turn(
        self, programs: Sequence[LeafProgram], environment: dict[Any, Any], types: Sequence[Any]
    ) -> dict[int, jax.Array]:
        """The results of programs with paged arguments, by index."""
        results: dict[int, jax.Array] = {}
        here: dict[int, jax.Array] = {}
        arriving = [[i for i in program.inputs if i in self._paged] for program in programs]
        is_traced = any(isinstance(value, jax.core.Tracer) for value in self._values)
        turn: Any = jnp.zeros((), jnp.int32)
        for program, coming in zip([_NOTHING, *programs], [*arriving, []]):

            def visit(arguments, program=program, coming=coming):
                outputs = program.run([arguments[i] for i in program.inputs], environment)
                by_index = dict(zip(program.outputs, outputs))
                left = {k: _to_host(x) for k, x in by_index.items() if self._leaves(k)}
                return by_index, left, {i: _to_device(self._values[i]) for i in coming}

            arguments = {i: here.get(i, self._values[i]) for i in program.inputs}
            if is_traced:
                buffers = self._buffers(program, arguments, coming, types, turn)
                turn, (outputs, left, here) = _in_loop(visit, arguments, *buffers, turn)
            else:
                outputs, left, here = visit(arguments)
            results |= outputs | left
        return results

    def _buffers(self, program, arguments, coming, types, turn):
        """Where a loop writes what the visit of one leaf gives.

        Returns:
          The argument that each result is written over, by index, if it is of the same type; the
          initial values of results, of those that go to the host, and of arrays that come.
        """
        replaced = {k: self._replaced[k] for k in program.outputs}
        over = {k: i for k, i in replaced.items() if i in arguments and types[k] == self._types[i]}
        outputs = {
            k: arguments[over[k]] if k in over else _filled(types[k], turn + k) for k in replaced
        }
        left = {k: self._values[i] for k, i in replaced.items() if self._leaves(k)}
        return over, (outputs, left, {i: _filled(self._types[i], turn + i) for i in coming})

    def _leaves(self, index: int) -> bool:
        """Whether a result goes to the host."""
        return self._replaced[index] in self._paged


# Of the turn in which the first leaf's state comes.
_NOTHING = LeafProgram((), (), (), False, False, (), (), ())


def _in_loop(
    visit: Callable[[dict[int, Any]], Any],
    arguments: dict[int, Any],
    over: dict[int, int],
    buffers: Any,
    turn: jax.Array,
) -> tuple[jax.Array, Any]:
    """The next turn, and ``visit(arguments)`` in the body of a loop that is gone through once."""
    kept = {i: x for i, x in arguments.items() if i not in over.values()}

    def body(carry):
        turn, (outputs, *_) = carry
        # Or what depends on parameters alone would be computed for all leaves before the loops.
        turn, here = jax.lax.optimization_barrier((turn, kept))
        return turn + 1, visit(here | {i: outputs[k] for k, i in over.items()})

    # The compiler can't know it, or it would do without the loop.
    end = jax.lax.optimization_barrier(turn + 1)
    return jax.lax.while_loop(lambda carry: carry[0] < end, body, (turn, buffers))


def _filled(like: Any, turn: jax.Array) -> jax.Array:
    """A buffer on the device, made in this turn; its value is of no use."""
    # A constant's would be made when the program starts.
    return jax.lax.full_like(like, turn.astype(like.dtype))
