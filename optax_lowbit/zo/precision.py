"""Whether weights of few bits can tell a perturbed parameter from the parameter."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowbit.zo.checks import is_concrete
from optax_lowbit.zo.directions import Trainable

# A perturbation of so many units in the last place has a cosine of 0.9995 with what rounding leaves
# of it.
SENSIBLE_ULPS = 10


def warn_of_small_eps(params: Trainable, eps: Any) -> None:
    """Warns if ``eps`` is under ten units in the last place of a leaf's typical weight.

    Only of what is known: not inside `jax.jit`. Leaves in float32 are not looked at.

    Args:
      params: The leaves.
      eps: How far a loss is evaluated from them.
    """
    if not is_concrete(eps):
        return
    found = []
    for path, leaf in zip(params.paths, params.leaves, strict=True):
        if leaf.dtype not in (jnp.bfloat16, jnp.float16) or not is_concrete(leaf) or not leaf.size:
            continue
        least = float(least_eps(leaf))
        if float(eps) < least:
            found.append((least, path, leaf.dtype))
    if found:
        least, path, dtype = max(found, key=lambda pair: pair[0])
        warnings.warn(
            f"eps={float(eps):.1e} is under {SENSIBLE_ULPS} ulp of the weights of {len(found)} "
            f"leaves, so rounding changes the directions that the loss is probed along; worst is "
            f"{path!r} in {dtype}, for which eps should be at least {least:.1e}",
            stacklevel=4,
        )


@jax.jit
def least_eps(leaf: jax.Array) -> jax.Array:
    """The least ``eps`` that a leaf's dtype resolves: ten times ``rms(w) * finfo.epsneg``."""
    rms = jnp.sqrt(jnp.mean(jnp.square(leaf.astype(jnp.float32))))
    return jnp.float32(SENSIBLE_ULPS * float(jnp.finfo(leaf.dtype).epsneg)) * rms
