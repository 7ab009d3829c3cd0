"""Steps along directions of low rank, with momentum in their factors or without."""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_lowbit.moments.storage import Moment
from optax_lowbit.zo.checks import check_decay_rate
from optax_lowbit.zo.directions import Choice, outer
from optax_lowbit.zo.estimators import Central, Estimator
from optax_lowbit.zo.low_rank import LowRank
from optax_lowbit.zo.noise import Factors
from optax_lowbit.zo.optimizer import ZeroOrderOptimizer
from optax_lowbit.zo.updates import Descend, Rule, moved, uncontracted


def lozo(
    learning_rate: optax.ScalarOrSchedule,
    eps: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    *,
    rank: int = 2,
    interval: int = 50,
    momentum: float | None = None,
    estimator: Estimator = Central(),
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Choice | None = None,
    trainable: Choice | None = None,
    clip: float | None = None,
    active_probes: optax.Schedule | None = None,
    probe_batch: int = 1,
) -> ZeroOrderOptimizer:
    r"""Descends along directions of low rank: LOZO, and with ``momentum`` LOZO-M.

    Without momentum: :func:`zo_sgd` with :class:`LowRank` noise. With it, for a leaf of ``n``
    columns and ``c_i U_i V^T`` the estimates of its probes:

    .. math::
      M \leftarrow \beta M \frac{V_{old}^T V}{n / \sqrt r} + \frac{1 - \beta}{q} \sum_i c_i U_i,
      \qquad W \leftarrow W - \eta M V^T - \eta \lambda W

    ``M`` is projected where ``V`` is drawn anew, so that ``M V^T`` stays close to what it was.
    Momentum of leaves of fewer than two axes is an ordinary mean of estimates.

    **Memory.** Without momentum nothing is kept but two keys a leaf. With it ``4 rank`` bytes a
    row: for 1024 columns and rank 2, 0.2% of float32 parameters. A step needs what the loss needs;
    of a leaf that is only multiplied with, no perturbed copy is made.

    Args:
      learning_rate: A fixed learning rate or a schedule.
      eps: How far along each direction the loss is evaluated. That of the paper is ours over
        ``sqrt(rank)``.
      num_probes: Directions of a step; all have the same ``V``.
      rank, interval: As in :class:`LowRank`.
      momentum: Decay rate of the momentum, from 0 to below 1; None: no momentum.
      estimator, weight_decay, weight_decay_mask, trainable: As in :func:`zo_sgd`.
      clip, active_probes: As in :func:`zo_sgd`.
      probe_batch: Probes evaluated together, sharing each matmul with a leaf.

    Returns:
      A :class:`ZeroOrderOptimizer`.

    Raises:
      TypeError, ValueError: If an argument is impossible.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_lowbit import zo
      >>> opt = zo.lozo(0.1, momentum=0.9)
      >>> state = opt.init({"kernel": jnp.ones((16, 8))}, key=0)
      >>> state.moments["trace"][0].shape
      (16, 2)

    References:
      Chen et al, `Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures
      <https://arxiv.org/abs/2410.07698>`_, 2024, Algorithms 1 and 2.

    .. seealso:: :class:`LowRank`, for where it differs from the reference.
    """
    noise, rule = LowRank(rank, interval), Descend()
    if momentum is not None:
        left_factor = {"trace": Moment(None, columns=rank)}
        rule = LowRankMomentum(moments=left_factor, noise=noise, decay=momentum)
    return ZeroOrderOptimizer(
        rule=rule,
        learning_rate=learning_rate, eps=eps, num_probes=num_probes, noise=noise,
        estimator=estimator, weight_decay=weight_decay, weight_decay_mask=weight_decay_mask,
        trainable=trainable, clip=clip, active_probes=active_probes, probe_batch=probe_batch,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankMomentum(Rule):
    """The rule of LOZO-M: see :func:`lozo`.

    Attributes:
      noise: The optimizer's.
      decay: From 0 to below 1.
      scalars: In which interval the last step was, and the one before it.

    Raises:
      TypeError, ValueError: If ``decay`` is not in that range.
    """

    noise: LowRank
    decay: float
    scalars: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"turn": np.int32(0), "before": np.int32(0)}
    )
    settings: ClassVar[int] = 2

    def __post_init__(self):
        check_decay_rate("momentum", self.decay)

    def advance(self, scalars, record, count):
        """The interval of this step and of the one that was taken before it."""
        del record
        return {"turn": count // self.noise.interval, "before": scalars["turn"]}

    def record(self, coefficients, rate, decay):
        """Coefficients, the learning rate, and the share of each parameter that is taken away."""
        return jnp.concatenate([coefficients, jnp.stack([rate, rate * decay])])

    def update(self, record, leaf):
        """Momentum, in the space of this step's ``V``, and a step along it."""
        rate, decay = record[-2], record[-1]
        trace = leaf.rows.companions["trace"]
        factors = leaf.factors(record[:-2])
        if factors is None:
            estimate = leaf.draw(record[:-2])
        else:
            trace = _product(trace, self._turn(factors, leaf.scalars).T, leaf.count)
            estimate = factors.left
        trace = uncontracted(self.decay * trace, leaf.count) + uncontracted(
            (1 - self.decay) * estimate, leaf.count
        )
        along = trace if factors is None else _product(trace, factors.right, leaf.count)
        return moved(leaf, -uncontracted(rate * along, leaf.count), decay), {"trace": trace}

    def _turn(self, factors: Factors, scalars: Mapping[str, jax.Array]) -> jax.Array:
        """``(rank, rank)``: takes momentum from the ``V`` it was left with to that of this step.

        Momentum older than an interval, none of whose steps was taken, is forgotten.
        """
        assert factors.before is not None
        n, rank = factors.right.shape
        product = _inner(factors.before, factors.right)
        age = scalars["turn"] - scalars["before"]
        projection = jnp.where(age == 1, product / (n / rank**0.5), 0)
        return jnp.where(age == 0, jnp.eye(rank), projection)


def _inner(one: jax.Array, other: jax.Array) -> jax.Array:
    """``one.T @ other`` of normal values with few bits, to ``2**-14`` of each.

    Whole numbers have the same sum in any order, wherever the rows are.
    """

    def parts(x):
        coarse = jnp.round(x * 2**7)
        return coarse.astype(jnp.int32), jnp.round((x * 2**7 - coarse) * 2**7).astype(jnp.int32)

    def total(x, y):
        return jnp.sum(x[:, :, None] * y[:, None, :], axis=0)

    (a, b), (c, d) = parts(one), parts(other)
    terms = (total(a, c), 2.0**-14), (total(a, d) + total(b, c), 2.0**-21), (total(b, d), 2.0**-28)
    return functools.reduce(operator.add, [x.astype(jnp.float32) * unit for x, unit in terms])


def _product(left: jax.Array, right: jax.Array, count: jax.Array) -> jax.Array:
    """``left @ right.T``, the same for some rows as for all of them, however it is compiled."""
    terms = [
        uncontracted(outer(left[..., k : k + 1], right[:, k : k + 1]), count)
        for k in range(right.shape[-1])
    ]
    return functools.reduce(operator.add, terms)
