"""A loss of a batch, from one part of the batch at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from optax_lowbit.zo import checks
from optax_lowbit.zo.late_perturbation import IN_EACH_TURN

Loss = Callable[..., jax.Array]


def microbatched(loss_fn: Loss, number: int) -> Loss:
    """The mean of a loss over equal parts of its batch, evaluated one after the other.

    For zeroth-order steps this is all that gradient accumulation is: a mean of scalars, at one
    perturbation. It is that of the whole batch, if the loss is a mean over it. Each part draws the
    perturbation of a leaf again where it uses it, so none is held over the parts.

    **Memory.** That of the loss of one part, also where it is differentiated: each part is then
    computed again on the way back, as by :func:`jax.checkpoint`.

    Args:
      loss_fn: ``loss_fn(params, *args)`` gives a float of shape ``()``.
      number: How many parts. Part ``i`` has the rows ``i``, ``i + number``, ... of the first axis
        of each array in ``args``: so it is spread over devices as the batch is. Arrays without
        axes, a `jax.random.key` for instance, go to all parts as they are.

    Returns:
      A loss with the same arguments; float32. Make it once: `jax.jit` knows it by its identity.

    Raises:
      ValueError: If ``number`` is no int of at least 1; when called, if it does not divide a first
        axis, or no array has axes.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_lowbit import zo
      >>> def loss(w, x):
      ...     return jnp.mean((x @ w) ** 2)
      >>> w, x = jnp.array([1.0, 2.0]), jnp.arange(8.0).reshape(4, 2)
      >>> loss(w, x), zo.microbatched(loss, 2)(w, x)
      (Array(166., dtype=float32), Array(166., dtype=float32))
      >>> opt = zo.zo_sgd(1e-3)
      >>> step = jax.jit(opt.step, static_argnums=0)
      >>> w, state, info = step(zo.microbatched(loss, 2), w, opt.init(w, 0), x)
    """
    if type(number) is not int or number < 1:
        raise ValueError(f"number must be an int of at least 1, got {number!r}")

    def mean_loss(params: Any, *args: Any) -> jax.Array:
        arrays, treedef = jax.tree.flatten(args)
        parted = [_parted(x, number) if jnp.ndim(x) else x for x in arrays]
        if not any(map(jnp.ndim, arrays)):
            raise ValueError("args of a microbatched loss must have an array with a batch axis")

        @jax.checkpoint
        def part_loss(params, i):
            own = [
                jax.lax.dynamic_index_in_dim(x, i, 1, False) if jnp.ndim(x) else x for x in parted
            ]
            return checks.scalar_loss(loss_fn, treedef.unflatten(own), params)

        def turn(total, i):
            return total + part_loss(jax.tree.map(_in_each_turn, params), i)[None], None

        # Of one axis, so that what the loop has computed can delay what is drawn in it.
        total, _ = jax.lax.scan(turn, jnp.zeros(1), jnp.arange(number))
        return total[0] / jnp.float32(number)

    return mean_loss


def _parted(x: jax.Array, number: int) -> jax.Array:
    """``(size // number, number, ...)``: the batch as it lies in memory."""
    size = x.shape[0]
    if size % number:
        raise ValueError(f"number={number} parts must divide the batch, which has {size} rows")
    return jnp.reshape(x, (size // number, number, *x.shape[1:]))


def _in_each_turn(x: Any) -> Any:
    is_float = jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return checkpoint_name(x, IN_EACH_TURN) if is_float else x
