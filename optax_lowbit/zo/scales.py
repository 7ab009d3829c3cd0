"""Steps of the scales of low-bit parameters."""

import dataclasses

import jax.numpy as jnp
import optax

from optax_lowbit.zo.directions import Choice
from optax_lowbit.zo.estimators import Central, Estimator, ForwardGradient
from optax_lowbit.zo.noise import Noise, Rademacher
from optax_lowbit.zo.optimizer import ZeroOrderOptimizer
from optax_lowbit.zo.updates import Descend


@dataclasses.dataclass(frozen=True)
class DescendKeepingSign(Descend):
    """:class:`Descend`, but no element crosses zero: where it would, it is halved."""

    def update(self, record, leaf):
        """A step, and then the sign of every element is looked at."""
        old = leaf.rows.values
        new, moments = super().update(record, leaf)
        return jnp.where(jnp.sign(new) == jnp.sign(old), new, old * jnp.float32(0.5)), moments


def qzo(
    learning_rate: optax.ScalarOrSchedule,
    eps: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    *,
    noise: Noise = Rademacher(),
    estimator: Estimator | ForwardGradient = Central(),
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Choice | None = None,
    trainable: Choice | None = None,
    clip: float | None = None,
    active_probes: optax.Schedule | None = None,
    probe_batch: int = 1,
) -> ZeroOrderOptimizer:
    r"""Trains the scales of low-bit parameters, over codes that stay: QZO.

    Trains every :class:`~optax_lowbit.QuantizedArray` of the parameters, and nothing else. A weight
    is ``q[code] * s``, and

    .. math::
      c_i = \mathrm{clip}\!\left(\frac{L(s + \epsilon z_i) - L(s - \epsilon z_i)}{2 \epsilon},
      \pm C\right), \qquad
      s \leftarrow s - \frac{\eta}{q} \sum_{i=1}^q c_i z_i - \eta \lambda s

    The codes are the same bits afterwards. No scale changes its sign: one that a step would take to
    zero or across is halved instead, and one that is zero stays so. To train norms and biases as
    well, use :func:`zo_sgd`, for which scales are float leaves like any other, and may change sign.

    Under ``double_quant`` the scales are codes themselves; their float32 scales train, one for
    256 blocks.

    **Memory.** Nothing is kept. A step needs what the loss needs, and the scales of a leaf.

    Args:
      learning_rate: A fixed rate or a schedule.
      eps: In the units of scales, which are as large as the largest weight of their block.
      num_probes: Directions in a step.
      noise: The distribution of directions.
      estimator: How the loss is probed.
      weight_decay: Of scales, and so of the weights under them.
      weight_decay_mask: Which decay, by path or predicate.
      trainable: Which train, by path, such as ``layers/0/kernel/scales``, or predicate.
      clip: ``C``; None: none. A probe that meets a spike of the loss then can't ruin a model.
      active_probes, probe_batch: As in :func:`zo_sgd`.

    Returns:
      A :class:`ZeroOrderOptimizer`.

    Raises:
      TypeError, ValueError: If an argument is impossible; at init, if there is no
        :class:`~optax_lowbit.QuantizedArray`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_lowbit
      >>> from optax_lowbit import zo
      >>> spec = optax_lowbit.QuantSpec(
      ...     codebook="nf4", bits=4, signed=True, scaling="block", block_size=32)
      >>> params = optax_lowbit.quantize(jnp.ones(64), spec)
      >>> def loss_fn(params):
      ...     return jnp.mean((optax_lowbit.dequantize(params) - 3.0) ** 2)
      >>> opt = zo.qzo(0.3, clip=10.0)
      >>> state = opt.init(params, key=0)
      >>> step = jax.jit(opt.step, static_argnums=0)
      >>> for _ in range(30):
      ...     params, state, info = step(loss_fn, params, state)
      >>> [f"{scale:.2f}" for scale in params.scales.tolist()]
      ['3.00', '3.00']

    References:
      `Fine-tuning Quantized Neural Networks with Zeroth-order Optimization
      <https://arxiv.org/abs/2505.13430>`_, 2025. There directions are Gaussian, and nothing keeps
      the sign of a scale.

    .. seealso:: :func:`zo_sgd_grid`
    """
    return ZeroOrderOptimizer(
        rule=DescendKeepingSign(), learning_rate=learning_rate, eps=eps, num_probes=num_probes,
        noise=noise, estimator=estimator, weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask, trainable=trainable, part="scales", clip=clip,
        active_probes=active_probes, probe_batch=probe_batch,
    )  # fmt: skip
