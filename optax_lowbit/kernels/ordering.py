"""Values that make one part of a program wait for another, which compilers can't see through."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optax_lowbit.kernels.meshes import is_explicit

# By their bytes: integers for the bits of floats.
_WORDS = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def data_zero(x: jax.Array) -> jax.Array:
    """uint32 0, known only when ``x``, a float or a byte ``()``, is."""
    # A product with zero would be folded, and a test for NaN is not always 0.
    bits = x if x.dtype == jnp.uint8 else jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize])
    return bits.astype(jnp.uint8).astype(jnp.uint32) >> 8


def first_element(x: jax.Array) -> jax.Array:
    """An element, to wait for the whole by; on an Explicit mesh, on each device one of its own."""
    if not is_explicit(x):
        return x[(0,) * x.ndim]
    sharding = jax.typeof(x).sharding
    # To look at the same one all devices would have to be told of it.
    return jax.shard_map(
        lambda part: part[(0,) * part.ndim],
        mesh=sharding.mesh, in_specs=sharding.spec, out_specs=PartitionSpec(),
        axis_names=set(sharding.mesh.explicit_axes), check_vma=False,
    )(x)  # fmt: skip
