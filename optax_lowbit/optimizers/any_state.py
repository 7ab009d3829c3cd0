"""The state of any optax transform, kept in few bits between steps."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_lowbit.optimizers import any_init, any_update
from optax_lowbit.optimizers.leafwise import checked_policy
from optax_lowbit.optimizers.policy import Policy
from optax_lowbit.optimizers.presets import FIRST_MOMENT_4BIT, SECOND_MOMENT_4BIT
from optax_lowbit.optimizers.state_fields import Fields, Kind, checked_fields, moments_by_name
from optax_lowbit.quant import QuantSpec


def quantize_state(
    tx: optax.GradientTransformation,
    policy: Policy | None = None,
    *,
    fields: Fields | None = None,
    key: jax.Array | int | None = None,
) -> optax.GradientTransformationExtraArgs:
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
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise TypeError(f"tx must be an optax.GradientTransformation, got {type(tx).__name__}")
    fields = checked_fields(fields)
    moments = moments_by_name(fields, specs)
    policy = checked_policy(moments, policy, key)
    inner = optax.with_extra_args_support(tx)

    def init_fn(params):
        return any_init.init_state(inner.init, params, moments, fields, policy, key)

    def update_fn(updates, state, params=None, **extra_args):
        return any_update.update_state(inner.update, updates, state, params, extra_args, key)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
