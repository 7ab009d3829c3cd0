"""Steps of low-bit parameters from code to code."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_lowbit.moments.storage import Moment
from optax_lowbit.quant import random_bits
from optax_lowbit.zo.directions import Choice
from optax_lowbit.zo.estimators import Central, Estimator
from optax_lowbit.zo.noise import Noise, columns, words_once
from optax_lowbit.zo.optimizer import ZeroOrderOptimizer
from optax_lowbit.zo.rows import Rows
from optax_lowbit.zo.updates import Rule

# The chance of a larger step is a multiple of one over this.
CHANCES = 2**15


@dataclasses.dataclass(frozen=True)
class GridSteps(Noise):
    """``eps`` times a sign, rounded stochastically to a whole number of places.

    Attributes:
      eps: The mean size, a multiple of ``2**-15``: below 1 the share of elements that move, by one
        place.
    """

    eps: float

    @property
    def variance(self) -> float:
        """``E[z^2]`` of an element; elements are independent, and their mean is 0."""
        part, whole = math.modf(self.eps)
        return whole**2 + (2 * whole + 1) * part

    def draw(self, probe, rows):
        """One word of the cipher is two elements: of each a bit for the sign, 15 for the size."""
        part, whole = math.modf(self.eps)
        n = columns(rows)
        word = words_once(probe.key, rows, -(-n // 2))
        half = jnp.stack([word & 0xFFFF, word >> 16], axis=-1)
        half = half.reshape(*word.shape[:-1], -1)[..., :n].reshape(rows.values.shape)
        size = jnp.float32(whole) + (half >> 1 < int(part * CHANCES)).astype(jnp.float32)
        return jnp.where(half & 1, -size, size)


RESIDUAL = {"residual": Moment(None, dtype=np.dtype("uint8"))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescendOnGrid(Rule):
    """Adds the directions to places and their residual, which are one number in fixed point.

    Attributes:
      variance: Of an element of a direction.
      moments: :data:`RESIDUAL`, in two's complement, with as many bits as the codes and packed as
        they are; or nothing.
    """

    variance: float

    def record(self, coefficients, rate, decay):
        """Slopes."""
        del decay
        return -rate * coefficients / self.variance

    def update(self, record, leaf):
        """Only the sum of a step is rounded, to a unit of the residual; the rest is integers."""
        grid = leaf.grid
        if grid is None:
            raise TypeError("DescendOnGrid updates the codes of a QuantizedArray, got a float leaf")
        rows = grid.opened(leaf.rows)
        bits = grid.spec.bits if self.moments else 0
        fine = grid.places(leaf.rows.values) << bits
        if self.moments:
            sign = 1 << bits - 1
            fine += (grid.unpacked(rows.companions["residual"]).astype(jnp.int32) ^ sign) - sign
        last = grid.top << bits
        moves = dataclasses.replace(leaf, rows=rows).draw(record)
        step = jnp.clip(moves * jnp.float32(2**bits), -last, last)
        fine = jnp.clip(fine + stochastic_integers(step, leaf.key, rows), 0, last)
        places = fine + (1 << bits >> 1) >> bits
        if not self.moments:
            return grid.codes(places), {}
        residual = fine - (places << bits) & (1 << bits) - 1
        return grid.codes(places), {"residual": grid.packed(residual.astype(jnp.uint8))}


def stochastic_integers(x: jax.Array, key: random_bits.Key, rows: Rows) -> jax.Array:
    """One of the two integers around each element of rows, drawn so that the mean is ``x``."""
    below = jnp.floor(x)
    noise = random_bits.uniform(key, *rows.indices())
    return below.astype(jnp.int32) + (noise < x - below).astype(jnp.int32)


def zo_sgd_grid(
    learning_rate: optax.ScalarOrSchedule,
    eps: float = 0.03,
    num_probes: int = 1,
    *,
    estimator: Estimator = Central(),
    error_feedback: bool = True,
    trainable: Choice | None = None,
    clip: float | None = None,
    active_probes: optax.Schedule | None = None,
    probe_batch: int = 1,
) -> ZeroOrderOptimizer:
    r"""Trains the codes of low-bit parameters: every weight, without a float copy of it.

    Trains every :class:`~optax_lowbit.QuantizedArray` of the parameters, of any spec, and nothing
    else. With ``k`` the places of its elements in the sorted code table, of ``K`` values,

    .. math::
      \delta_i = \mathrm{SR}(\epsilon\, \sigma_i), \qquad
      c_i = \frac{L(k + \delta_i) - L(k - \delta_i)}{2 v}, \qquad
      v = E[\delta^2], \\
      u = k + e - \frac{\eta}{q} \sum_{i=1}^q c_i \delta_i, \qquad
      k \leftarrow \lfloor u + 1/2 \rfloor, \qquad e \leftarrow u - k

    with signs :math:`\sigma_i` and stochastic rounding SR to integers. The loss sees arrays whose
    codes have moved, and never one outside the table. Scales do not change.

    The residual ``e`` has as many bits ``b`` as a code: ``k + e`` is a number in fixed point with
    ``b`` bits after the point, and only the step is rounded to its last bit, stochastically. So
    steps far below one code add up; what rounding adds to a weight's variance in a step of ``s``
    codes is at most ``s / 2**b``, where without a residual it is ``s``.

    At an end of the table ``e`` never points out of it, and of the two evaluations only the one
    that points inwards moves an element: its slope counts half.

    A step is one of places in the table, not of value. Where a table is uniform (``"integer"``,
    ``"linear"``) the two are the same up to the scale. In NF4 a place is worth 0.08 to 0.30 of the
    scale, so a weight moves ``(place's worth)**2`` times what its slope in value asks for: less
    among small values, more among large ones, downhill for all. In value the two neighbours of a
    code are not equally far, and a central difference would be biased.

    **Memory.** ``b / 8`` bytes an element, as much as the codes; nothing with
    ``error_feedback=False``.

    Args:
      learning_rate: In codes: a fixed rate or a schedule.
      eps: Mean size of a perturbation, in places; rounded to a multiple of ``2**-15``. Below 1 it
        is the share of elements that are moved, by one place each. The default moves normal weights
        in 4 bits by about 6% of their norm; with 8 bits that takes 3.
      num_probes: Directions in a step.
      estimator: :class:`Central` or one that needs no derivative.
      error_feedback: Whether residuals are kept. Without, the sum ``u`` is itself rounded
        stochastically to a place.
      trainable: Of the arrays, by path or predicate; see :func:`zo_sgd`.
      clip: Largest magnitude of a coefficient ``v c_i``, half the difference of two losses; None:
        not clipped.
      active_probes, probe_batch: As in :func:`zo_sgd`.

    Returns:
      A :class:`ZeroOrderOptimizer`, whose state has the residuals as ``moments["residual"]``: uint8
      of the shapes of the packed codes, in two's complement.

    Raises:
      TypeError: If ``eps`` is no number, or the estimator needs derivatives, which codes have not.
      ValueError: If ``eps`` is under ``2**-15``; at init, if there is no :class:`QuantizedArray`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_lowbit
      >>> from optax_lowbit import zo
      >>> spec = optax_lowbit.QuantSpec(
      ...     codebook="integer", bits=4, signed=True, scaling="block", block_size=32)
      >>> params = optax_lowbit.quantize(jnp.linspace(-1.0, 1.0, 64), spec)
      >>> def loss_fn(params):
      ...     return jnp.mean((optax_lowbit.dequantize(params) - 0.3) ** 2)
      >>> opt = zo.zo_sgd_grid(20.0, eps=0.5)
      >>> state = opt.init(params, key=0)
      >>> state.moments["residual"][0].shape
      (32,)
      >>> step = jax.jit(opt.step, static_argnums=0)
      >>> for _ in range(200):
      ...     params, state, info = step(loss_fn, params, state)
      >>> bool(loss_fn(params) < 0.1)
      True

    References:
      `Quantized Evolution Strategies <https://arxiv.org/abs/2602.03120>`_, 2026, for steps on the
      grid and error feedback: there the residual is float, or rebuilt from past steps.
      `QuZO <https://arxiv.org/abs/2502.12346>`_, 2025, for stochastically rounded perturbations:
      there the update rounds the direction once more, here the direction is what was probed.

    .. seealso:: :func:`qzo`
    """
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"eps must be a number of places, got {eps!r}")
    if not 1 / CHANCES <= eps < math.inf:
        raise ValueError(f"eps must be a number of places of at least 2**-15, got {eps!r}")
    if not isinstance(estimator, Estimator):
        raise TypeError(
            f"estimator must need no derivatives, as zo.Central() does; got {estimator!r}"
        )
    noise = GridSteps(round(eps * CHANCES) / CHANCES)
    return ZeroOrderOptimizer(
        rule=DescendOnGrid(variance=noise.variance, moments=RESIDUAL if error_feedback else {}),
        learning_rate=learning_rate, eps=1.0, num_probes=num_probes, active_probes=active_probes,
        noise=noise, estimator=estimator, trainable=trainable, part="codes", clip=clip,
        probe_batch=probe_batch,
    )  # fmt: skip
