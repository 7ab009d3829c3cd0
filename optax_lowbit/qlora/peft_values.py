"""Leaves that train themselves as PEFT's tensors: biases, and those of ``modules_to_save``."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_lowbit.adapters.sites import first_found
from optax_lowbit.kernels.reference import widened
from optax_lowbit.qlora.peft_files import Matrices, Names, modules_of

# PEFT keeps what it adapts under this name in the place of the module.
_BASE = "base_layer"


def is_bias(leaf: str) -> bool:
    """Whether a leaf is called a bias, as PyTorch calls it."""
    return leaf.split("/")[-1] == "bias"


def read_values(others: Mapping[str, Any], names: Names) -> dict[str, dict[str, Any]]:
    """The leaves that train themselves, in float32.

    Args:
      others: Tensors by their PyTorch names.
      names: Leaf of the tree -> its module, or the modules of a stack.

    Returns:
      By leaf ``{"value": ...}``. A leaf named `kernel` is a weight transposed, one named `bias` a
      bias, any other a weight as it is.

    Raises:
      ValueError: If a tensor is no leaf's, or a leaf has tensors for a part of its stack.
    """
    left, found = dict(others), {}
    for leaf in names:
        modules = modules_of(names, leaf)
        keys = [_key(others, module, leaf) for module in modules]
        if not any(keys):
            continue
        if not all(keys):
            missing = [module for module, key in zip(modules, keys, strict=True) if not key]
            raise ValueError(f"{leaf!r} is a stack, of which {missing} have no tensors")
        arrays = [left.pop(key) for key in keys if key]
        arrays = [array.T if _is_kernel(leaf) else array for array in arrays]
        value = arrays[0] if isinstance(names[leaf], str) else np.stack(arrays)
        found[leaf] = {"value": widened(jnp.asarray(value))}
    if left:
        raise ValueError(
            "adapter.others must have tensors of modules in names alone; put others into the model "
            f"and take them out: {sorted(left)}"
        )
    return found


def written_values(
    values: Matrices, names: Names, kernel_axes: Any, adapted: Mapping[str, Any]
) -> dict[str, Any]:
    """The inverse of :func:`read_values`; axes of kernels are put together.

    Args:
      values: By leaf ``{"value": ...}``.
      names: As of :func:`read_values`.
      kernel_axes: As of :class:`~optax_lowbit.adapters.LoRA`.
      adapted: The modules with adapters.

    Raises:
      ValueError: If a leaf is not in ``names``, or its stack is not as long.
    """
    tensors = {}
    for leaf, entry in values.items():
        modules = modules_of(names, leaf)
        if not modules:
            raise ValueError(f"names must have all leaves that train, and not {leaf!r}")
        stack = [entry["value"]] if isinstance(names[leaf], str) else [*entry["value"]]
        if len(stack) != len(modules):
            raise ValueError(f"{leaf!r} must be a stack of {len(modules)}, got {len(stack)}")
        for module, value in zip(modules, stack, strict=True):
            base = f"{module}.{_BASE}" if module in adapted else module
            tensors[f"{base}.{_parameter(leaf)}"] = _as_tensor(leaf, value, kernel_axes)
    return tensors


def _as_tensor(leaf: str, value: Any, kernel_axes: Any) -> Any:
    if _is_kernel(leaf):
        inner, _ = first_found(kernel_axes, leaf, (1, 1))
        return value.reshape(int(np.prod(value.shape[:inner])), -1).T
    return value.reshape(-1) if is_bias(leaf) else value


def _key(others: Mapping[str, Any], module: str, leaf: str) -> str | None:
    keys = (f"{module}.{_parameter(leaf)}", f"{module}.{_BASE}.{_parameter(leaf)}")
    return next((key for key in keys if key in others), None)


def _parameter(leaf: str) -> str:
    return "bias" if is_bias(leaf) else "weight"


def _is_kernel(leaf: str) -> bool:
    return leaf.split("/")[-1] == "kernel"
