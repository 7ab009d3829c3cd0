"""AdEMAMix with its moments in few bits."""

from typing import Any

import jax
import optax

from optax_lowbit.moments.policy import Policy
from optax_lowbit.moments.presets import FIRST_MOMENT_4BIT, SECOND_MOMENT_4BIT, UNBIASED_8BIT
from optax_lowbit.moments.storage import Moment
from optax_lowbit.optimizers.descent import Mask, descend
from optax_lowbit.optimizers.leafwise import quantize_moments
from optax_lowbit.quant import QuantSpec


def ademamix4bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    b3: optax.ScalarOrSchedule = 0.9999,
    alpha: optax.ScalarOrSchedule = 5.0,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask = None,
    *,
    m1_spec: QuantSpec | None = FIRST_MOMENT_4BIT,
    m2_spec: QuantSpec | None = UNBIASED_8BIT,
    nu_spec: QuantSpec | None = SECOND_MOMENT_4BIT,
    policy: Policy | None = None,
    key: jax.Array | int | None = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""AdEMAMix with low-bit moments: :func:`optax.contrib.ademamix`, in a sixth of its memory.

    .. math::
      m_1 &= \beta_1 Q^{-1}(\bar m_1) + (1-\beta_1) g, \qquad
      m_2 = \beta_3 Q^{-1}(\bar m_2) + (1-\beta_3) g, \qquad
      v = \beta_2 Q^{-1}(\bar v) + (1-\beta_2) g^2 \\
      u &= (\hat m_1 + \alpha m_2) / \left(\sqrt{\hat v + \bar\varepsilon} + \varepsilon\right)

    and the three are quantized after the update is taken from them. The fast average and the second
    moment have 4 bits. The slow average has 8 and is rounded stochastically: a step changes it by
    ``1 - b3``, 1e-4, of a gradient, which rounding to nearest loses, so that it stands still.

    **Memory.** ``0.5 + 4/128``, ``1 + 4/256`` and ``0.5`` bytes an element, and one float32 for
    each row and column of ``v``: 2.048 on a 4096x4096 leaf, against 12 in float32.

    Args:
      learning_rate: A fixed learning rate or a schedule.
      b1, b2, b3, alpha, eps, eps_root, weight_decay, mask: As in :func:`optax.contrib.ademamix`.
      mu_dtype: Dtype of moments that are not quantized; None: float32, or wider if the parameter
        is. They keep it between steps, where Optax's become float32 in the first.
      m1_spec: How the fast average is stored; None: not quantized. Default: 4 bits, signed dynamic
        exponent, blocks of 128.
      m2_spec: How the slow average is stored; None: not quantized. Default: 8 bits, signed squares,
        blocks of 256, rounded stochastically.
      nu_spec: How the second moment is stored; None: not quantized. Default: 4 bits, linear without
        zero, rank-1.
      policy: As in :func:`scale_by_adam4bit`.
      key: For stochastic rounding, as in :func:`scale_by_adam4bit`.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`, whose core has an
      :class:`optax.contrib.ScaleByAdemamixState`. There is no kernel: steps are Optax's own, in
      tiles.

    Raises:
      TypeError, ValueError: If a spec or the policy is none, or a key is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_lowbit
      >>> state = jax.eval_shape(optax_lowbit.ademamix4bit(1e-3).init, jnp.ones((4096, 4096)))
      >>> moments = state[0].m1, state[0].m2, state[0].nu
      >>> f"{sum(moment.nbytes for moment in moments) / 4096**2:.3f} bytes a parameter"
      '2.048 bytes a parameter'

    References:
      Pagliardini et al, `The AdEMAMix Optimizer: Better, Faster, Older
      <https://arxiv.org/abs/2409.03137>`_, 2024; for the 4 bits Li et al, `Memory Efficient
      Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_, 2023, Algorithm 1.

    .. seealso:: :func:`adamw4bit`
    """
    moments = {
        "m1": Moment(m1_spec, dtype=mu_dtype),
        "m2": Moment(m2_spec, dtype=mu_dtype),
        "nu": Moment(nu_spec, nonnegative=True, dtype=mu_dtype),
    }
    inner = optax.contrib.scale_by_ademamix(b1, b2, b3, alpha, eps, eps_root)
    direction = quantize_moments(inner, moments, policy, key)
    return descend(direction, learning_rate, weight_decay, mask)
