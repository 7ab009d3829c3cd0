"""What adapters start as, and what they leave of the matrix they start from."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowbit.adapters.arrays import dequantized, is_quantized_matrix
from optax_lowbit.adapters.lora_matrix import low_rank
from optax_lowbit.adapters.sites import Site
from optax_lowbit.kernels.quantized_matrix import quantize_matrix
from optax_lowbit.kernels.reference import widened
from optax_lowbit.quant import random_bits

# Float (..., n, m) -> (..., r, n), (..., r, m).
Pair = tuple[jax.Array, jax.Array]

# Beside the SVD of a matrix itself: columns of the sketch beyond the rank.
_OVERSAMPLING = 8


def fresh_pair(site: Site, words: random_bits.Key, *, gaussian: bool) -> Pair:
    """Adapters that add nothing yet.

    ``A`` is random and ``B`` zero. A row of an embedding's ``A`` gets a gradient only where its
    token is, so there ``A`` is zero and ``B`` random.

    References:
      Hu et al, `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, Section 4.1. Distributions are
      those of its released code and of PEFT: Kaiming's uniform with ``a = sqrt(5)``, or a normal
      one of deviation ``1 / r``; of embeddings, a standard normal one.
    """
    a_shape, b_shape = site.shapes()["a"], site.shapes()["b"]
    if site.is_table:
        return jnp.zeros(a_shape, jnp.float32), normal(words, b_shape)
    if gaussian:
        a = normal(words, a_shape) / jnp.float32(site.rank)
    else:
        a = (2 * uniform(words, a_shape) - 1) * jnp.float32(1 / math.sqrt(site.n))
    return a, jnp.zeros(b_shape, jnp.float32)


def pissa(w: jax.Array, rank: int, scale: float, svd: Callable[..., Any]) -> Pair:
    """The largest singular values and vectors: ``scale A^T B`` is the nearest matrix of this rank.

    References:
      Meng et al, `PiSSA <https://arxiv.org/abs/2404.02948>`_, 2024, equations 2 to 4.
    """
    u, s, vt = svd(w)
    rank = min(rank, s.shape[-1])
    roots = jnp.sqrt(s[..., :rank] / scale)[..., None]
    return roots * u[..., :rank].mT, roots * vt[..., :rank, :]


def olora(w: jax.Array, rank: int) -> Pair:
    """The first rows and columns of a QR decomposition of ``W^T``: ``B`` is orthonormal.

    References:
      Büyükakyüz, `OLoRA <https://arxiv.org/abs/2406.01775>`_, 2024; the scale is left out of ``A``
      and ``B``, as in PEFT.
    """
    q, r = jnp.linalg.qr(w.mT)
    return r[..., :rank, :], q[..., :, :rank].mT


def loftq(w: jax.Array, base: Any, site: Site, iterations: int) -> tuple[Any, Pair]:
    """A base in few bits and adapters that together are near to ``w``.

    In turns: the adapters are the nearest to what the base leaves of ``w``, and the base that to
    what the adapters leave. The first base is the given one.

    References:
      Li et al, `LoftQ <https://arxiv.org/abs/2310.08659>`_, 2023, Algorithm 1. In PEFT the scale is
      left out, which is right for ``alpha = r`` alone; here the adapters are divided by it.
    """
    a = b = None
    for _ in range(iterations):
        if a is not None and b is not None:
            rest = w - low_rank(a, b, site.scale, w.dtype)
            base = quantize_matrix(rest.astype(base.dtype), base.spec, backend=base.backend)
        a, b = pissa(w - widened(base.dequantize()), site.rank, site.scale, exact_svd)
    assert a is not None and b is not None
    return base, (a, b)


def starting_point(
    init: str, site: Site, leaf: Any, words: random_bits.Key, weights: Any, iterations: int
) -> tuple[Any, Pair]:
    """The base to freeze and its adapters.

    Args:
      init: "pissa", "pissa_niter_N", "olora" or "loftq".
      site: Where the adapters are.
      leaf: The base as it is, floats or a :class:`QuantizedMatrix`.
      words: For random numbers.
      weights: What ``leaf`` was quantized from, or None for what it dequantizes to.
      iterations: Of LoftQ.
    """
    original = dequantized(leaf if weights is None else weights)
    w = widened(original).reshape(*site.stack, site.n, site.m)
    if init == "loftq":
        base, (a, b) = loftq(w, leaf, site, iterations)
        return base, _filled(a, b, site)
    if init == "olora":
        a, b = olora(w, site.rank)
    else:
        a, b = pissa(w, site.rank, site.scale, _svd_of(init, site, words))
    rest = w - low_rank(a, b, site.scale, w.dtype)
    if is_quantized_matrix(leaf):
        base = quantize_matrix(rest.astype(leaf.dtype), leaf.spec, backend=leaf.backend)
        return base, _filled(a, b, site)
    return rest.reshape(leaf.shape).astype(leaf.dtype), _filled(a, b, site)


def exact_svd(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``U``, singular values, ``V^T``."""
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return u, s, vt


def sketched_svd(
    w: jax.Array, columns: int, iterations: int, words: random_bits.Key
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As :func:`exact_svd`, approximately, of the largest singular values.

    References:
      Halko et al, `Finding Structure with Randomness <https://arxiv.org/abs/0909.4061>`_, 2009,
      Algorithms 4.4 and 5.1.
    """
    columns = min(columns, *w.shape[-2:])
    sketch = normal(words, (*w.shape[:-2], w.shape[-1], columns)).astype(w.dtype)
    q, _ = jnp.linalg.qr(jnp.matmul(w, sketch, precision="highest"))
    for _ in range(iterations):
        q, _ = jnp.linalg.qr(jnp.matmul(w.mT, q, precision="highest"))
        q, _ = jnp.linalg.qr(jnp.matmul(w, q, precision="highest"))
    u, s, vt = exact_svd(jnp.matmul(q.mT, w, precision="highest"))
    return jnp.matmul(q, u, precision="highest"), s, vt


def normal(words: random_bits.Key, shape: tuple[int, ...]) -> jax.Array:
    """Float32 standard normal numbers, each a function of its index."""
    # The middles of 2^24 intervals of (-1, 1): neither end is reached.
    middles = 2 * uniform(words, shape) - 1 + jnp.float32(2**-24)
    return jnp.float32(2**0.5) * jax.lax.erf_inv(middles)


@functools.partial(jax.jit, static_argnames="shape")
def uniform(words: random_bits.Key, shape: tuple[int, ...]) -> jax.Array:
    """Float32 uniforms in [0, 1), each a function of its index."""
    return random_bits.uniform(words, *random_bits.element_indices(shape))


def _svd_of(init, site, words):
    if init == "pissa":
        return exact_svd
    iterations = int(init.removeprefix("pissa_niter_"))
    return lambda w: sketched_svd(w, site.rank + _OVERSAMPLING, iterations, words)


def _filled(a, b, site):
    """With rows of zeros, where the rank is above that of the matrix."""

    def fill(x):
        missing = site.rank - x.shape[-2]
        widths = [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)]
        return jnp.pad(x, widths).astype(jnp.float32)

    return fill(a), fill(b)
