"""Low-rank adapters of `nnx.Einsum`. Imported only where it is used: it needs Flax."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optax_lowbit.adapters.lora_matrix import LoRAMatrix
from optax_lowbit.adapters.nnx_layers import LoRALayer


class Equation(NamedTuple):
    """An einsum of inputs and a kernel: each letter of the kernel is one of three kinds.

    Attributes:
      inputs: Letters of the inputs.
      kernel: Letters of the kernel.
      outputs: Letters of the outputs.
      stack: Those that inputs, kernel and outputs have: one matrix for each index.
      n: Those that are summed over.
      m: Those that the outputs have from the kernel alone, in the order of the outputs.
    """

    inputs: str
    kernel: str
    outputs: str
    stack: str
    n: str
    m: str

    @property
    def rest(self) -> str:
        """What the outputs have of the inputs alone, with an ellipsis."""
        return "".join(letter for letter in self.outputs if letter not in self.stack + self.m)


def parsed(einsum: str) -> Equation | None:
    """The equation, or None if its kernel is no matrix, or stack of matrices, for the inputs."""
    operands, outputs = einsum.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    stack = "".join(x for x in kernel if x in inputs and x in outputs)
    n = "".join(x for x in kernel if x in inputs and x not in outputs)
    m = "".join(x for x in outputs if x in kernel and x not in inputs)
    is_product = n and m and sorted(stack + n + m) == sorted(kernel)
    are_unique = all(len(set(x)) == len(x) for x in (inputs.replace("...", ""), kernel))
    if not is_product or not are_unique or "." in kernel:
        return None
    return Equation(inputs, kernel, outputs, stack, n, m)


class LoRAEinsum(LoRALayer):
    """An einsum and its adapters: what it computes with ``W + scale a^T b`` as its kernel.

    ``base`` is an `nnx.Einsum`; ``n`` is the product of its kernel's axes that are summed over,
    ``m`` of those that the outputs have from it alone, in their order. Axes that inputs, kernel and
    outputs share are a stack. See :class:`LoRALayer`.
    """

    @staticmethod
    def takes(node: Any) -> bool:
        """See :meth:`LoRALayer.takes`."""
        return isinstance(node, nnx.Einsum) and parsed(node.einsum_str) is not None

    @staticmethod
    def kernel_axes(base: Any) -> tuple[int, int]:
        """See :meth:`LoRALayer.kernel_axes`."""
        equation = _equation(base)
        return len(equation.n), len(equation.m)

    @staticmethod
    def in_order(base: Any, w: jax.Array) -> jax.Array:
        """See :meth:`LoRALayer.in_order`."""
        return w.transpose(_order(base, w.ndim))

    @staticmethod
    def out_of_order(base: Any, w: jax.Array) -> jax.Array:
        """See :meth:`LoRALayer.out_of_order`."""
        return w.transpose(np.argsort(_order(base, w.ndim)))

    def __call__(
        self, x: jax.Array, einsum_str: str | None = None, out_sharding: Any = None
    ) -> jax.Array:
        """Map what the base layer maps, to its dtype.

        Raises:
          ValueError: If the einsum is another than that of the layer.
        """
        if einsum_str not in (None, self.base.einsum_str):
            raise ValueError(
                f"einsum_str must be that of the layer, {self.base.einsum_str!r}, for which its "
                f"adapters were made; got {einsum_str!r}"
            )
        y = self.base(x, out_sharding=out_sharding)
        return self._added(_equation(self.base), x, y)

    def _added(self, equation, x, y):
        kept, m = equation.stack + equation.rest, equation.m
        rows = _transposed(x, equation.inputs, kept, equation.n)
        flat = _transposed(y, equation.outputs, kept, m)
        add: Any = LoRAMatrix.add_to
        for _ in equation.stack:
            add = jax.vmap(add)
        flat = add(self.matrix(), flat, self._dropped_out(rows), self._bias(equation))
        sizes = [self._sizes(equation)[letter] for letter in m]
        return jnp.einsum(f"{kept}{m}->{equation.outputs}", flat.reshape(*flat.shape[:-1], *sizes))

    def _bias(self, equation):
        """As the bias of the matrices: ``(..., m)``."""
        if self.base.bias is None:
            return None
        sizes = self._sizes(equation)
        letters = "".join(letter for letter in equation.outputs if letter in sizes)
        bias = self.base.bias[...].reshape([sizes[letter] for letter in letters])
        return _transposed(bias, letters, equation.stack, equation.m)

    def _sizes(self, equation):
        return dict(zip(equation.kernel, self.base.kernel_shape, strict=True))


def _equation(base: nnx.Einsum) -> Equation:
    equation = parsed(base.einsum_str)
    assert equation is not None
    return equation


def _order(base: nnx.Einsum, ndim: int) -> tuple[int, ...]:
    """Of the axes of a kernel, after those of a stack of layers."""
    equation = _equation(base)
    first = ndim - len(equation.kernel)
    letters = equation.stack + equation.n + equation.m
    return (*range(first), *(first + equation.kernel.index(x) for x in letters))


def _transposed(x: jax.Array, letters: str, kept: str, flat: str) -> jax.Array:
    """With the axes ``kept``, and one for all of ``flat``; what is in neither is summed over."""
    x = jnp.einsum(f"{letters}->{kept}{flat}", x)
    first = x.ndim - len(flat)
    return x.reshape(*x.shape[:first], math.prod(x.shape[first:]))
