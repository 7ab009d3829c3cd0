"""Zeroth-order Adam: its first moment in 4 bits, its second often a single number."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_lowbit.kernels.adam import adam_step, coefficients
from optax_lowbit.kernels.backends import Backend, checked
from optax_lowbit.kernels.reference import Step
from optax_lowbit.kernels.steps import FusedAdam, FusedMomentum
from optax_lowbit.moments.policy import Policy
from optax_lowbit.moments.presets import FIRST_MOMENT_4BIT, SECOND_MOMENT_4BIT
from optax_lowbit.moments.storage import Moment, checked_policy
from optax_lowbit.quant import QuantSpec
from optax_lowbit.zo import checks
from optax_lowbit.zo.directions import Choice
from optax_lowbit.zo.estimators import Central, Estimator, ForwardGradient
from optax_lowbit.zo.momentum import MomentumStep
from optax_lowbit.zo.noise import Noise, Rademacher
from optax_lowbit.zo.optimizer import ZeroOrderOptimizer
from optax_lowbit.zo.updates import Rule, Stepped, stepped, uncontracted

# Rank-1 scales belong to a whole leaf, and stacks are updated slice by slice.
BLOCK_SECOND_MOMENT_4BIT = dataclasses.replace(SECOND_MOMENT_4BIT, scaling="block")


def zo_adam(
    learning_rate: optax.ScalarOrSchedule,
    eps: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    adam_eps: float = 1e-8,
    mu_spec: QuantSpec | None = FIRST_MOMENT_4BIT,
    nu_spec: QuantSpec | None = BLOCK_SECOND_MOMENT_4BIT,
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
    r"""Adam on an estimate from random directions: ZO-Adam, with decoupled weight decay.

    .. math::
      g = \frac{1}{q} \sum_i c_i z_i, \quad m \leftarrow \beta_1 m + (1-\beta_1) g, \quad
      v \leftarrow \beta_2 v + (1-\beta_2) g^2, \quad
      \theta \leftarrow \theta - \eta \left(\frac{\hat m}{\sqrt{\hat v} + \varepsilon}
      + \lambda \theta\right)

    With one probe whose elements are signs, :math:`(c z)^2 = c^2` everywhere: :math:`v` is a single
    number, exactly, and is kept as one. Adam is then momentum with a step size of its own.

    **Memory.** Of the first moment ``0.5 + 4/128`` bytes an element of leaves that are quantized, 4
    of others. Of the second 0 with one probe of :class:`Rademacher`, else the same again. A step
    needs the estimate of one leaf, or of one slice of a stack, in float32.

    Args:
      learning_rate, eps, num_probes: As in :func:`zo_sgd`; ``eps`` is that of the probe.
      b1: Decay rate of the first moment, from 0 to below 1.
      b2: Decay rate of the second moment, from 0 to below 1.
      adam_eps: Added to the denominator outside of the square root.
      mu_spec: How the first moment is stored; None: in float32. Default: 4 bits, signed dynamic
        exponent, blocks of 128.
      nu_spec: How the second moment is stored where it is not one number; None: in float32.
        Default: 4 bits, linear without zero, blocks of 128.
      policy: Which leaves are quantized at all, and exceptions; None: those of more than 4096
        elements.
      noise, estimator, weight_decay, weight_decay_mask, trainable: As in :func:`zo_sgd`.
      clip, active_probes, probe_batch: As in :func:`zo_sgd`.
      backend: Of the step of a leaf in few bits, as in :func:`~optax_lowbit.scale_by_adam4bit`.

    Returns:
      The corresponding :class:`ZeroOrderOptimizer`. Its state has the moment ``"mu"``, and ``"nu"``
      among the moments or, where it is one number, among the scalars.

    Raises:
      TypeError, ValueError: If an argument is impossible.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_lowbit import zo
      >>> state = zo.zo_adam(1e-4).init({"w": jnp.ones((128, 256))}, jax.random.key(0))
      >>> state.moments["mu"][0].nbytes, state.scalars["nu"].shape
      (17408, ())

    References:
      Zhang et al, `Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning
      <https://arxiv.org/abs/2402.11592>`_, 2024, Section 3; Kingma and Ba, `Adam
      <https://arxiv.org/abs/1412.6980>`_, 2015. Differs from the released code, which keeps both
      moments in the dtype of the parameters and has no weight decay.
    """
    for name, value in (("b1", b1), ("b2", b2)):
        checks.check_decay_rate(name, value)
    moments = {"mu": Moment(mu_spec), "nu": Moment(nu_spec, nonnegative=True)}
    policy = checked_policy(moments, policy, key=0)
    checks.check_noise(noise)
    checks.check_number("adam_eps", adam_eps)
    if checks.is_concrete(adam_eps) and not adam_eps >= 0:
        raise ValueError(f"adam_eps must be at least 0, got {adam_eps!r}")
    if num_probes == 1 and noise.has_unit_squares:
        kept = {"mu": moments["mu"]}
        rule = AdamOfSigns(moments=kept, b1=b1, b2=b2, eps=adam_eps, backend=checked(backend))
    else:
        rule = Stepped(
            moments=moments,
            step=AdamStep(b1, b2, adam_eps),
            fused=FusedAdam(b1, b2, adam_eps, 0.0, nesterov=False),
            backend=checked(backend),
        )
    return ZeroOrderOptimizer(
        rule=rule, learning_rate=learning_rate, eps=eps, num_probes=num_probes, noise=noise,
        estimator=estimator, weight_decay=weight_decay, weight_decay_mask=weight_decay_mask,
        trainable=trainable, clip=clip, active_probes=active_probes, probe_batch=probe_batch,
        policy=policy,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AdamStep:
    """What Adam does to a piece of a leaf, the same however it is compiled."""

    b1: float
    b2: float
    eps: float

    def __call__(self, count: jax.Array) -> Step:
        """The step of number ``count``, from 1."""
        c = coefficients(self.b1, self.b2, self.eps, 0.0, count, nesterov=False)

        def product(x, y):
            return uncontracted(x * y, count)

        def step(grad, moments, constants):
            del constants
            update, mu, nu = adam_step(grad, moments["mu"], moments["nu"], c, product)
            return update, {"mu": mu, "nu": nu}

        return step


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamOfSigns(Rule):
    """Adam on a number times signs: its second moment is the same number everywhere.

    Attributes:
      b1, b2, eps: Adam's.
      backend: The kernels.
      scalars: The number of steps taken, and the second moment.
    """

    b1: float
    b2: float
    eps: float
    backend: Backend = "auto"
    scalars: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"count": np.int32(0), "nu": np.float32(0)}
    )
    settings: ClassVar[int] = 2

    def record(self, coefficients, rate, decay):
        """The coefficient, the learning rate and the weight decay."""
        return jnp.concatenate([coefficients, rate[None], decay[None]])

    def advance(self, scalars, record, count):
        """Counts the step, and averages the square."""
        nu = self.b2 * scalars["nu"] + (1 - self.b2) * (record[0] * record[0])
        return {"count": scalars["count"] + 1, "nu": nu}

    def update(self, record, leaf):
        """Momentum, by its kernel, at a rate that has the rest of Adam in it."""
        count = leaf.scalars["count"]
        c = coefficients(self.b1, self.b2, self.eps, 0.0, count, nesterov=False)
        scale = c.moment / (jnp.sqrt(c.correction * leaf.scalars["nu"]) + c.eps)
        estimate = leaf.draw(c.one_minus_b1 * record[:1])
        new, kept = stepped(
            leaf, estimate, {"trace": leaf.rows.companions["mu"]},
            MomentumStep(self.b1), FusedMomentum(self.b1, nesterov=False),
            self.backend, count, rate=record[1] * scale, decay=record[2] / scale,
        )  # fmt: skip
        return new, {"mu": kept["trace"]}
