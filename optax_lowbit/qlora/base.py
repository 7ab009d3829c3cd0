"""Which matrices of a model are kept in few bits, and the model with them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from optax_lowbit.adapters.arrays import is_float, is_quantized_matrix, leaves_by_path
from optax_lowbit.adapters.fields import hashable_patterns
from optax_lowbit.adapters.sites import HEAD, first_found, is_convolution
from optax_lowbit.kernels.backends import Backend
from optax_lowbit.kernels.quantized_matrix import NF4, check_spec, quantize_matrix
from optax_lowbit.moments.policy import compiled_pattern, path_name
from optax_lowbit.quant import QuantSpec


def quantize_params(
    params: Any,
    spec: QuantSpec = NF4,
    *,
    targets: str = r"(^|/)kernel$",
    exclude: str = HEAD,
    kernel_axes: Mapping[str, tuple[int, int]] | tuple[tuple[str, tuple[int, int]], ...] = (),
    backend: Backend = "auto",
) -> Any:
    """A tree of parameters with some matrices in few bits.

    For functions that use these leaves as ``x @ w`` alone, directly or as slices of a stack in
    `jax.lax.scan`.

    Args:
      params: Pytree of arrays.
      spec: How to store them.
      targets: A regular expression, searched for in paths such as ``layers/query/kernel``. Of the
        leaves it finds, float ones of two axes are quantized, and stacks of three. Those of
        convolutions stay, as far as a tree shows them: a bias that is not stacked beside a kernel
        that would be, or a name such as `Conv_0`; exclude others.
      exclude: A regular expression; what it finds stays. By default the output layer, as in QLoRA
        and Transformers: its errors are those of the loss.
      kernel_axes: As of :class:`~optax_lowbit.adapters.LoRA`, of kernels with more axes:
        :func:`~optax_lowbit.adapters.linen_kernel_axes` finds those of a linen model's attention.
        They become matrices of ``n`` and ``m``, or stacks of them.
      backend: What multiplies, a :data:`~optax_lowbit.kernels.backends.Backend`; to compile for a
        platform that this process does not have, it must be named.

    Returns:
      A tree like ``params``, with :class:`QuantizedMatrix` for these leaves.

    Raises:
      TypeError, ValueError: If an argument is impossible, or nothing is a target.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_lowbit import qlora
      >>> params = {"query": {"kernel": jnp.ones((64, 64)), "bias": jnp.zeros(64)}}
      >>> base = qlora.quantize_params(params)
      >>> (jnp.ones((1, 64)) @ base["query"]["kernel"]).shape
      (1, 64)
    """
    chosen = _chooser(spec, targets, exclude)
    patterns = hashable_patterns("kernel_axes", kernel_axes)
    leaves, found = leaves_by_path(params), []

    def visit(path, leaf):
        name = path_name(path)
        inner, outer = first_found(patterns, name, (1, 1))
        is_target = _is_target(leaf, inner + outer) and chosen(name)
        if not is_target or is_convolution(leaves, name, (inner, outer)):
            return leaf
        found.append(name)
        stack = leaf.ndim - inner - outer
        n, m = math.prod(leaf.shape[stack:-outer]), math.prod(leaf.shape[-outer:])
        return quantize_matrix(leaf.reshape(*leaf.shape[:stack], n, m), spec, backend=backend)

    tree = jax.tree_util.tree_map_with_path(visit, params, is_leaf=is_quantized_matrix)
    if not found:
        raise ValueError(f"targets={targets!r} must be found in the path of a matrix; none is")
    return tree


def quantize_model(
    model: Any,
    spec: QuantSpec = NF4,
    *,
    targets: str = "",
    exclude: str = HEAD,
    backend: Backend = "auto",
) -> Any:
    """A Flax NNX model whose linear layers that are targets have kernels in few bits.

    An `nnx.Linear` becomes a `QLinear`, an `nnx.LinearGeneral`, of which attention is made, a
    `QLinearGeneral`: its kernel is a matrix of the axes that are summed over, and those that are
    not. `LoRA.wrap` takes both, and their parameters' metadata stay.

    Args:
      model: An `nnx.Module`. It is left as it is; the new model shares its other variables. Kernels
        may be in few bits already, as from files or :func:`quantize_params`: they stay as they are,
        and their layers take them, whatever is a target; for these alone it is ``"^$"``.
      spec: How to store kernels.
      targets: A regular expression, searched for in paths such as ``layers/query/kernel``; by
        default all.
      exclude: As in :func:`quantize_params`.
      backend: As in :func:`quantize_params`.

    Returns:
      The new model.

    Raises:
      TypeError, ValueError: If an argument is impossible, no layer is a target, or one is a layer
        of a subclass, which may compute something else, or has batch axes, ``dot_general``,
        ``preferred_element_type`` or ``promote_dtype`` of its own.

    Examples:
      >>> from flax import nnx
      >>> from optax_lowbit import adapters, qlora
      >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu)
      >>> model = adapters.LoRA(targets="kernel").wrap(qlora.quantize_model(model), key=0)
      >>> [variable.shape for _, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))]
      [(8, 64), (8, 64)]
    """
    from flax import nnx

    from optax_lowbit.qlora.layers import LAYERS, QuantizedLayer, check_layer, kernel_matrix

    chosen = _chooser(spec, targets, exclude)
    found = []

    def quantized(path, node):
        if not isinstance(node, tuple(LAYERS)) or isinstance(node, QuantizedLayer):
            return node
        name, kernel = "/".join(map(str, (*path, "kernel"))), node.kernel.get_value()
        if not is_quantized_matrix(kernel) and not chosen(name):
            return node
        check_layer(name, node)
        found.append(name)
        matrix: Any = kernel_matrix(name, node, kernel)
        if not is_quantized_matrix(kernel):
            matrix = quantize_matrix(matrix, spec, backend=backend)
        return LAYERS[type(node)](node, matrix)

    result = nnx.recursive_map(quantized, model)
    if not found:
        raise ValueError(f"targets={targets!r} must be found in the path of a layer; none is")
    return result


def _is_target(leaf: Any, axes: int) -> bool:
    """Whether it can be quantized: float matrices and stacks of them."""
    return is_float(leaf) and leaf.ndim - axes in (0, 1) and not is_quantized_matrix(leaf)


def _chooser(spec: QuantSpec, targets: str, exclude: str) -> Callable[[str], bool]:
    check_spec(spec)
    chosen, left = compiled_pattern("targets", targets), compiled_pattern("exclude", exclude)
    return lambda path: bool(chosen.search(path)) and not left.search(path)
