"""Lion with its momentum kept in 4 or 8 bits."""

from typing import Any

import jax
import optax

from optax_lowbit.moments.policy import Policy
from optax_lowbit.moments.presets import FIRST_MOMENT_8BIT, SLOW_MOMENT_4BIT
from optax_lowbit.moments.storage import Moment
from optax_lowbit.optimizers.descent import Mask, descend
from optax_lowbit.optimizers.leafwise import quantize_moments
from optax_lowbit.quant import QuantSpec


def lion4bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    mu_dtype: Any | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Mask = None,
    *,
    mu_spec: QuantSpec | None = SLOW_MOMENT_4BIT,
    policy: Policy | None = None,
    key: jax.Array | int | None = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion with 4-bit momentum: :func:`optax.lion`, in an eighth of its memory.

    .. math::
      m = Q^{-1}(\bar m_{t-1}), \qquad
      u_t = \mathrm{sign}(\beta_1 m + (1-\beta_1) g_t), \qquad
      \bar m_t = Q(\beta_2 m + (1-\beta_2) g_t)

    **Memory.** ``0.5 + 4/128`` bytes an element, 0.531, against 4 in float32.

    A step changes the momentum by ``1 - b2``, 1%, of a gradient. Rounding 4 bits to nearest loses
    much of that, so they are rounded stochastically. The table on the page "Any optimizer" has what
    either costs.

    Args:
      learning_rate: A fixed learning rate or a schedule.
      b1, b2, mu_dtype, weight_decay, mask: As in :func:`optax.lion`.
      mu_spec: How the momentum is stored; None: not quantized. Default: 4 bits, signed dynamic
        exponent, blocks of 128, rounded stochastically.
      policy, key: As in :func:`scale_by_adam4bit`.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`, whose core has an
      :class:`optax.ScaleByLionState`. There is no kernel: steps are Optax's own, in tiles.

    Raises:
      TypeError, ValueError: If a spec or the policy is none, or a key is missing.

    Examples:
      >>> import jax.numpy as jnp, optax_lowbit
      >>> state = optax_lowbit.lion4bit(1e-4).init(jnp.ones((128, 256)))
      >>> type(state[0]).__name__, state[0].mu.nbytes
      ('ScaleByLionState', 17408)

    References:
      Chen et al, `Symbolic Discovery of Optimization Algorithms
      <https://arxiv.org/abs/2302.06675>`_, 2023; for the 4 bits Li et al, `Memory Efficient
      Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_, 2023, Algorithm 1.

    .. seealso:: :func:`lion8bit`
    """
    moments = {"mu": Moment(mu_spec, dtype=mu_dtype)}
    direction = quantize_moments(optax.scale_by_lion(b1, b2), moments, policy, key)
    return descend(direction, learning_rate, weight_decay, mask)


def lion8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    mu_dtype: Any | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Mask = None,
    *,
    mu_spec: QuantSpec | None = FIRST_MOMENT_8BIT,
    policy: Policy | None = None,
    key: jax.Array | int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lion with 8-bit momentum: :func:`optax.lion`, in a quarter of its memory.

    :func:`lion4bit` with another default: dynamic exponent in blocks of 256, 1.016 bytes an
    element.

    Args:
      learning_rate: A fixed learning rate or a schedule.
      b1, b2, mu_dtype, weight_decay, mask: As in :func:`optax.lion`.
      mu_spec, policy, key: As in :func:`lion4bit`.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Examples:
      >>> import jax.numpy as jnp, optax_lowbit
      >>> state = optax_lowbit.lion8bit(1e-4).init(jnp.ones((128, 256)))
      >>> state[0].mu.nbytes
      33280

    References:
      Chen et al, `Symbolic Discovery of Optimization Algorithms
      <https://arxiv.org/abs/2302.06675>`_, 2023; for the 8 bits Dettmers et al, `8-bit Optimizers
      via Block-wise Quantization <https://arxiv.org/abs/2110.02861>`_, 2022.
    """
    return lion4bit(
        learning_rate, b1, b2, mu_dtype, weight_decay, mask,
        mu_spec=mu_spec, policy=policy, key=key,
    )  # fmt: skip
