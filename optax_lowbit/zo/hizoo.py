"""HiZOO: directions and steps shaped by a running estimate of the Hessian's diagonal."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from optax_lowbit.kernels.reference import update_leaf
from optax_lowbit.moments.policy import Policy
from optax_lowbit.moments.storage import Moment, checked_policy
from optax_lowbit.quant import QuantSpec, is_quantized
from optax_lowbit.quant.array import decode
from optax_lowbit.zo import checks
from optax_lowbit.zo.directions import Choice
from optax_lowbit.zo.estimators import (
    Central,
    curvature,
    first,
    losses_along,
    over_probes,
    reading,
)
from optax_lowbit.zo.noise import Gaussian, Noise
from optax_lowbit.zo.optimizer import ZeroOrderOptimizer, finite_or_none, value_at
from optax_lowbit.zo.updates import Descend, is_taken, moved

Curvature = Literal["exact", "difference"]


def hizoo(
    learning_rate: optax.ScalarOrSchedule,
    eps: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    *,
    smoothing: optax.ScalarOrSchedule = 1e-6,
    curvature: Curvature = "exact",
    hessian_spec: QuantSpec | None = None,
    policy: Policy | None = None,
    noise: Noise = Gaussian(),
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Choice | None = None,
    trainable: Choice | None = None,
    clip: float | None = None,
    active_probes: optax.Schedule | None = None,
    probe_batch: int = 1,
) -> ZeroOrderOptimizer:
    r"""Descends along directions that are short where the loss is curved: HiZOO.

    With :math:`H` a number for every element, 1 at first, and :math:`v_i = z_i / \sqrt{H}`,

    .. math::
      c_i &\approx v_i^T \nabla L, \qquad h_i \approx v_i^T (\nabla^2 L)\, v_i, \\
      \theta &\leftarrow \theta - \frac{\eta}{q} \sum_i c_i v_i - \eta \lambda \theta, \qquad
      H \leftarrow (1 - \alpha) H + \frac{\alpha}{2 q} \sum_i |h_i|\, H z_i^2

    With ``curvature="exact"`` both numbers are derivatives of :math:`\phi`, by forward mode nested
    twice, and ``eps`` is not used. With ``"difference"`` they are
    :math:`(\ell_+ - \ell_-) / 2 \epsilon` and :math:`(\ell_+ + \ell_- - 2 \ell_0) / \epsilon^2`, as
    in the paper. The latter loses what float32 does not resolve: with losses near 1 and an ``eps``
    of 1e-3, :math:`h` is known to about 0.1.

    **Memory.** 4 bytes an element, or ``1 + 4/256`` in 8 bits with blocks of 256.
    **Passes.** Three a step with ``"difference"`` and one probe; ``"exact"``: one with two levels
    of tangents a probe.

    Args:
      learning_rate, eps, num_probes: As in :func:`zo_sgd`.
      smoothing: :math:`\alpha`, between 0 and 1, or a schedule.
      curvature: ``"exact"`` or ``"difference"``.
      hessian_spec: How :math:`H` is stored; None: in float32. Its table must be without 0, as
        ``"linear"`` without a sign is, and as a step changes little, rounding be stochastic.
      policy: Which leaves are quantized at all, and exceptions; None: those of more than 4096
        elements.
      noise: The distribution of :math:`z`. Not :class:`Rademacher`: with squares that are all 1 it
        tells nothing about which elements the curvature is of.
      weight_decay, weight_decay_mask, trainable: As in :func:`zo_sgd`.
      clip, active_probes, probe_batch: As in :func:`zo_sgd`.

    Returns:
      The corresponding :class:`ZeroOrderOptimizer`, whose state has the moment ``"hessian"``.

    Raises:
      TypeError, ValueError: If an argument is impossible.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_lowbit import zo
      >>> state = zo.hizoo(1e-6).init(jnp.zeros(3), 0)
      >>> state.moments["hessian"][0].tolist()
      [1.0, 1.0, 1.0]

    References:
      Zhao et al, `Second-Order Fine-Tuning without Pain for LLMs: A Hessian Informed Zeroth-Order
      Optimizer <https://arxiv.org/abs/2402.15173>`_, 2024, Algorithm 1. As in the paper, the step
      is along the direction that was probed; the released code scales it by the new :math:`H`
      instead. The mean over probes, of which the paper has one, and ``"exact"`` are ours.
    """
    if curvature not in ("exact", "difference"):
        raise ValueError(f'curvature must be "exact" or "difference", got {curvature!r}')
    checks.check_noise(noise)
    if noise.has_unit_squares:
        raise ValueError(
            f"noise must have squares that differ between elements, as zo.Gaussian() has, or the "
            f"Hessian's diagonal stays a multiple of what it is; got {noise!r}"
        )
    checks.check_number("smoothing", smoothing)
    if not callable(smoothing):
        checks.check_decay_rate("smoothing", smoothing)
    if hessian_spec is not None and 0 in getattr(hessian_spec, "values", ()):
        raise ValueError(
            f"hessian_spec must have no code for 0, by which directions can't be divided; got "
            f"{hessian_spec}"
        )
    moments = {"hessian": Moment(hessian_spec, nonnegative=True, initial=1.0)}
    return HessianOptimizer(
        rule=DescendHessian(moments=moments), learning_rate=learning_rate, eps=eps,
        num_probes=num_probes, noise=Preconditioned(noise), smoothing=smoothing,
        curvature=curvature, weight_decay=weight_decay, weight_decay_mask=weight_decay_mask,
        trainable=trainable, clip=clip, active_probes=active_probes, probe_batch=probe_batch,
        policy=checked_policy(moments, policy, key=0),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Preconditioned(Noise):
    """Directions of another distribution, each element over the root of its ``hessian``."""

    inner: Noise
    uses: ClassVar[tuple[str, ...]] = ("hessian",)

    def prepare(self, prepared, params, run, step):
        """What the other distribution prepares."""
        return self.inner.prepare(prepared, params, run, step)

    def scale(self, probe, keys, leaves):
        """That of the other distribution."""
        return self.inner.scale(probe, keys, leaves)

    def draw(self, probe, rows):
        """``z / sqrt(H)``."""
        hessian = _floats(rows.companions["hessian"], jnp.uint32(probe.zero))
        return self.inner.draw(probe, rows) * jax.lax.rsqrt(hessian)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescendHessian(Descend):
    """:class:`Descend`, and the average of the Hessian's diagonal.

    The record has ``-eta c_i`` and ``alpha |h_i| / 2 q``, then ``eta lambda`` and ``alpha``.
    """

    settings: ClassVar[int] = 2

    def update(self, record, leaf):
        """Along what was probed, then the average."""
        n = (len(record) - 2) // 2
        slopes, weights, (share, alpha) = jnp.split(record, [n, 2 * n])
        new = moved(leaf, leaf.draw(slopes), share)
        # v^2, of which H z^2 is H^2 times as much.
        squares = leaf.draw(weights, jnp.square)

        def average(squares, moments, constants):
            del constants
            h = moments["hessian"]
            return squares, {"hessian": (1 - alpha) * h + squares * h * h}

        _, moments = update_leaf(average, squares, leaf.rows.companions, leaf.key)
        return new, moments


@dataclasses.dataclass(frozen=True, kw_only=True)
class HessianOptimizer(ZeroOrderOptimizer):
    """One that also estimates curvature along directions; see :func:`hizoo`."""

    smoothing: optax.ScalarOrSchedule
    curvature: Curvature
    spreads_probes: ClassVar[bool] = False

    @property
    def evaluations(self):
        """Refused: values of the loss are not all that this needs.

        Raises:
          TypeError: Always.
        """
        raise TypeError(
            "hizoo needs the curvature of the loss, so it can't be asked for "
            "candidates: give step a loss_fn that JAX can trace"
        )

    def estimate(self, loss_fn, params, state, *args):
        """The first half of a step."""
        phi, keys = self._probed(loss_fn, params, state, args)
        active = self._active(state)
        if self.curvature == "exact":
            losses, slopes, curvatures = over_probes(
                lambda key: curvature(phi, key), keys, self.probe_batch, active
            )
            loss = losses[0]
        else:
            here, eps, central = phi.here(), self._eps(state), Central()
            losses = losses_along(central.signs, phi, keys, eps, self.probe_batch, active)
            loss, slopes = reading(central, here, losses, eps, active)
            curvatures = first((jnp.sum(losses, 1) - 2 * loss) / (eps * eps), active)
        info = self._info(state, loss, slopes)
        alpha = jnp.asarray(value_at(self.smoothing, state.count), jnp.float32)
        weights = alpha / (2 * self._averaged(state)) * jnp.abs(curvatures)
        # Together: where the learning rate is 0 the Hessian is averaged all the same.
        _, is_known = self._known(state, loss, slopes)
        is_known &= jnp.all(jnp.isfinite(curvatures))
        along, share = jnp.split(info.record, [self.num_probes])
        record = jnp.concatenate([along, weights, share, alpha[None]])
        record = finite_or_none(record, is_known)
        return info._replace(record=record, is_taken=is_taken(record))

    @property
    def _uses_eps(self):
        return self.curvature == "difference"


def _floats(hessian: Any, zero: jax.Array) -> jax.Array:
    """Read where it is needed: a compiler would take the roots of all leaves out of a loop."""
    if not is_quantized(hessian):
        return hessian + zero.astype(hessian.dtype)
    codes = hessian.codes | zero.astype(hessian.codes.dtype)
    return decode(dataclasses.replace(hessian, codes=codes))
