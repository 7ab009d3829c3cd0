"""Zeroth-order descent with momentum, kept in 4 bits."""

import dataclasses

import jax
import optax

from optax_lowbit.kernels.backends import Backend, checked
from optax_lowbit.kernels.reference import Step
from optax_lowbit.kernels.steps import FusedMomentum
from optax_lowbit.moments.policy import Policy
from optax_lowbit.moments.presets import FIRST_MOMENT_4BIT
from optax_lowbit.moments.storage import Moment, checked_policy
from optax_lowbit.quant import QuantSpec
from optax_lowbit.zo import checks
from optax_lowbit.zo.directions import Choice
from optax_lowbit.zo.estimators import Central, Estimator, ForwardGradient
from optax_lowbit.zo.noise import Noise, Rademacher
from optax_lowbit.zo.optimizer import ZeroOrderOptimizer
from optax_lowbit.zo.updates import Stepped, uncontracted


def zo_sgd_momentum(
    learning_rate: optax.ScalarOrSchedule,
    eps: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    trace_spec: QuantSpec | None = FIRST_MOMENT_4BIT,
    policy: Policy | None = None,
    noise: Noise = Rademacher(),
    estimator: Estimator | ForwardGradient = Central(),
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Choice | None = None,
    trainable: Choice | None = None,
    clip: float | None = None,
    active_probes: optax.Schedule | None = None,
    probe_batch: int = 1,
    backend: Backend = "auto",
) -> ZeroOrderOptimizer:
    r"""Descends along random directions with momentum: ZO-SGD-MMT.

    With :math:`Q` quantization and :math:`Q^{-1}` its inverse,

    .. math::
      t_k = \frac{1}{q} \sum_i c_i z_i + \mu\, Q^{-1}(\bar t_{k-1}), \qquad
      \theta \leftarrow \theta - \eta\, (t_k + \lambda \theta), \qquad \bar t_k = Q(t_k)

    or with :math:`\frac{1}{q} \sum_i c_i z_i + \mu t_k` in place of :math:`t_k` with Nesterov's. It
    is the step of :func:`optax.sgd`, by the kernels of :func:`~optax_lowbit.sgd4bit`.

    **Memory.** ``0.5 + 4/128`` bytes an element of leaves that are quantized, 4 of others. A step
    needs the estimate of one leaf, or of one slice of a stack, in float32.

    Args:
      learning_rate, eps, num_probes: As in :func:`zo_sgd`.
      momentum: Decay rate :math:`\mu`, from 0 to below 1.
      nesterov: Whether to use Nesterov momentum.
      trace_spec: How the momentum is stored; None: in float32. Default: 4 bits, signed dynamic
        exponent, blocks of 128.
      policy: Which leaves are quantized at all, and exceptions; None: those of more than 4096
        elements.
      noise, estimator, weight_decay, weight_decay_mask, trainable: As in :func:`zo_sgd`.
      clip, active_probes, probe_batch: As in :func:`zo_sgd`.
      backend: Of the step of a leaf in few bits, as in :func:`~optax_lowbit.scale_by_adam4bit`.

    Returns:
      The corresponding :class:`ZeroOrderOptimizer`, whose state has the moment ``"trace"``.

    Raises:
      TypeError, ValueError: If an argument is impossible.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_lowbit import zo
      >>> opt = zo.zo_sgd_momentum(1e-6)
      >>> state = opt.init({"w": jnp.ones((128, 256))}, jax.random.key(0))
      >>> state.moments["trace"][0].nbytes
      17408

    References:
      Zhang et al, `Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning
      <https://arxiv.org/abs/2402.11592>`_, 2024, Section 3. Differs from the released code in that
      the momentum takes an eighth of the memory, and that weight decay is applied.
    """
    checks.check_decay_rate("momentum", momentum)
    moments = {"trace": Moment(trace_spec)}
    rule = Stepped(
        moments=moments,
        step=MomentumStep(momentum, nesterov),
        fused=FusedMomentum(momentum, nesterov),
        backend=checked(backend),
    )
    return ZeroOrderOptimizer(
        rule=rule, learning_rate=learning_rate, eps=eps, num_probes=num_probes, noise=noise,
        estimator=estimator, weight_decay=weight_decay, weight_decay_mask=weight_decay_mask,
        trainable=trainable, clip=clip, active_probes=active_probes, probe_batch=probe_batch,
        policy=checked_policy(moments, policy, key=0),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MomentumStep:
    """What :func:`optax.trace` does to a piece of a leaf, the same however it is compiled."""

    decay: float
    nesterov: bool = False

    def __call__(self, count: jax.Array) -> Step:
        """The step of number ``count``, from 1."""

        def step(grad, moments, constants):
            del constants
            trace = grad + uncontracted(self.decay * moments["trace"], count)
            ahead = grad + uncontracted(self.decay * trace, count) if self.nesterov else trace
            return ahead, {"trace": trace}

        return step
