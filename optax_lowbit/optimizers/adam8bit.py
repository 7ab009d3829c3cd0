"""Adam and AdamW with 8-bit moments."""

import jax
import optax

from optax_lowbit.kernels.backends import Backend
from optax_lowbit.moments.policy import Policy
from optax_lowbit.moments.presets import FIRST_MOMENT_8BIT, SECOND_MOMENT_8BIT
from optax_lowbit.optimizers.adam4bit import scale_by_adam4bit
from optax_lowbit.optimizers.descent import Mask, descend
from optax_lowbit.quant import QuantSpec


def scale_by_adam8bit(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    mu_spec: QuantSpec | None = FIRST_MOMENT_8BIT,
    nu_spec: QuantSpec | None = SECOND_MOMENT_8BIT,
    policy: Policy | None = None,
    key: jax.Array | int | None = None,
    backend: Backend = "auto",
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by Adam, with both moments kept in 8 bits.

    :func:`scale_by_adam4bit` with other defaults: both moments in 8 bits, dynamic exponent, blocks
    of 256. **Memory.** ``2 (1 + 4/256)`` bytes an element, 2.03, against 8 in float32.

    Args:
      b1, b2, eps, eps_root, mu_dtype, nesterov: As in :func:`optax.scale_by_adam`.
      mu_spec, nu_spec, policy, key, backend: As in :func:`scale_by_adam4bit`.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Examples:
      >>> import jax.numpy as jnp, optax_lowbit
      >>> state = optax_lowbit.scale_by_adam8bit().init(jnp.ones((128, 256)))
      >>> state.mu.nbytes, state.nu.nbytes
      (33280, 33280)

    References:
      Dettmers et al, `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2022, Section 2. Differs from bitsandbytes: blocks
      run along the last axis and new moments are rounded to the nearest value without moving
      those whose sign is lost.
    """
    return scale_by_adam4bit(
        b1, b2, eps, eps_root, mu_dtype,
        nesterov=nesterov, mu_spec=mu_spec, nu_spec=nu_spec,
        policy=policy, key=key, backend=backend,
    )  # fmt: skip


def adam8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    mu_spec: QuantSpec | None = FIRST_MOMENT_8BIT,
    nu_spec: QuantSpec | None = SECOND_MOMENT_8BIT,
    policy: Policy | None = None,
    key: jax.Array | int | None = None,
    backend: Backend = "auto",
) -> optax.GradientTransformationExtraArgs:
    """Adam with 8-bit moments: :func:`optax.adam`, in a quarter of its memory.

    Args:
      learning_rate: A fixed learning rate or a schedule.
      b1, b2, eps, eps_root, mu_dtype, nesterov: As in :func:`optax.adam`.
      mu_spec, nu_spec, policy, key, backend: As in :func:`scale_by_adam4bit`.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Examples:
      >>> import jax.numpy as jnp, optax_lowbit
      >>> state = optax_lowbit.adam8bit(1e-3).init(jnp.ones((128, 256)))
      >>> state[0].mu.spec.bits
      8

    References:
      Dettmers et al, `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2022.
    """
    return descend(
        scale_by_adam8bit(
            b1, b2, eps, eps_root, mu_dtype,
            nesterov=nesterov, mu_spec=mu_spec, nu_spec=nu_spec,
            policy=policy, key=key, backend=backend,
        ),
        learning_rate,
    )  # fmt: skip


def adamw8bit(
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
    mu_spec: QuantSpec | None = FIRST_MOMENT_8BIT,
    nu_spec: QuantSpec | None = SECOND_MOMENT_8BIT,
    policy: Policy | None = None,
    key: jax.Array | int | None = None,
    backend: Backend = "auto",
) -> optax.GradientTransformationExtraArgs:
    """AdamW with 8-bit moments: :func:`optax.adamw`, in a quarter of its memory.

    Args:
      learning_rate: A fixed learning rate or a schedule.
      b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov: As in :func:`optax.adamw`.
      mu_spec, nu_spec, policy, key, backend: As in :func:`scale_by_adam4bit`.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Examples:
      >>> import jax.numpy as jnp, optax_lowbit
      >>> state = optax_lowbit.adamw8bit(1e-3).init(jnp.ones((128, 256)))
      >>> state[0].nu.spec.codebook
      'dynamic_exponent'

    References:
      Dettmers et al, `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2022.
    """
    return descend(
        scale_by_adam8bit(
            b1, b2, eps, eps_root, mu_dtype,
            nesterov=nesterov, mu_spec=mu_spec, nu_spec=nu_spec,
            policy=policy, key=key, backend=backend,
        ),
        learning_rate,
        weight_decay,
        mask,
    )  # fmt: skip
