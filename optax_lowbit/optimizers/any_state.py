"""The state of any optax transform, kept in few bits between steps."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from optax_lowbit.moments.policy import Policy
from optax_lowbit.moments.presets import FIRST_MOMENT_4BIT, SECOND_MOMENT_4BIT
from optax_lowbit.moments.storage import checked_policy
from optax_lowbit.optimizers import any_init, any_update
from optax_lowbit.optimizers.leafwise import checked_transform
from optax_lowbit.optimizers.state_fields import Fields, Kind, checked_fields, moments_by_name
from optax_lowbit.quant import QuantSpec


def quantize_state(
    tx: optax.GradientTransformation,
    policy: Policy | None = None,
    *,
    fields: Fields | None = None,
    key: jax.Array | int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Any optax transform, with the moments of its state kept in 4 bits between steps.

    With :math:`Q` quantization and :math:`Q^{-1}` its inverse, a step is that of ``tx`` in float32:

    .. math::
      u_t,\, s_t = \mathrm{tx}\left(g_t,\, Q^{-1}(\bar s_{t-1}),\, p_t\right), \qquad
      \bar s_t = Q(s_t)

    so the update comes from the new moments before they are quantized. The state is of the
    structure that ``tx`` gives it, with :class:`~optax_lowbit.QuantizedArray` leaves. Which of its
    fields are moments is told by their names, and which parameter a leaf belongs to by its path.
    Everything else (iterates, snapshots of parameters, accumulated gradients, quasi-Newton
    memories) stays in float32; :func:`describe` says why. A leaf that a step leaves as it was keeps
    its codes.

    **Memory.** ``0.5 + 4/128`` bytes an element of a signed moment; ``0.5`` and one float32 for
    each row and each column of a non-negative one. Where the update of a leaf depends on the other
    leaves only by what is in float32 (gradients, parameters, counters, the norm of all gradients),
    leaves are stepped one after the other: an elementwise step never has more than a tile of a
    leaf's moments in float32, another step (LAMB, Muon) no more than what one leaf needs. Where it
    depends on other leaves' moments, or is behind a `jax.lax.cond`, the whole state is in float32
    during the step.

    Args:
      tx: Any transform, a chain of them, or an :class:`optax.MultiSteps`. Transforms of this
        library are in few bits already, and not for this.
      policy: Which leaves are quantized at all, and exceptions, by path and by field; None: those
        of more than 4096 elements, in 4 bits.
      fields: What fields of the state are by name, in addition to what is known of optax's:
        ``"signed"``, ``"nonnegative"``, or None for no moment.
      key: A `jax.random.key` or a seed; needed if a spec of the policy rounds stochastically. Draws
        are numbered by the state's first field of the name ``count``.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`. Gradients, parameters and
      state enter ``tx`` in float32, whatever their dtype; updates come back in that of the
      gradients. Extra arguments are passed on. If no leaf is quantized it is ``tx`` itself.

    Raises:
      TypeError, ValueError: If ``tx`` is no transform, ``policy``, ``fields`` or ``key`` are
        impossible, or the key is missing; at init, if a moment can't be told whose it is, as within
        :func:`optax.flatten`, or a spec rounds stochastically and the state has no ``count``.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_lowbit
      >>> params = {"w": jnp.ones((128, 256)), "b": jnp.zeros(256)}
      >>> tx = optax_lowbit.quantize_state(optax.lamb(1e-3))
      >>> state = tx.init(params)
      >>> state[0].mu["w"].nbytes, state[0].mu["b"].nbytes
      (17408, 1024)
      >>> updates, state = tx.update(params, state, params)

      The field of a transform of one's own:

      >>> tx = optax_lowbit.quantize_state(optax.rprop(1e-3), fields={"prev_updates": "signed"})
      >>> optax_lowbit.is_quantized(tx.init(params)[0].prev_updates["w"])
      True

    References:
      Li et al, `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_,
      2023, Algorithm 1, which is stated for any optimizer and was shown for AdamW and SGD. Differs
      in that a leaf left alone keeps its codes.

    .. seealso:: :func:`muon4bit`, and :func:`adamw4bit`, :func:`sgd4bit`, which have kernels
    """
    specs: dict[Kind, QuantSpec | None] = {
        "signed": FIRST_MOMENT_4BIT,
        "nonnegative": SECOND_MOMENT_4BIT,
    }
    return low_bit_state(tx, specs, policy, fields, key)


def low_bit_state(
    tx: Any,
    specs: Mapping[Kind, QuantSpec | None],
    policy: Policy | None,
    fields: Fields | None,
    key: jax.Array | int | None,
) -> optax.GradientTransformationExtraArgs:
    """:func:`quantize_state` with given specs for moments of either kind."""
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    inner, fields = checked_transform(tx), checked_fields(fields)
    policy = checked_policy(moments_by_name(fields, specs), policy, key)

    def init_fn(params):
        return any_init.init_state(inner.init, params, specs, fields, policy, key)

    def update_fn(updates, state, params=None, **extra_args):
        return any_update.update_state(inner.update, updates, state, params, extra_args, key)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
