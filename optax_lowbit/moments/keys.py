"""Keys of random rounding: one for each step, and one for each leaf by its name."""

from typing import Any

import jax

from optax_lowbit.kernels.reference import name_hash
from optax_lowbit.moments.policy import path_name
from optax_lowbit.quant import random_bits


def noise_key(key: jax.Array | int, count: Any) -> random_bits.Key:
    """The key of one step."""
    return random_bits.fold_in(random_bits.key_words(key), count)


def fold_in_path(key: random_bits.Key | None, path: tuple[Any, ...]) -> random_bits.Key | None:
    """The key of one leaf."""
    # Of names, not of positions: adding a leaf leaves the noise of the others alone.
    return None if key is None else random_bits.fold_in(key, name_hash(path_name(path)))
