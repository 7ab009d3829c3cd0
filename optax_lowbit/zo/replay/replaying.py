"""From the base of a run and its log to its parameters."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowbit.kernels.meshes import on_own_mesh
from optax_lowbit.kernels.reference import name_hash
from optax_lowbit.zo.directions import Trainable
from optax_lowbit.zo.noise import Gaussian, Rademacher
from optax_lowbit.zo.optimizer import ZeroOrderOptimizer
from optax_lowbit.zo.replay import runs
from optax_lowbit.zo.replay.files import Log, read
from optax_lowbit.zo.replay.rebuilding import optimizer_of

# Steps that are fused into one pass over a leaf, if there are so many to take that the time to
# compile them is worth it.
FUSED, WORTH_FUSING = 4, 256


def apply(
    params: Any, log: Log | Any, opt: runs.Optimizer | None = None, *, steps: int | None = None
) -> Any:
    """The parameters that a run led to, bit for bit.

    What a step writes follows from the record, the key and the leaf: it does not depend on how many
    steps are taken at once, on the mesh or on the number of processes. That holds for
    :class:`~optax_lowbit.zo.Rademacher` directions, whose products are exact, on one kind of
    device; values of :class:`~optax_lowbit.zo.Gaussian` are computed by whatever the compiler makes
    of a logarithm, so give such a log digests.

    **Memory.** The result, and one leaf. **Time.** A leaf goes through many steps before the next
    one does, four of them in each pass, where directions and moments of a leaf depend on nothing
    but the leaf; programs are shared by leaves of one shape.

    Args:
      params: What the run began with, on any mesh.
      log: A :class:`Log`, or its path.
      opt: The optimizer of the run. What the records have in them may differ: learning rate, eps,
        estimator, clip, and how large a weight decay is. None: the log says it, unless the update
        has code of its own in it (a schedule of probes, a rule or a noise that are not of this
        library), or is that of :func:`~optax_lowbit.zo.inject_hyperparams`.
      steps: How many steps to take; all, by default.

    Returns:
      Parameters like ``params``, laid out as these are.

    Raises:
      TypeError: If ``opt`` is no optimizer of :mod:`optax_lowbit.zo`.
      ValueError: If the log is of another base, key or optimizer, or damaged; if it does not say
        the optimizer and none is given; if there are not so many steps; if the parameters do not
        meet a digest.
      FileNotFoundError: If there is no log.

    Examples:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> from optax_lowbit import zo
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.zolog"
      >>> opt, base = zo.zo_sgd(1e-2), {"w": jnp.ones(3)}
      >>> params, state = base, opt.init(base, key=0)
      >>> with zo.replay.Writer(path, opt, params, state) as log:
      ...     params, state, info = opt.step(lambda p: jnp.sum(p["w"] ** 2), params, state)
      ...     log.append(params, state, info)
      >>> bool(jnp.array_equal(zo.replay.apply(base, path)["w"], params["w"]))
      True
    """
    log = _log(log)
    runs.check_leaves(log, params)
    if opt is None:
        opt = optimizer_of(log)
    runs.plain(opt)
    state = opt.init(params, jnp.asarray(log.run["key"], jnp.uint32))
    return resume(params, state, log, opt, steps=steps)[0]


def resume(
    params: Any,
    state: runs.State,
    log: Log | Any,
    opt: runs.Optimizer,
    *,
    steps: int | None = None,
) -> tuple[Any, runs.State]:
    """Parameters and state after the steps that a log has, to go on from.

    Args:
      params: What the run began with, or of a later step, say from a checkpoint.
      state: Of the same step.
      log, opt: As for :func:`apply`.
      steps: How many steps, from the first one, to be at; all, by default.

    Returns:
      Parameters and state. A run that goes on from a step before the last needs a log of its own:
      another base, or a copy of the log that is cut off there.

    Raises:
      ValueError: As :func:`apply` does; or if ``state`` is beyond ``steps``.

    Examples:
      Back to the first of two steps; :class:`Writer` has an example of a run that goes on.

      >>> import pathlib, tempfile
      >>> import jax, jax.numpy as jnp
      >>> from optax_lowbit import zo
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.zolog"
      >>> opt, base = zo.zo_sgd(1e-2), {"w": jnp.ones(3)}
      >>> step = jax.jit(opt.step, static_argnums=0)
      >>> params, state = base, opt.init(base, key=0)
      >>> with zo.replay.Writer(path, opt, params, state) as log:
      ...     for _ in range(2):
      ...         params, state, info = step(lambda p: jnp.sum(p["w"] ** 2), params, state)
      ...         log.append(params, state, info)
      >>> params, state = zo.replay.resume(base, opt.init(base, key=0), path, opt, steps=1)
      >>> int(state.count)
      1
    """
    runs.plain(opt)
    log = _log(log)
    position, end = int(state.count), log.steps if steps is None else steps
    if not position <= end <= log.steps:
        raise ValueError(
            f"steps must be between {position}, where the state is, and {log.steps}, which the log "
            f"has; got {steps}"
        )
    runs.check_same(log, runs.facts(opt, params, state), is_base=position == 0)
    _check_digest(log, opt, params, position)
    records, advanced = jnp.asarray(log.records), _advancing(opt, end - position)
    for stop in sorted(stop for stop in {end, *log.digests} if position < stop <= end):
        with on_own_mesh(params):
            params, state = advanced(params, state, records, jnp.int32(stop))
        _check_digest(log, opt, params, stop)
    return params, state


def _check_digest(log: Log, opt: runs.Optimizer, params: Any, step: int) -> None:
    if step in log.digests and runs.digest(opt, params) != log.digests[step]:
        noise = type(runs.plain(opt).noise).__name__
        raise ValueError(
            f"the parameters after step {step} are not those of the run: either others were given, "
            f"or this device does not draw the same {noise} directions"
        )


def _log(log: Log | Any) -> Log:
    return log if isinstance(log, Log) else read(pathlib.Path(log))


def _advancing(opt: runs.Optimizer, steps: int) -> Callable[..., tuple[Any, runs.State]]:
    """``(params, state, records, stop) -> (params, state)`` after ``stop`` steps.

    All calls together take so many ``steps``.
    """
    if type(opt) is ZeroOrderOptimizer and type(opt.noise) in (Rademacher, Gaussian):
        return _leaf_by_leaf(opt, FUSED if steps >= WORTH_FUSING else 1)
    return jax.jit(functools.partial(_steps, opt.apply, 1))


def _leaf_by_leaf(opt: ZeroOrderOptimizer, fused: int) -> Callable[..., tuple[Any, runs.State]]:
    """The same, each leaf through all steps before the next one."""
    one_leaf = jax.jit(functools.partial(_one_leaf, opt, fused), static_argnums=0)

    def advanced(params, state, records, stop):
        ours = opt.split(params)
        leaves, states = [], []
        for number, (path, leaf) in enumerate(zip(ours.paths, ours.leaves)):
            moments = {name: (column[number],) for name, column in state.moments.items()}
            leaf, own = one_leaf(
                opt.decays(path, leaf), name_hash(path), leaf, state._replace(moments=moments),
                records, stop,
            )  # fmt: skip
            leaves.append(leaf)
            states.append(own)
        moments = {name: tuple(own.moments[name][0] for own in states) for name in state.moments}
        return ours.tree(leaves), states[0]._replace(moments=moments)

    return advanced


def _one_leaf(opt, fused, is_decayed, path, leaf, state, records, stop):
    """A leaf, and its state; its path is given by its hash, so that leaves share a program."""

    def apply(leaf, state, record):
        ours = Trainable((leaf,), (path,), (None,), (), (True,), jax.tree.structure(0))
        (leaf,), state = opt.apply_to_leaves(ours, [is_decayed], state, record)
        return leaf, state

    return _steps(apply, fused, leaf, state, records, stop)


def _steps(apply, fused, params, state, records, stop):
    """Takes steps until there are ``stop``, so many of them in each turn of a loop."""

    def step(carry):
        params, state = carry
        record = jax.lax.dynamic_index_in_dim(records, state.count, keepdims=False)
        return apply(params, state, record)

    def steps(_, carry):
        for _ in range(fused):
            carry = step(carry)
        return carry

    turns, rest = jnp.divmod(stop - state.count, fused)
    carry = jax.lax.fori_loop(0, turns, steps, (params, state))
    return carry if fused == 1 else jax.lax.fori_loop(0, rest, lambda _, c: step(c), carry)
