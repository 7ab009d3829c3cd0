"""AdamW with a 4-bit first moment and a factored second moment."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_lowbit.kernels.backends import Backend, checked
from optax_lowbit.kernels.means import ManualAxes, mean, square_means
from optax_lowbit.kernels.meshes import axes_to_exchange
from optax_lowbit.kernels.steps import FusedAdam, step_leaf
from optax_lowbit.moments.policy import Policy
from optax_lowbit.moments.presets import FIRST_MOMENT_4BIT, SECOND_MOMENT_4BIT
from optax_lowbit.moments.storage import FactoredMoment, Moment, checked_policy, init_moment
from optax_lowbit.optimizers.descent import Mask, descend
from optax_lowbit.optimizers.leafwise import (
    Leaf,
    low_bit_transformation,
    record_backends,
    under_standard_promotion,
    update_state,
)
from optax_lowbit.quant import QuantSpec
from optax_lowbit.quant.scaling import divide


def scale_by_factor4bit(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    eps1: jax.typing.ArrayLike = 1e-30,
    mu_spec: QuantSpec | None = FIRST_MOMENT_4BIT,
    nu_spec: QuantSpec | None = SECOND_MOMENT_4BIT,
    policy: Policy | None = None,
    key: jax.Array | int | None = None,
    backend: Backend = "auto",
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by Adam with a 4-bit first and a factored second moment.

    The second moment of a matrix (leading axes are batch axes) is that of rank one with the row and
    column means of the squared gradients:

    .. math::
      r_t &= \beta_2 r_{t-1} + (1-\beta_2)\, \mathrm{mean}_{col}(g_t^2 + \varepsilon_1), \qquad
      c_t = \beta_2 c_{t-1} + (1-\beta_2)\, \mathrm{mean}_{row}(g_t^2 + \varepsilon_1) \\
      v_t &= \frac{r_t}{\mathrm{mean}(r_t)}\, c_t, \qquad
      u_t = \hat m_t / \left(\sqrt{\hat v_t + \bar\varepsilon} + \varepsilon\right)

    where :math:`v_t = 0` if :math:`\mathrm{mean}(r_t) = 0`. Vectors, and leaves that a rule
    gives a spec for ``nu``, have their second moment as in :func:`scale_by_adam4bit`.

    **Memory.** ``0.5 + 4/128`` bytes an element for the first moment and one float32 for each row
    and column: 0.533 on a 4096x4096 leaf, against 8 for Adam in float32.

    Args:
      b1, b2, eps, eps_root, mu_dtype, nesterov: As in :func:`optax.scale_by_adam`.
      eps1: Added to squared gradients, as in Adafactor.
      mu_spec: How the first moment is stored; None: not quantized.
      nu_spec: How second moments of large vectors are stored; None: not quantized.
      policy: As in :func:`scale_by_adam4bit`; leaves too small to quantize are not factored either.
      key: A `jax.random.key` or a seed; needed if a spec rounds stochastically.
      backend: As in :func:`scale_by_adam4bit`. Row and column means are XLA's but on a CPU.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`. Its state is an
      :class:`optax.ScaleByAdamState` whose ``nu`` has :class:`FactoredMoment` leaves.

    Raises:
      TypeError, ValueError: If a spec or the policy is none, or a key is missing.

    Examples:
      >>> import jax.numpy as jnp, optax_lowbit
      >>> state = optax_lowbit.scale_by_factor4bit().init(jnp.ones((128, 256)))
      >>> state.nu.rows.shape, state.nu.columns.shape
      ((128, 1), (1, 256))

    References:
      Li et al, `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_,
      2023, Section 4.3; Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018,
      Algorithm 4 for the second moment. Differs from the paper's code in ``eps1``, without which a
      matrix whose gradient is zero becomes NaN.
    """
    moments = {
        "mu": Moment(mu_spec, dtype=mu_dtype),
        "nu": Moment(nu_spec, nonnegative=True, factored=True),
    }
    policy, names = checked_policy(moments, policy, key), tuple(moments)
    checked(backend)
    full = under_standard_promotion(optax.scale_by_adam(b1, b2, eps, eps_root, nesterov=nesterov))
    fused = FusedAdam(b1, b2, eps, eps_root, nesterov)

    def init_fn(params):
        fields = {name: init_moment(name, m, params, policy) for name, m in moments.items()}
        record_backends(fused, backend, params, fields)
        return full.init(())._replace(**fields)

    def step_all(updates, state, descents=None):
        count = optax.safe_increment(state.count)

        def factored_step(grad, leaf_moments, factors) -> tuple[Any, dict[str, Any]]:
            row_shares, columns = factors
            with jax.numpy_dtype_promotion("standard"):  # as in optax: float64 gradients stay so
                mu = optax.tree.update_moment(grad, leaf_moments["mu"], b1, 1)
                mu_hat = _first_moment_estimate(grad, mu, b1, count, nesterov)
                nu_hat = optax.tree.bias_correction(row_shares * columns, b2, count)
                return mu_hat / (jnp.sqrt(nu_hat + eps_root) + eps), {"mu": mu}

        def step_one(leaf: Leaf, adam_step, scalars):
            grad, leaf_moments, key, descent, name = leaf
            nu, factors, step = leaf_moments["nu"], None, adam_step
            if isinstance(nu, FactoredMoment):
                axes = _manual_axes(grad, nu)
                nu = _update_means(grad, nu, b2, eps1, backend, axes)
                factors, step = (_shares(nu.rows, axes), nu.columns), factored_step
                leaf_moments = {"mu": leaf_moments["mu"]}
            result, new = step_leaf(
                step, fused, backend, scalars, grad, leaf_moments, key, factors, descent, name
            )
            return result, new if factors is None else {**new, "nu": nu}

        return update_state(full, updates, state, names, key, step_one, fused, descents)

    return low_bit_transformation(init_fn, step_all)


def factor4bit(
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
    eps1: jax.typing.ArrayLike = 1e-30,
    mu_spec: QuantSpec | None = FIRST_MOMENT_4BIT,
    nu_spec: QuantSpec | None = SECOND_MOMENT_4BIT,
    policy: Policy | None = None,
    key: jax.Array | int | None = None,
    backend: Backend = "auto",
) -> optax.GradientTransformationExtraArgs:
    """AdamW with a 4-bit first and a factored second moment, the paper's 4-bit Factor.

    Args:
      learning_rate: A fixed learning rate or a schedule.
      b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov: As in :func:`optax.adamw`.
      eps1, mu_spec, nu_spec, policy, key, backend: As in :func:`scale_by_factor4bit`.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_lowbit
      >>> state = jax.eval_shape(optax_lowbit.factor4bit(1e-3).init, jnp.ones((4096, 4096)))
      >>> f"{(state[0].mu.nbytes + state[0].nu.nbytes) / 4096**2:.3f} bytes a parameter"
      '0.533 bytes a parameter'

    References:
      Li et al, `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_,
      2023, Section 4.3.

    .. seealso:: :func:`adamw4bit`
    """
    direction = scale_by_factor4bit(
        b1, b2, eps, eps_root, mu_dtype,
        nesterov=nesterov, eps1=eps1, mu_spec=mu_spec, nu_spec=nu_spec,
        policy=policy, key=key, backend=backend,
    )  # fmt: skip
    return descend(direction, learning_rate, weight_decay, mask)


def _first_moment_estimate(grad, mu, b1, count, nesterov):
    """Adam's bias-corrected first moment, with or without Nesterov's look ahead (as in optax)."""
    if not nesterov:
        return optax.tree.bias_correction(mu, b1, count)
    ahead = optax.tree.bias_correction(mu, b1, optax.safe_increment(count))
    return b1 * ahead + (1 - b1) * optax.tree.bias_correction(grad, b1, count)


def _manual_axes(grad: jax.Array, nu: FactoredMoment) -> ManualAxes:
    return ManualAxes(axes_to_exchange(grad, nu.columns), axes_to_exchange(grad, nu.rows))


def _update_means(grad: jax.Array, nu: FactoredMoment, b2, eps1, backend, axes) -> FactoredMoment:
    def decayed(old, mean):
        # One product only: of the two in b2 * old + (1 - b2) * mean the compiler may fuse either
        # one with the sum, and which one depends on how the means were exchanged.
        return old + (1 - b2) * (mean - old)

    rows, columns = square_means(grad, eps1, backend, axes)
    return FactoredMoment(decayed(nu.rows, rows), decayed(nu.columns, columns))


def _shares(rows: jax.Array, axes: ManualAxes) -> jax.Array:
    """Row means over their mean; 0 if that is 0."""
    return divide(rows, mean(lambda x: x, rows, -2, axes.rows))
