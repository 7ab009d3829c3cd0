"""Random directions: each element a function of a key, its row and its column.

Bits are those of Threefry-2x32 in counter mode (:mod:`optax_lowbit.quant.random_bits`), so noise is
the same on every mesh, in any order of leaves, and can be made for a few rows alone. A leaf's key
comes from its path.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optax_lowbit.kernels.meshes import as_varying, varying_axes
from optax_lowbit.quant import random_bits
from optax_lowbit.zo.rows import Rows

_ONE = 0x3F800000  # the bits of float32 1.0
_SIGN = 0x80000000


class Probe(NamedTuple):
    """What the direction of a leaf is drawn from.

    Attributes:
      key: Of this leaf, in this probe of this step: two uint32 words.
      run: Of the whole run, for what is drawn anew only every so many steps.
      step: int32 ``()``: steps taken before this one.
      prepared: What :meth:`Noise.prepare` gave.
      zero: uint32 ``()``: 0, which delays a drawing that it is added to the key of; ``key`` has it.
    """

    key: random_bits.Key
    run: random_bits.Key
    step: jax.Array
    prepared: Any = ()
    zero: jax.typing.ArrayLike = 0


class Factors(NamedTuple):
    """A direction's rows as a product ``left @ right.T``, which need not be formed.

    Attributes:
      left: float32 ``(..., rank)``: has the leading axes of the rows.
      right: float32 ``(n, rank)``, for ``n`` columns: the same for all probes of a step.
      before: ``right`` of the interval before, where the noise can tell.
    """

    left: jax.Array
    right: jax.Array
    before: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Noise:
    """A distribution of directions ``z`` with ``E[z z^T] = I`` on what it spans.

    Attributes:
      has_unit_squares: Whether every element of ``z`` is 1 or -1.
      uses: Names of the moments that :meth:`draw` is given in ``rows.companions``.
    """

    has_unit_squares: ClassVar[bool] = False
    uses: ClassVar[tuple[str, ...]] = ()

    def prepare(self, prepared: Any, params: Any, run: random_bits.Key, step: jax.Array) -> Any:
        """What :attr:`Probe.prepared` is in a step: small arrays.

        Args:
          prepared: What it was in the step before; ``()`` before the first.
          params: The :class:`~optax_lowbit.zo.directions.Trainable`.
          run: The run's key.
          step: Steps taken.
        """
        del params, run, step
        return prepared

    def draw(self, probe: Probe, rows: Rows) -> jax.Array:
        """The direction's rows: float32 of the shape of ``rows.values``."""
        raise NotImplementedError

    def scale(self, probe: Probe, keys: jax.Array, leaves: Sequence[jax.Array]) -> jax.Array:
        """What directions are multiplied with, where that depends on all leaves at once.

        Args:
          probe: What they are drawn from, but for their keys.
          keys: uint32 ``(probes, leaves, 2)``.
          leaves: The arrays that train.

        Returns:
          float32 ``(probes,)``.
        """
        del probe, leaves
        return jnp.ones(len(keys), jnp.float32)

    def factors(self, probe: Probe, rows: Rows) -> Factors | None:
        """What :meth:`draw` is the product of; None where it has full rank."""
        del probe, rows
        return None


@dataclasses.dataclass(frozen=True)
class Rademacher(Noise):
    """Signs, each with probability one half: the least variance of all independent ``z``.

    Examples:
      >>> from optax_lowbit import zo
      >>> opt = zo.zo_sgd(1e-6, noise=zo.Rademacher())
    """

    has_unit_squares: ClassVar[bool] = True

    def draw(self, probe, rows):
        """One word of the cipher is 32 signs of a row."""
        return jax.lax.platform_dependent(
            probe.key, rows, tpu=_signs_one_by_one, default=_unpacked_signs
        ).reshape(rows.values.shape)


@dataclasses.dataclass(frozen=True)
class Gaussian(Noise):
    """Standard normal values, as in MeZO; 20 times the cost of :class:`Rademacher` on a CPU."""

    def draw(self, probe, rows):
        """One word of the cipher is one value."""
        return standard_normal(words(probe.key, rows, columns(rows))).reshape(rows.values.shape)


def columns(rows: Rows) -> int:
    """Elements of a row; 1 of a leaf without axes."""
    return rows.values.shape[-1] if rows.values.ndim else 1


def words(key: random_bits.Key, rows: Rows, count: int) -> jax.Array:
    """uint32 ``(..., count)``: so many words of random bits for each row."""
    numbers = rows.numbers.reshape(*rows.numbers.shape[:-1], 1)
    shape = (*numbers.shape[:-1], count)
    places = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    # The second word would double what there is to compile, and fusion computes it apart.
    return random_bits.threefry2x32(key, jnp.broadcast_to(numbers, shape), places)[0]


def words_once(key: random_bits.Key, rows: Rows, count: int) -> jax.Array:
    """:func:`words` that many elements are made of, each word computed once."""
    return once(key, lambda: words(key, rows, count))


def once(key: random_bits.Key, make: Callable[[], jax.Array]) -> jax.Array:
    """What ``make`` gives, from a key, for many elements that are made of each of its values.

    Fused into what makes them, XLA would run the cipher for every element. A loop can't be fused,
    and one of a single turn is none: so the number of turns is not known to the compiler.
    """
    is_rare = key[0] == jnp.uint32(0xDEADBEEF)  # and then the second turn gives the same
    turns = 1 + is_rare.astype(jnp.int32)
    like = jax.eval_shape(make)
    # Zeros would be made for all leaves at once, before there is a key.
    start = jnp.broadcast_to(key[0].astype(like.dtype), like.shape)
    start = as_varying(start, varying_axes(like))
    return jax.lax.fori_loop(0, turns, lambda _, old: make(), start)


def _unpacked_signs(key: random_bits.Key, rows: Rows) -> jax.Array:
    n = columns(rows)
    return unpack_signs(words_once(key, rows, -(-n // 32)), n)


def _signs_one_by_one(key: random_bits.Key, rows: Rows) -> jax.Array:
    """The same signs, for TPUs: an axis of 32 would be padded to 128 there.

    The cipher runs for each element, in the fusion that reads the leaf. So nothing is written to
    memory, not even what is perturbed: it is an operand of the matmul that uses it.
    """
    n = columns(rows)
    numbers = rows.numbers.reshape(*rows.numbers.shape[:-1], 1)
    shape = (*numbers.shape[:-1], n)
    place = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    word, _ = random_bits.threefry2x32(key, jnp.broadcast_to(numbers, shape), place >> 5)
    bits = (word << (place & 31)) & jnp.uint32(_SIGN) | jnp.uint32(_ONE)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def unpack_signs(words: jax.Array, n: int) -> jax.Array:
    """The first ``n`` signs of each row of uint32 words, 32 in each, as float32 1 and -1."""
    places = jax.lax.broadcasted_iota(jnp.uint32, (*words.shape, 32), words.ndim)
    bits = (words[..., None] << places) & jnp.uint32(_SIGN) | jnp.uint32(_ONE)
    signs = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return whole_rows(signs.reshape(*words.shape[:-1], -1)[..., :n])


def whole_rows(x: jax.Array) -> jax.Array:
    """``x``, each row of it whole on some device, unless it is surely spread word by word.

    Where the shards of a leaf cut words apart, compilers would exchange signs. They are told on
    Explicit meshes by types, and on Auto meshes as far as `jax.set_mesh` says that there is one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.auto_axes or x.shape[-1] % (32 * mesh.size) == 0:
        return x
    anywhere = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*anywhere, None))


def standard_normal(words: jax.Array) -> jax.Array:
    """A standard normal value for each uint32 word, by the inverse of its distribution."""
    mantissa = jax.lax.bitcast_convert_type(words >> 9 | jnp.uint32(_ONE), jnp.float32)
    # Symmetric about zero, and never -1 or 1.
    uniform = (mantissa - jnp.float32(1.5)) * jnp.float32(2) + jnp.float32(2**-23)
    return jnp.float32(2**0.5) * jax.lax.erf_inv(uniform)
