"""Adam and AdamW with 4-bit moments."""

import jax
import optax

from optax_lowbit.kernels.backends import Backend
from optax_lowbit.kernels.steps import FusedAdam
from optax_lowbit.moments.policy import Policy
from optax_lowbit.moments.presets import (
    FIRST_MOMENT_4BIT,
    SECOND_MOMENT_4BIT,
)
from optax_lowbit.moments.storage import Moment
from optax_lowbit.optimizers.descent import Mask, descend
from optax_lowbit.optimizers.leafwise import quantize_moments
from optax_lowbit.quant import QuantSpec


def scale_by_adam4bit(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    mu_spec: QuantSpec | None = FIRST_MOMENT_4BIT,
    nu_spec: QuantSpec | None = SECOND_MOMENT_4BIT,
    policy: Policy | None = None,
    key: jax.Array | int | None = None,
    backend: Backend = "auto",
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by Adam, with both moments kept in 4 bits.

    With :math:`Q` quantization and :math:`Q^{-1}` its inverse, a step is that of
    :func:`optax.scale_by_adam` on dequantized moments, in float32:

    .. math::
      m_t &= \beta_1 Q^{-1}(\bar m_{t-1}) + (1-\beta_1) g_t, \qquad
      v_t = \beta_2 Q^{-1}(\bar v_{t-1}) + (1-\beta_2) g_t^2 \\
      u_t &= \hat m_t / \left(\sqrt{\hat v_t + \bar\varepsilon} + \varepsilon\right), \qquad
      \bar m_t = Q(m_t), \quad \bar v_t = Q(v_t)

    so the update comes from the new moments before they are quantized. Large leaves are processed
    in tiles, and never have their moments in float32 as a whole.

    **Memory.** ``0.5 + 4/128`` bytes an element for the first moment, ``0.5`` and one float32 for
    each row and each column for the second: 1.033 on a 4096x4096 leaf, against 8 in float32.

    Args:
      b1: Decay rate of the first moment.
      b2: Decay rate of the second moment.
      eps: Added to the denominator outside of the square root.
      eps_root: Added inside of the square root.
      mu_dtype: Dtype of first moments that are not quantized; None: float32, or wider if the
        parameter is.
      nesterov: Whether to use Nesterov momentum.
      mu_spec: How the first moment is stored; None: not quantized. Default: 4 bits, signed dynamic
        exponent, blocks of 128.
      nu_spec: How the second moment is stored; None: not quantized. Default: 4 bits, linear without
        zero, rank-1 (blocks of 128 for a vector). A table with zero lets small second moments
        become 0, and their updates explode.
      policy: Which leaves are quantized at all, and exceptions; None: those of more than 4096
        elements.
      key: A `jax.random.key` or a seed; needed if a spec rounds stochastically.
      backend: ``"auto"``: the platform's kernel where it takes a leaf, else the reference, which is
        Optax's own step in tiles; or that of one of ``"reference"``, ``"cpu"``, ``"pallas_tpu"``,
        ``"pallas_gpu"`` and ``"interpret"`` (the TPU's, interpreted). :func:`describe` tells.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`. Its state is an
      :class:`optax.ScaleByAdamState` whose ``mu`` and ``nu`` have
      :class:`~optax_lowbit.QuantizedArray` leaves.

    Raises:
      TypeError, ValueError: If a spec or the policy is none, or a key is missing; at init, if a
        backend was named that cannot take a leaf.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_lowbit
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), optax_lowbit.scale_by_adam4bit(),
      ...                  optax.scale_by_learning_rate(1e-3))
      >>> params = {"w": jnp.ones((128, 256)), "b": jnp.zeros(256)}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> state[1].mu["w"].codes.dtype, state[1].mu["b"].dtype
      (dtype('uint8'), dtype('float32'))

    References:
      Li et al, `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_,
      2023, Algorithms 1 and 3. Differs in that blocks run along the last axis instead of the
      flattened leaf, rank-1 scales of stacked matrices are their own, zero scales divide safely,
      and scalars work.

    .. seealso:: :func:`adamw4bit`, :func:`scale_by_adam8bit`
    """
    moments = {
        "mu": Moment(mu_spec, dtype=mu_dtype),
        "nu": Moment(nu_spec, nonnegative=True),
    }
    inner = optax.scale_by_adam(b1, b2, eps, eps_root, nesterov=nesterov)
    fused = FusedAdam(b1, b2, eps, eps_root, nesterov)
    return quantize_moments(inner, moments, policy, key, fused, backend)


def adam4bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    mu_spec: QuantSpec | None = FIRST_MOMENT_4BIT,
    nu_spec: QuantSpec | None = SECOND_MOMENT_4BIT,
    policy: Policy | None = None,
    key: jax.Array | int | None = None,
    backend: Backend = "auto",
) -> optax.GradientTransformationExtraArgs:
    """Adam with 4-bit moments: :func:`optax.adam`, in an eighth of its memory.

    Args:
      learning_rate: A fixed learning rate or a schedule.
      b1, b2, eps, eps_root, mu_dtype, nesterov: As in :func:`optax.adam`.
      mu_spec, nu_spec, policy, key, backend: As in :func:`scale_by_adam4bit`.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_lowbit
      >>> params = jnp.full((128, 128), 0.5)
      >>> tx = optax_lowbit.adam4bit(learning_rate=0.01)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(2 * params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> f"{params[0, 0]:.2f}"
      '0.47'

    References:
      Li et al, `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_,
      2023, Algorithm 3.
    """
    return descend(
        scale_by_adam4bit(
            b1, b2, eps, eps_root, mu_dtype,
            nesterov=nesterov, mu_spec=mu_spec, nu_spec=nu_spec,
            policy=policy, key=key, backend=backend,
        ),
        learning_rate,
    )  # fmt: skip


def adamw4bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: jax.typing.ArrayLike = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = False,
    mu_spec: QuantSpec | None = FIRST_MOMENT_4BIT,
    nu_spec: QuantSpec | None = SECOND_MOMENT_4BIT,
    policy: Policy | None = None,
    key: jax.Array | int | None = None,
    backend: Backend = "auto",
) -> optax.GradientTransformationExtraArgs:
    """AdamW with 4-bit moments: :func:`optax.adamw`, in an eighth of its memory.

    Weight decay is added to the update before it is scaled by the learning rate, as in optax;
    ``p (1 - lr wd) - lr u``, the paper's form, is the same number.

    Args:
      learning_rate: A fixed learning rate or a schedule.
      b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov: As in :func:`optax.adamw`.
      mu_spec, nu_spec, policy, key, backend: As in :func:`scale_by_adam4bit`.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_lowbit
      >>> params = {"kernel": jnp.ones((4096, 4096)), "bias": jnp.zeros(4096)}
      >>> state = jax.eval_shape(optax_lowbit.adamw4bit(1e-3).init, params)
      >>> f"{state[0].mu['kernel'].nbytes + state[0].nu['kernel'].nbytes:,}"
      '17,334,272'

    References:
      Li et al, `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_,
      2023, Algorithm 3.

    .. seealso:: :func:`factor4bit`, :func:`adamw8bit`
    """
    return descend(
        scale_by_adam4bit(
            b1, b2, eps, eps_root, mu_dtype,
            nesterov=nesterov, mu_spec=mu_spec, nu_spec=nu_spec,
            policy=policy, key=key, backend=backend,
        ),
        learning_rate,
        weight_decay,
        mask,
    )  # fmt: skip
