"""Zeroth-order stochastic gradient descent."""

import optax

from optax_lowbit.zo.directions import Choice
from optax_lowbit.zo.estimators import Central, Estimator
from optax_lowbit.zo.noise import Noise, Rademacher
from optax_lowbit.zo.optimizer import ZeroOrderOptimizer
from optax_lowbit.zo.updates import Descend


def zo_sgd(
    learning_rate: optax.ScalarOrSchedule,
    eps: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    *,
    noise: Noise = Rademacher(),
    estimator: Estimator = Central(),
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Choice | None = None,
    trainable: Choice | None = None,
    clip: float | None = None,
    probe_batch: int = 1,
) -> ZeroOrderOptimizer:
    r"""Descends along random directions: MeZO.

    .. math::
      c_i = \frac{L(\theta + \epsilon z_i) - L(\theta - \epsilon z_i)}{2 \epsilon}, \qquad
      \theta \leftarrow \theta - \frac{\eta}{q} \sum_{i=1}^q c_i z_i - \eta \lambda \theta

    Parameters are not changed to evaluate the loss, and their sum with a direction is rounded to
    their dtype once. Updates of bfloat16 parameters are rounded stochastically.

    **Memory.** Nothing is kept. A step needs what the loss needs, and one perturbed leaf.
    """
    return ZeroOrderOptimizer(
        rule=Descend(), learning_rate=learning_rate, eps=eps, num_probes=num_probes, noise=noise,
        estimator=estimator, weight_decay=weight_decay, weight_decay_mask=weight_decay_mask,
        trainable=trainable, clip=clip, probe_batch=probe_batch,
    )  # fmt: skip
