"""RMSProp with its moments, and its momentum, in 8 bits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_lowbit.moments.policy import Policy
from optax_lowbit.moments.presets import FIRST_MOMENT_8BIT, SECOND_MOMENT_8BIT
from optax_lowbit.moments.storage import Moment
from optax_lowbit.optimizers.leafwise import counted, quantize_moments
from optax_lowbit.optimizers.sgd import trace4bit
from optax_lowbit.quant import QuantSpec

# Of the squared mean: how much less than the mean of squares it is, at least. Above the rounding of
# float32, below that of 8 bits.
_LEAST_VARIANCE = 2.0**-16


def rmsprop8bit(
    learning_rate: optax.ScalarOrSchedule,
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    initial_scale: jax.typing.ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    mu_spec: QuantSpec | None = FIRST_MOMENT_8BIT,
    nu_spec: QuantSpec | None = SECOND_MOMENT_8BIT,
    trace_spec: QuantSpec | None = FIRST_MOMENT_8BIT,
    policy: Policy | None = None,
    key: jax.Array | int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""RMSProp with 8-bit moments: :func:`optax.rmsprop`, in a quarter of its memory.

    .. math::
      v_t = \gamma Q^{-1}(\bar v_{t-1}) + (1-\gamma) g_t^2, \qquad
      u_t = g_t / \sqrt{v_t + \varepsilon}, \qquad \bar v_t = Q(v_t)

    and so for the mean :math:`m_t` of gradients if ``centered``, when :math:`v_t - m_t^2` takes the
    place of :math:`v_t` in the update. Rounding may make it negative: a dequantized mean of squares
    is raised to :math:`(1 + 2^{-16})` times the squared mean where it is less. In the first step
    after zeros, with ``bias_correction``, the difference is rounding alone, and NaN where negative,
    as in Optax.

    **Memory.** ``1 + 4/256`` bytes an element, 1.016, for the second moment, and as much for the
    mean and for the momentum where there are any; against 4 each in float32.

    Args:
      learning_rate: A fixed learning rate or a schedule.
      decay, eps, eps_in_sqrt, centered, momentum, nesterov, bias_correction: As in
        :func:`optax.rmsprop`.
      initial_scale: What second moments start at; quantized, too.
      mu_spec: How the mean is stored, if ``centered``; None: not quantized. Default: 8 bits, signed
        dynamic exponent, blocks of 256.
      nu_spec: How the second moment is stored; None: not quantized. Default: 8 bits, unsigned
        dynamic exponent, blocks of 256.
      trace_spec: How the momentum is stored, as in :func:`sgd8bit`.
      policy, key: As in :func:`scale_by_adam4bit`.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`; :func:`fused_apply` does not
      take it. Its first state is Optax's own: ``ScaleByRmsState`` or, if ``centered``,
      ``ScaleByRStdDevState``, and their forms with a count under ``bias_correction`` or with a key.
      That of momentum is a :class:`Trace4bitState`.

    Raises:
      TypeError, ValueError: If a spec or the policy is none, or a key is missing.

    Examples:
      >>> import jax.numpy as jnp, optax_lowbit
      >>> tx = optax_lowbit.rmsprop8bit(1e-3, centered=True, momentum=0.9)
      >>> state = tx.init(jnp.ones((128, 256)))
      >>> state[0].mu.nbytes, state[0].nu.nbytes, state[2].trace.nbytes
      (33280, 33280, 33280)

    References:
      Graves, `Generating Sequences With Recurrent Neural Networks
      <https://arxiv.org/abs/1308.0850>`_, 2014, Section 4.2; for the 8 bits Dettmers et al, `8-bit
      Optimizers via Block-wise Quantization <https://arxiv.org/abs/2110.02861>`_, 2022.
    """
    moments = {"nu": Moment(nu_spec, nonnegative=True, initial=initial_scale)}
    scale_by, restored = optax.scale_by_rms, dict
    if centered:
        moments = {"mu": Moment(mu_spec), **moments}
        scale_by, restored = optax.scale_by_stddev, _with_variance
    inner = scale_by(decay, eps, initial_scale, eps_in_sqrt, bias_correction)
    if key is not None and not bias_correction:
        inner = counted(inner, type(scale_by(bias_correction=True).init(())))
    has_trace = momentum is not None
    last = optax.identity()
    if has_trace:
        last = trace4bit(
            momentum, nesterov, trace_spec=trace_spec, policy=_without(policy, moments), key=key
        )
        policy = _without(policy, ["trace"])
    direction = quantize_moments(inner, moments, policy, key, restored=restored)
    rate = optax.scale_by_learning_rate(learning_rate)
    return optax.with_extra_args_support(optax.chain(direction, rate, last))


def _with_variance(moments: dict[str, jax.Array]) -> dict[str, jax.Array]:
    least = (1 + _LEAST_VARIANCE) * jnp.square(moments["mu"])
    return {**moments, "nu": jnp.maximum(moments["nu"], least)}


def _without(policy: Any, names: Any) -> Any:
    """The policy for a transform that has no moments of these names, which another has."""
    if not isinstance(policy, Policy):
        return policy

    def kept(choice):
        if not isinstance(choice, tuple):
            return choice
        return tuple((moment, spec) for moment, spec in choice if moment not in names)

    rules = tuple((pattern, kept(choice)) for pattern, choice in policy.rules)
    return dataclasses.replace(policy, rules=rules)
