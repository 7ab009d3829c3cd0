"""From a direction to an optimizer: weight decay, the learning rate, and both in one pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_lowbit.kernels.parameters import Descent
from optax_lowbit.moments.flax_variables import is_variable, unwrapped
from optax_lowbit.moments.keys import fold_in_path
from optax_lowbit.optimizers.leafwise import LowBitTransformation
from optax_lowbit.quant import random_bits

Mask = Any | Callable[[optax.Params], Any] | None


class FusibleOptimizer(optax.GradientTransformationExtraArgs):
    """An optax optimizer that :func:`fused_apply` knows how to run in one pass.

    Attributes:
      apply: ``(grads, state, params, key) -> (params, state)``.
    """

    apply: Callable[..., tuple[Any, Any]]


def descend(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Any | None = None,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """``direction``, then decoupled weight decay unless it is None, then the learning rate."""
    decay = [] if weight_decay is None else [optax.add_decayed_weights(weight_decay, mask)]
    rate = optax.scale_by_learning_rate(learning_rate)
    chain = optax.with_extra_args_support(optax.chain(direction, *decay, rate))
    if not isinstance(direction, LowBitTransformation):
        return chain

    def apply(grads, state, params, key):
        direction_state, *decay_state, rate_state = state
        negative_rate: Any
        negative_rate, rate_state = rate.update(jnp.float32(1), rate_state)
        decay_now = weight_decay
        if callable(weight_decay):
            count = optax.tree.get(decay_state, "count")
            decay_now = weight_decay(count)
            decay_state = optax.tree.set(decay_state, count=optax.safe_increment(count))
        decays = _decays(decay_now, mask, params)
        descents = [
            Descent(p, -negative_rate, decay, leaf_key)
            for (p, leaf_key), decay in zip(_with_keys(params, key), decays)
        ]
        params, direction_state = direction.step_all(grads, direction_state, descents)
        return params, (direction_state, *decay_state, rate_state)

    optimizer = FusibleOptimizer(*chain)
    optimizer.apply = apply
    return optimizer


def _with_keys(
    params: Any, key: jax.Array | int | None
) -> list[tuple[jax.Array, random_bits.Key | None]]:
    """The leaves, each with the key that is to round it stochastically."""
    words = None if key is None else random_bits.key_words(key)
    pairs = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable):
        param = unwrapped(leaf)
        is_rounded = param.dtype == jnp.bfloat16
        pairs.append((param, fold_in_path(words, path) if is_rounded else None))
    return pairs


def _decays(weight_decay: Any, mask: Mask, params: Any) -> list[jax.Array]:
    """The weight decay of each leaf."""
    full = jnp.asarray(0 if weight_decay is None else weight_decay, jnp.float32)
    mask = mask(params) if callable(mask) else mask

    def of(is_decayed, subtree):
        decay = jnp.where(is_decayed, full, 0)
        return jax.tree.map(lambda _: decay, subtree, is_leaf=is_variable)

    decays = of(True, params) if mask is None else jax.tree.map(of, mask, params)
    return jax.tree.leaves(decays)


def fused_apply(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    state: optax.OptState,
    params: Any,
    *,
    key: jax.Array | int | None = None,
) -> tuple[Any, optax.OptState]:
    r"""One step of an optimizer of this library that writes the parameters in the same pass.

    What ``updates, state = tx.update(grads, state, params)`` and
    ``params = optax.apply_updates(params, updates)`` do, without the update in between: half the
    bytes. States are the same to the bit; parameters are, up to the rounding of two sums (and, if
    gradients are in bfloat16, of the update).

    .. math::
      p_t = p_{t-1} - \eta\, (u_t + \lambda p_{t-1})

    Args:
      tx: From :func:`adamw4bit`, :func:`factor4bit`, :func:`sgd4bit` with momentum, or another
        alias of this library; not wrapped or chained.
      grads: Gradients.
      state: From ``tx.init``, or the last step. Donate it, and the parameters.
      params: Parameters, of any float dtype; the sum is in float32.
      key: To round bfloat16 parameters stochastically, as :func:`apply_updates_stochastic` does,
        and with its bits: a `jax.random.key` or a seed, another one in every step. Give gradients
        in float32 then. None rounds to nearest.

    Returns:
      The new parameters and the new state.

    Raises:
      ValueError: If ``tx`` is anything else, gradients and parameters are not trees of one
        structure, or ``key`` is of another generator than Threefry.
      TypeError: If ``key`` is no key.

    Examples:
      >>> import functools, jax, jax.numpy as jnp, optax_lowbit
      >>> tx = optax_lowbit.adamw4bit(1e-2)
      >>> params = jnp.ones((128, 128))
      >>> state = tx.init(params)
      >>> step = jax.jit(functools.partial(optax_lowbit.fused_apply, tx), donate_argnums=(1, 2))
      >>> params, state = step(jnp.ones((128, 128)), state, params)
      >>> f"{params[0, 0]:.4f}"
      '0.9900'
    """
    if not isinstance(tx, FusibleOptimizer):
        raise ValueError(
            "tx must be what an optimizer of this library, such as adamw4bit or sgd4bit with "
            "momentum, returns, neither wrapped nor chained: in optax.chain(...) it is stepped by "
            f"tx.update and optax.apply_updates; got {type(tx).__name__}"
        )
    structures = [jax.tree.structure(tree, is_leaf=is_variable) for tree in (grads, params)]
    if structures[0] != structures[1]:
        raise ValueError(
            "grads and params must be trees of one structure, got "
            f"{structures[0]} and {structures[1]}"
        )
    return tx.apply(grads, state, params, key)
