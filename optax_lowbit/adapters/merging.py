"""Trees with adapters in them: beside the frozen matrices, added to them, or taken out again."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from optax_lowbit.adapters.arrays import is_quantized_matrix
from optax_lowbit.adapters.entries import Entry, attached
from optax_lowbit.adapters.lora_matrix import LoRAMatrix, low_rank
from optax_lowbit.kernels.quantized_matrix import QuantizedMatrix, quantize_matrix
from optax_lowbit.kernels.reference import float_dtype, widened
from optax_lowbit.moments.policy import path_name
from optax_lowbit.quant import random_bits

if TYPE_CHECKING:
    from optax_lowbit.adapters.lora import LoRA

# The path of an adapted leaf -> its adapters.
Adapters = Mapping[str, Entry]


def attach(lora: "LoRA", params: Any, adapters: Adapters, key: jax.Array | int | None) -> Any:
    """See :meth:`LoRA.attach`."""
    words = None if key is None else random_bits.key_words(key)

    def put(path, leaf, entry):
        return attached(lora, path, leaf, entry, words)

    return map_adapted(put, params, adapters)


def merge(lora: "LoRA", params: Any, adapters: Adapters) -> Any:
    """See :meth:`LoRA.merge`."""

    def put(path, leaf, entry):
        new = attached(lora, path, leaf, entry)
        return new.merged() if isinstance(new, LoRAMatrix) else new

    return map_adapted(put, params, adapters)


def requantize(lora: "LoRA", params: Any, adapters: Adapters) -> tuple[Any, dict[str, jax.Array]]:
    """See :meth:`LoRA.requantize`."""
    errors = {}

    def put(path, leaf, entry):
        new = attached(lora, path, leaf, entry)
        if not isinstance(new, LoRAMatrix):
            return new
        if not is_quantized_matrix(leaf):
            return new.merged()
        matrix, errors[path] = requantized(new.merged(), leaf)
        return matrix

    return map_adapted(put, params, adapters), errors


def unmerge(lora: "LoRA", params: Any, adapters: Adapters) -> Any:
    """See :meth:`LoRA.unmerge`."""

    def take_out(path, leaf, entry):
        check_unmergeable(path, leaf, entry)
        new = attached(lora, path, leaf, entry)
        dtype = float_dtype(leaf.dtype)
        added = low_rank(new.a, new.b, new.scale, dtype).reshape(leaf.shape)
        return (leaf.astype(dtype) - added).astype(leaf.dtype)

    return map_adapted(take_out, params, adapters)


def check_unmergeable(path: str, leaf: Any, entry: Entry) -> None:
    """Raise ValueError if what was merged into a leaf cannot be taken out."""
    for name in ("value", "magnitude"):
        if name in entry:
            raise ValueError(
                f"adapters[{path!r}] has a {name}, which merging wrote over: keep what was before"
            )
    if is_quantized_matrix(leaf):
        raise ValueError(f"params must be merged, and {path!r} is in few bits")


def map_adapted(fun: Callable[[str, Any, Entry], Any], params: Any, adapters: Adapters) -> Any:
    """The tree with ``fun(path, leaf, adapters of it)`` for each leaf that has some.

    Raises:
      ValueError: If adapters have no leaf.
    """
    left = dict(adapters)

    def visit(path, leaf):
        name = path_name(path)
        entry = left.pop(name, None)
        return leaf if entry is None else fun(name, leaf, entry)

    tree = jax.tree_util.tree_map_with_path(visit, params, is_leaf=is_quantized_matrix)
    if left:
        raise ValueError(f"adapters must be of leaves of params, which has no {sorted(left)}")
    return tree


def requantized(w: jax.Array, like: QuantizedMatrix) -> tuple[QuantizedMatrix, jax.Array]:
    """``w`` as ``like`` is stored, and the error of that, relative to the norm of ``w``."""
    matrix = quantize_matrix(w, like.spec, backend=like.backend)
    wide = widened(w)
    norm = jnp.linalg.norm(wide.reshape(-1))
    error = jnp.linalg.norm((widened(matrix.dequantize()) - wide).reshape(-1))
    return matrix, error / jnp.where(norm > 0, norm, 1)
