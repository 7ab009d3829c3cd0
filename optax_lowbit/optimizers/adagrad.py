"""Adagrad with its sum of squares in 8 bits."""

from typing import NamedTuple

import jax
import optax

from optax_lowbit.moments.policy import Policy
from optax_lowbit.moments.presets import SECOND_MOMENT_8BIT
from optax_lowbit.moments.storage import Moment
from optax_lowbit.optimizers.descent import descend
from optax_lowbit.optimizers.leafwise import counted, quantize_moments
from optax_lowbit.quant import QuantSpec


class ScaleByRssWithCountState(NamedTuple):
    """State of :func:`adagrad8bit` with a key."""

    count: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32; numbers the draws of random rounding.
    sum_of_squares: optax.Updates


def adagrad8bit(
    learning_rate: optax.ScalarOrSchedule,
    initial_accumulator_value: jax.typing.ArrayLike = 0.1,
    eps: jax.typing.ArrayLike = 1e-7,
    *,
    sum_of_squares_spec: QuantSpec | None = SECOND_MOMENT_8BIT,
    policy: Policy | None = None,
    key: jax.Array | int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adagrad with an 8-bit sum of squares: :func:`optax.adagrad`, in a quarter of its memory.

    .. math::
      s_t = Q^{-1}(\bar s_{t-1}) + g_t^2, \qquad u_t = g_t / \sqrt{s_t + \varepsilon}, \qquad
      \bar s_t = Q(s_t)

    **Memory.** ``1 + 4/256`` bytes an element, 1.016, against 4 in float32.

    A sum that grows by less than half a gap of the code table, 0.35% of the largest value of its
    block, does not grow when it is rounded to nearest: after some hundreds of steps the step size
    stops falling. Stochastic rounding keeps the growth on average: see the second example.

    Args:
      learning_rate: A fixed learning rate or a schedule.
      initial_accumulator_value: What sums start at; quantized, too.
      eps: As in :func:`optax.adagrad`.
      sum_of_squares_spec: How the sums are stored; None: not quantized. Default: 8 bits, unsigned
        dynamic exponent, blocks of 256.
      policy, key: As in :func:`scale_by_adam4bit`.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`, whose core has an
      :class:`optax.ScaleByRssState`; with a key a :class:`ScaleByRssWithCountState`, as the draws
      of every step must be others. There is no kernel: steps are Optax's own, in tiles.

    Raises:
      TypeError, ValueError: If a spec or the policy is none, or a key is missing.

    Examples:
      >>> import dataclasses, jax.numpy as jnp, optax_lowbit
      >>> state = optax_lowbit.adagrad8bit(1e-2).init(jnp.ones((128, 256)))
      >>> optax_lowbit.dequantize(state[0].sum_of_squares)[0, 0].round(3)
      Array(0.1, dtype=float32)

      Rounded stochastically:

      >>> spec = state[0].sum_of_squares.spec
      >>> tx = optax_lowbit.adagrad8bit(
      ...     1e-2, sum_of_squares_spec=dataclasses.replace(spec, rounding="stochastic"), key=0)

    References:
      Duchi et al, `Adaptive Subgradient Methods for Online Learning and Stochastic Optimization
      <https://jmlr.org/papers/v12/duchi11a.html>`_, 2011; for the 8 bits Dettmers et al, `8-bit
      Optimizers via Block-wise Quantization <https://arxiv.org/abs/2110.02861>`_, 2022.
    """
    inner = optax.scale_by_rss(initial_accumulator_value, eps)
    if key is not None:
        inner = counted(inner, ScaleByRssWithCountState)
    moment = Moment(sum_of_squares_spec, nonnegative=True, initial=initial_accumulator_value)
    direction = quantize_moments(inner, {"sum_of_squares": moment}, policy, key)
    return descend(direction, learning_rate)
