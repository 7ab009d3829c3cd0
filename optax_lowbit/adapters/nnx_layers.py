"""Low-rank adapters in Flax NNX layers. Imported only where it is used: it needs Flax."""

from typing import Any

import jax
from flax import nnx

from optax_lowbit.adapters.lora import LoRA, LoRAMatrix, add_low_rank


class LoRALinear(nnx.Module):
    """A linear layer and its adapters: ``base(x) + scale (x a^T) b``.

    Attributes:
      base: The layer, frozen.
      lora_a: `nnx.LoRAParam`, float32 ``(..., r, n)``.
      lora_b: `nnx.LoRAParam`, float32 ``(..., r, m)``.
      scale: A number.
    """

    def __init__(self, base: nnx.Linear, a: jax.Array, b: jax.Array, scale: float):
        self.base = base
        self.lora_a = nnx.LoRAParam(a)
        self.lora_b = nnx.LoRAParam(b)
        self.scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``(..., n)`` to ``(..., m)`` in the base layer's dtype."""
        return add_low_rank(self.base(x), x, self.lora_a[...], self.lora_b[...], self.scale)

    def merged(self) -> nnx.Linear:
        """The base layer with another kernel: ``W + scale a^T b``, in the dtype of ``W``."""
        layer = nnx.clone(self.base)
        kernel = layer.kernel.get_value()
        matrix = LoRAMatrix(kernel, self.lora_a[...], self.lora_b[...], self.scale)
        layer.kernel.set_value(matrix.merged())
        return layer


def wrap_layers(lora: LoRA, model: nnx.Module, key: jax.Array | int) -> nnx.Module:
    """See :meth:`LoRA.wrap`."""
    kernels = {
        _kernel_path(path): layer.kernel
        for path, layer in nnx.iter_graph(model)
        if isinstance(layer, nnx.Linear)
    }
    chosen = set(lora.chosen(kernels))

    def wrapped(path, node):
        name = _kernel_path(path)
        if not isinstance(node, nnx.Linear) or name not in chosen:
            return node
        pair = lora.init_pair(name, node.kernel, key)
        return LoRALinear(node, pair["a"], pair["b"], lora.scale)

    return nnx.recursive_map(wrapped, model)


def unwrap_layers(model: nnx.Module) -> nnx.Module:
    """See :meth:`LoRA.unwrap`."""
    return nnx.recursive_map(
        lambda path, node: node.merged() if isinstance(node, LoRALinear) else node, model
    )


def _kernel_path(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, (*path, "kernel")))
