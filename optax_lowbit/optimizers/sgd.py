"""Stochastic gradient descent with momentum kept in 4 or 8 bits."""

from typing import Any, NamedTuple

import jax
import optax

from optax_lowbit.kernels.backends import Backend
from optax_lowbit.kernels.steps import FusedMomentum
from optax_lowbit.moments.policy import Policy
from optax_lowbit.moments.presets import FIRST_MOMENT_4BIT, FIRST_MOMENT_8BIT
from optax_lowbit.moments.storage import Moment
from optax_lowbit.optimizers.descent import descend
from optax_lowbit.optimizers.leafwise import counted, quantize_moments
from optax_lowbit.quant import QuantSpec


class Trace4bitState(NamedTuple):
    """State of :func:`trace4bit`."""

    count: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32; numbers the draws of random rounding.
    trace: optax.Updates


def trace4bit(
    decay: jax.typing.ArrayLike,
    nesterov: bool = False,
    accumulator_dtype: Any | None = None,
    *,
    trace_spec: QuantSpec | None = FIRST_MOMENT_4BIT,
    policy: Policy | None = None,
    key: jax.Array | int | None = None,
    backend: Backend = "auto",
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum, kept in 4 bits: :func:`optax.trace`.

    .. math::
      t_k = g_k + \mu\, Q^{-1}(\bar t_{k-1}), \qquad \bar t_k = Q(t_k)

    The update is :math:`t_k`, or :math:`g_k + \mu t_k` with Nesterov's, before it is quantized.
    **Memory.** ``0.5 + 4/128`` bytes an element, 0.531, against 4 in float32.

    Args:
      decay: Decay rate :math:`\mu` of the trace.
      nesterov: Whether to use Nesterov momentum.
      accumulator_dtype: Dtype of traces that are not quantized; None: float32, or wider if the
        parameter is.
      trace_spec: How the trace is stored; None: not quantized. Default: 4 bits, signed dynamic
        exponent, blocks of 128.
      policy, key, backend: As in :func:`scale_by_adam4bit`.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError, ValueError: If a spec or the policy is none, or a key is missing.

    Examples:
      >>> import jax.numpy as jnp, optax_lowbit
      >>> state = optax_lowbit.trace4bit(0.9).init(jnp.ones((128, 256)))
      >>> state.trace.nbytes
      17408

    References:
      Li et al, `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_,
      2023, Algorithm 2.
    """
    moments = {"trace": Moment(trace_spec, dtype=accumulator_dtype)}
    inner = counted(optax.trace(decay, nesterov), Trace4bitState)
    fused = FusedMomentum(decay, nesterov)
    return quantize_moments(inner, moments, policy, key, fused, backend)


def sgd4bit(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any | None = None,
    *,
    trace_spec: QuantSpec | None = FIRST_MOMENT_4BIT,
    policy: Policy | None = None,
    key: jax.Array | int | None = None,
    backend: Backend = "auto",
) -> optax.GradientTransformationExtraArgs:
    """SGD with 4-bit momentum: :func:`optax.sgd`, in an eighth of its memory.

    Args:
      learning_rate: A fixed learning rate or a schedule.
      momentum: Decay rate of the momentum; None: no momentum, and no state.
      nesterov, accumulator_dtype: As in :func:`optax.sgd`.
      trace_spec, policy, key, backend: As in :func:`trace4bit`.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_lowbit
      >>> params = jnp.full((128, 128), 0.5)
      >>> tx = optax_lowbit.sgd4bit(0.1, momentum=0.9)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> f"{optax.apply_updates(params, updates)[0, 0]:.2f}"
      '0.45'

    References:
      Li et al, `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_,
      2023, Algorithm 2. Weight decay, coupled there, is `optax.add_decayed_weights` before this.
    """
    if momentum is None:
        return descend(optax.identity(), learning_rate)
    direction = trace4bit(
        momentum,
        nesterov,
        accumulator_dtype,
        trace_spec=trace_spec,
        policy=policy,
        key=key,
        backend=backend,
    )  # fmt: skip
    return descend(direction, learning_rate)


def sgd8bit(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any | None = None,
    *,
    trace_spec: QuantSpec | None = FIRST_MOMENT_8BIT,
    policy: Policy | None = None,
    key: jax.Array | int | None = None,
    backend: Backend = "auto",
) -> optax.GradientTransformationExtraArgs:
    """SGD with 8-bit momentum: :func:`optax.sgd`, in a quarter of its memory.

    :func:`sgd4bit` with another default: dynamic exponent in blocks of 256, 1.016 bytes an element.

    Args:
      learning_rate: A fixed learning rate or a schedule.
      momentum, nesterov, accumulator_dtype: As in :func:`sgd4bit`.
      trace_spec, policy, key, backend: As in :func:`trace4bit`.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Examples:
      >>> import jax.numpy as jnp, optax_lowbit
      >>> state = optax_lowbit.sgd8bit(0.1, momentum=0.9).init(jnp.ones((128, 256)))
      >>> state[0].trace.nbytes
      33280

    References:
      Dettmers et al, `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2022.
    """
    return sgd4bit(
        learning_rate,
        momentum,
        nesterov,
        accumulator_dtype,
        trace_spec=trace_spec,
        policy=policy,
        key=key,
        backend=backend,
    )
