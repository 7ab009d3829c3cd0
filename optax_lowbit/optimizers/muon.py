"""Muon with 4-bit momentum."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
import optax.contrib

from optax_lowbit.moments.policy import Policy
from optax_lowbit.moments.presets import FIRST_MOMENT_4BIT, SECOND_MOMENT_4BIT
from optax_lowbit.optimizers.any_state import low_bit_state
from optax_lowbit.quant import QuantSpec


def muon4bit(
    learning_rate: optax.ScalarOrSchedule,
    ns_coeffs: Any = (3.4445, -4.7750, 2.0315),
    ns_steps: jax.typing.ArrayLike = 5,
    beta: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Literal["frobenius", "spectral", "aol", "schatten"] = "frobenius",
    adam_b1: jax.typing.ArrayLike = 0.9,
    adam_b2: jax.typing.ArrayLike = 0.999,
    adam_eps_root: jax.typing.ArrayLike = 0.0,
    adam_weight_decay: jax.typing.ArrayLike = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: Any | None = None,
    consistent_rms: jax.typing.ArrayLike | None = None,
    mu_spec: QuantSpec | None = FIRST_MOMENT_4BIT,
    nu_spec: QuantSpec | None = SECOND_MOMENT_4BIT,
    policy: Policy | None = None,
    key: jax.Array | int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon with 4-bit moments: :func:`optax.contrib.muon`, in an eighth of its memory.

    .. math::
      m_t = \beta Q^{-1}(\bar m_{t-1}) + (1 - \beta) g_t, \qquad
      u_t = \mathrm{NewtonSchulz}(\hat m_t), \qquad \bar m_t = Q(m_t)

    for matrices (with Nesterov's look ahead and bias correction as in optax), AdamW for all else.
    Leaves are stepped one after the other, so no more than one leaf's momentum, and what its
    Newton-Schulz iteration needs, is in float32 at a time.

    **Memory.** ``0.5 + 4/128`` bytes an element of a matrix, 0.531, against 4 in float32; of a
    large leaf under AdamW as in :func:`adamw4bit`.

    Args:
      learning_rate, ns_coeffs, ns_steps, beta, eps: As in :func:`optax.contrib.muon`.
      weight_decay, weight_decay_mask, mu_dtype, nesterov: As there.
      adaptive, preconditioning, adam_b1, adam_b2, adam_eps_root, adam_weight_decay: As there.
      adam_learning_rate, muon_weight_dimension_numbers, consistent_rms: As there.
      mu_spec: How momenta of matrices and first moments of AdamW are stored; None: not quantized.
      nu_spec: How second moments of AdamW are stored; None: not quantized.
      policy, key: As in :func:`quantize_state`.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`. Its state is that of
      :func:`optax.contrib.muon` with :class:`~optax_lowbit.QuantizedArray` leaves.

    Raises:
      TypeError, ValueError: If a spec or the policy is none, or a key is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_lowbit
      >>> params = {"kernel": jnp.ones((128, 256)), "bias": jnp.zeros(256)}
      >>> tx = optax_lowbit.muon4bit(1e-2)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> f"{sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 33024:.2f}"
      '0.59'

    References:
      Jordan et al, `Muon: An optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_, 2024; Li et al, `Memory Efficient Optimizers
      with 4-bit States <https://arxiv.org/abs/2309.01507>`_, 2023, Algorithm 1.

    .. seealso:: :func:`quantize_state`
    """
    tx = optax.contrib.muon(
        learning_rate, ns_coeffs, ns_steps, beta, eps, weight_decay, weight_decay_mask, mu_dtype,
        nesterov=nesterov, adaptive=adaptive, preconditioning=preconditioning,
        adam_b1=adam_b1, adam_b2=adam_b2, adam_eps_root=adam_eps_root,
        adam_weight_decay=adam_weight_decay, adam_learning_rate=adam_learning_rate,
        muon_weight_dimension_numbers=muon_weight_dimension_numbers, consistent_rms=consistent_rms,
    )  # fmt: skip
    return low_bit_state(tx, {"signed": mu_spec, "nonnegative": nu_spec}, policy, None, key)
