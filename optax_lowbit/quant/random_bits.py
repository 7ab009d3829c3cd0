"""Random bits as a function of an element's index: the Threefry-2x32 block cipher.

`jax.random` draws a whole array at once. Large arrays are processed here in tiles, and an array may
be laid out over any mesh, so the bits of an element must follow from its row and column alone.

References:
  Salmon et al, `Parallel Random Numbers: As Easy as 1, 2, 3
  <https://doi.org/10.1145/2063384.2063405>`_, 2011 (20 rounds, as in `jax.random`).
"""

import jax
import jax.numpy as jnp

Key = tuple[jax.Array, jax.Array]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def key_words(key: jax.Array | int) -> Key:
    """The two uint32 words of a Threefry key, given as a typed key, raw key data, or a seed.

    Raises:
      TypeError: If ``key`` is none of these.
      ValueError: If it is a key of another generator, whose bits may depend on the mesh.
    """
    if key is None or isinstance(key, str):
        raise TypeError(f"key must be a jax.random.key or an integer seed, got {key!r}")
    if isinstance(key, int):
        key = jax.random.key(key, impl="threefry2x32")
    if jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
        implementation = str(jax.random.key_impl(key))
        if implementation != "threefry2x32":
            raise ValueError(
                "key must be a threefry2x32 key, whose bits are the same on every mesh; "
                f"got {implementation!r}. Make it with jax.random.key(seed, impl='threefry2x32')."
            )
        key = jax.random.key_data(key)
    if jnp.shape(key) == () and jnp.issubdtype(jnp.result_type(key), jnp.integer):
        key = jax.random.key_data(jax.random.key(key, impl="threefry2x32"))
    if jnp.shape(key) != (2,) or jnp.result_type(key) != jnp.uint32:
        raise TypeError(
            "key must be a jax.random.key, its data (uint32, shape (2,)) or an integer seed, "
            f"got {jnp.result_type(key)} of shape {jnp.shape(key)}"
        )
    return key[0], key[1]


def threefry2x32(key: Key, x0: jax.Array, x1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encrypts the uint32 counters ``(x0, x1)``, elementwise, into two words of random bits."""
    schedule = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = x0 + schedule[0], x1 + schedule[1]
    for i in range(5):
        for distance in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = (x1 << distance | x1 >> 32 - distance) ^ x0
        x0 = x0 + schedule[(i + 1) % 3]
        x1 = x1 + schedule[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1


def fold_in(key: Key, data: jax.Array | int) -> Key:
    """A new key from ``key`` and a number: a counter, or the hash of a leaf's path."""
    return threefry2x32(key, jnp.uint32(0), jnp.asarray(data).astype(jnp.uint32))


def halves(key: Key, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """16 random bits, as uint32, for each pair of uint32 indices.

    One block of the cipher, which has 64, serves four elements of a row, 16 columns apart: so
    vectors of 16 elements and more need no shuffles.
    """
    first, second = threefry2x32(key, rows, columns // 64 * 16 + columns % 16)
    word = jnp.where(columns & 32, second, first)
    return jnp.where(columns & 16, word >> 16, word & 0xFFFF)


def uniform(key: Key, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Float32 uniforms in [0, 1) with 24 bits, one for each pair of uint32 indices."""
    bits, _ = threefry2x32(key, rows, columns)
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def element_indices(
    shape: tuple[int, ...], rows: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Row (over all leading axes, row-major) and column of every element, uint32 of ``shape``.

    ``rows`` are the numbers of the rows, with a last axis of 1, where they are some of another
    array's.
    """
    row = jnp.zeros(shape, jnp.uint32)
    if rows is not None:
        row = jnp.broadcast_to(rows, shape)
    else:
        for axis, size in enumerate(shape[:-1]):
            row = row * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    if not shape:
        return row, jnp.zeros(shape, jnp.uint32)
    return row, jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
