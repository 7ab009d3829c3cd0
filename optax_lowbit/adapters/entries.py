"""The adapters of one leaf: made, checked, put on it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from optax_lowbit.adapters.arrays import dequantized, is_float, is_matrix, is_quantized_matrix
from optax_lowbit.adapters.dora import column_norms
from optax_lowbit.adapters.fields import CHANGES_BASE
from optax_lowbit.adapters.initializations import fresh_pair, starting_point
from optax_lowbit.adapters.lora_matrix import LoRAMatrix
from optax_lowbit.adapters.sites import Site, site_of
from optax_lowbit.kernels.reference import name_hash, widened
from optax_lowbit.quant import random_bits

if TYPE_CHECKING:
    from optax_lowbit.adapters.lora import LoRA

# "a" and "b", with DoRA "magnitude", too; or "value", of a leaf that trains itself.
Entry = Mapping[str, jax.Array]


def changes_base(lora: "LoRA") -> bool:
    """Whether the adapters start on another base than the given one."""
    return lora.init_lora_weights.startswith(CHANGES_BASE)


def new_entry(
    lora: "LoRA", site: Site, leaf: Any, key: jax.Array | int, weights: Any = None
) -> tuple[Any, Entry]:
    """What to freeze in the place of ``leaf``, and its adapters.

    Raises:
      ValueError: If LoftQ has nothing in few bits, or no floats that it was quantized from.
    """
    words = random_bits.fold_in(random_bits.key_words(key), name_hash(site.path))
    if changes_base(lora):
        _check_start(lora, site, leaf, weights)
        leaf, (a, b) = starting_point(
            lora.init_lora_weights, site, leaf, words, weights, lora.loftq_iter
        )
    else:
        a, b = fresh_pair(site, words, gaussian=lora.init_lora_weights == "gaussian")
    entry = {"a": a, "b": b}
    if site.has_magnitude:
        entry["magnitude"] = column_norms(leaf, a, b, site.scale).astype(jnp.float32)
    return leaf, entry


def attached(lora: "LoRA", path: str, leaf: Any, entry: Entry, words: Any = None) -> Any:
    """What takes the place of ``leaf``: a :class:`LoRAMatrix`, or a trained value in its dtype.

    Args:
      lora: Which adapters.
      path: That of the leaf.
      leaf: The frozen leaf.
      entry: Its adapters, or a mixture of several.
      words: Of a key for dropout, or None.

    Raises:
      ValueError: If they are not of this leaf.
    """
    if "value" in entry:
        return _value(path, leaf, entry)
    if not is_matrix(leaf):
        raise ValueError(
            f"adapters[{path!r}] must be of a matrix of floats, and params has {path!r} of shape "
            f"{jnp.shape(leaf)}"
        )
    site = site_of(lora, path, leaf)
    check_shapes(site, leaf, entry)
    a, b = pair_of(entry)
    return LoRAMatrix(
        base=leaf,
        a=a,
        b=b,
        scale=site.scale,
        magnitude=entry.get("magnitude"),
        dropout_key=None if words is None else _stacked_words(words, site),
        dropout=0.0 if words is None else lora.dropout,
    )


def pair_of(entry: Entry) -> tuple[jax.Array, jax.Array]:
    """``A`` and ``B``; of a mixture all next to one another, each ``B`` times its weight."""
    a, b, weights = entry["a"], entry["b"], entry.get("weights")
    if weights is None:
        return a, b
    b = b * weights.reshape(*weights.shape, 1, 1).astype(b.dtype)
    a, b = (x.reshape(*x.shape[:-3], -1, x.shape[-1]) for x in (a, b))
    return a, b


def _stacked_words(words, site):
    """A key for each matrix of a stack, or one."""
    words = random_bits.fold_in(words, name_hash(site.path))
    if not site.stack:
        return words
    size = 1
    for axis in site.stack:
        size *= axis
    number = jnp.arange(size, dtype=jnp.uint32).reshape(site.stack)
    return random_bits.threefry2x32(words, jnp.zeros_like(number), number)


def _value(path, leaf, entry):
    value, weights = entry["value"], entry.get("weights")
    shape = value.shape if weights is None else value.shape[1:]
    if not is_float(leaf) or is_quantized_matrix(leaf) or shape != leaf.shape:
        raise ValueError(
            f"adapters[{path!r}] has a value of shape {shape}, and params has {path!r} of shape "
            f"{jnp.shape(leaf)}"
        )
    if weights is not None:
        wide = widened(leaf)
        rows = weights.reshape(-1, *[1] * leaf.ndim).astype(wide.dtype)
        value = wide * (1 - jnp.sum(weights)) + jnp.sum(value * rows, axis=0)
    return value.astype(leaf.dtype)


def check_shapes(site: Site, leaf: Any, entry: Entry) -> None:
    """Raise unless the adapters, or those of a mixture, are of this site."""
    expected, stacked = site.shapes(), len(site.stack)
    if "weights" in entry:
        (count,) = jnp.shape(entry["weights"])[-1:] or (0,)
        expected = {
            name: (*shape[:stacked], count, *shape[stacked:]) for name, shape in expected.items()
        } | {"weights": (*site.stack, count)}
    shapes = {name: jnp.shape(x) for name, x in entry.items()}
    if shapes != expected:
        raise ValueError(
            f"adapters[{site.path!r}] must have shapes {expected}, as params has {site.path!r} of "
            f"shape {leaf.shape} and the rank is {site.rank}; got {shapes}"
        )


def _check_start(lora, site, leaf, weights):
    if lora.init_lora_weights == "loftq" and (weights is None or not is_quantized_matrix(leaf)):
        raise ValueError(
            f"init_lora_weights='loftq' needs {site.path!r} in few bits and, as weights, the "
            f"floats that it was quantized from; got {type(leaf).__name__} and "
            f"{'no weights' if weights is None else type(weights).__name__}"
        )
    if weights is not None and dequantized(weights).shape != leaf.shape:
        raise ValueError(
            f"weights must have {site.path!r} of shape {leaf.shape}, got {weights.shape}"
        )
