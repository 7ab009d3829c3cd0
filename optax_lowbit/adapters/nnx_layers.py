"""Low-rank adapters in Flax NNX layers. Imported only where it is used: it needs Flax."""

import math
from typing import Any

import jax
from flax import nnx

from optax_lowbit.adapters.arrays import is_quantized_matrix
from optax_lowbit.adapters.entries import Entry, pair_of
from optax_lowbit.adapters.lora_matrix import LoRAMatrix
from optax_lowbit.adapters.merging import requantized
from optax_lowbit.kernels.reference import float_dtype, widened


class TrainedParam(nnx.LoRAParam):
    """A variable of the model that trains itself. Its metadata tell what it was before."""


class LoRALayer(nnx.Module):
    """A layer and the adapters of one of its variables.

    Attributes:
      base: The layer, frozen.
      lora_a: `nnx.LoRAParam`, float32 ``(..., r, n)``.
      lora_b: `nnx.LoRAParam`, float32 ``(..., r, m)``.
      lora_magnitude: `nnx.LoRAParam`, float32 ``(..., m)``, or None without DoRA.
      scale: A number.
      dropout: `nnx.Dropout` of what ``lora_a`` is given, or None.
    """

    # The name of the adapted variable of `base`.
    adapted = "kernel"

    @staticmethod
    def takes(node: Any) -> bool:
        """Whether these are the adapters of a node of a model."""
        raise NotImplementedError

    @staticmethod
    def kernel_axes(base: Any) -> tuple[int, int]:
        """How many of the last axes of the adapted variable make ``n``, and how many ``m``."""
        del base
        return 1, 1

    @staticmethod
    def in_order(base: Any, w: jax.Array) -> jax.Array:
        """An array like the adapted variable, with the axes of ``n`` and ``m`` last."""
        del base
        return w

    @staticmethod
    def out_of_order(base: Any, w: jax.Array) -> jax.Array:
        """The inverse of :meth:`in_order`."""
        del base
        return w

    def __init__(self, base: Any, entry: Entry, scale: float, dropout: nnx.Dropout | None = None):
        self.base = base
        self.lora_a = nnx.LoRAParam(entry["a"])
        self.lora_b = nnx.LoRAParam(entry["b"])
        magnitude = entry.get("magnitude")
        self.lora_magnitude = nnx.data(None if magnitude is None else nnx.LoRAParam(magnitude))
        self.scale = scale
        self.dropout = nnx.data(dropout)

    def matrix(self) -> LoRAMatrix:
        """The adapted variable with its adapters."""
        magnitude = self.lora_magnitude
        return LoRAMatrix(
            base=self.in_order(self.base, getattr(self.base, self.adapted).get_value()),
            a=self.lora_a[...],
            b=self.lora_b[...],
            scale=self.scale,
            magnitude=None if magnitude is None else magnitude[...],
        )

    def entry(self) -> dict[str, jax.Array]:
        """The adapters, as those of a tree."""
        entry = {"a": self.lora_a[...], "b": self.lora_b[...]}
        if self.lora_magnitude is not None:
            entry["magnitude"] = self.lora_magnitude[...]
        return entry

    def set_entry(self, entry: Entry) -> None:
        """Other adapters, in place, or those of a mixture."""
        a, b = pair_of(entry)
        # As optimizers know them, whatever the dtype of a file.
        self.lora_a.set_value(widened(a))
        self.lora_b.set_value(widened(b))
        if self.lora_magnitude is not None:
            self.lora_magnitude.set_value(widened(entry["magnitude"]))

    def merged(self) -> Any:
        """The base layer with ``W + scale a^T b``: floats, in the dtype of ``W``."""
        matrix = self.matrix()
        is_float = not is_quantized_matrix(matrix.base)
        layer = nnx.clone(self.base) if is_float else self.base.dequantized()
        variable = getattr(layer, self.adapted)
        # A matrix in few bits may be a kernel with more axes as floats.
        merged = self.out_of_order(layer, matrix.merged()).reshape(variable.shape)
        variable.set_value(merged)
        return layer

    def requantized(self) -> tuple[Any, jax.Array | None]:
        """As :meth:`merged`, but stored as ``W`` is, and the error of that if it is in few bits."""
        matrix = self.matrix()
        if not is_quantized_matrix(matrix.base):
            return self.merged(), None
        few_bits, error = requantized(matrix.merged(), matrix.base)
        layer = nnx.clone(self.base)
        getattr(layer, self.adapted).set_value(few_bits)
        return layer, error

    def _dropped_out(self, x: jax.Array) -> jax.Array:
        return x if self.dropout is None else self.dropout(widened(x))


class LoRALinear(LoRALayer):
    """A linear layer and its adapters: ``base(x) + scale (x a^T) b``.

    ``base`` is an `nnx.Linear`, or an `nnx.LinearGeneral` without batch axes, where ``n`` and ``m``
    are the products of its axes. See :class:`LoRALayer`.
    """

    @staticmethod
    def takes(node: Any) -> bool:
        """See :meth:`LoRALayer.takes`."""
        is_general = isinstance(node, nnx.LinearGeneral) and not node.batch_axis
        return is_general or isinstance(node, nnx.Linear)

    @staticmethod
    def kernel_axes(base: Any) -> tuple[int, int]:
        """See :meth:`LoRALayer.kernel_axes`."""
        if isinstance(base, nnx.LinearGeneral):
            return len(base.in_features), len(base.out_features)
        return 1, 1

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Map what the base layer maps, to its dtype. Further arguments are the base layer's."""
        y = self.base(x, *args, **kwargs)
        rows = in_rows(x, getattr(self.base, "axis", (-1,)))
        flat = y.reshape(*rows.shape[:-1], self.lora_b.shape[-1])
        bias = None if self.base.bias is None else self.base.bias[...].reshape(-1)
        return self.matrix().add_to(flat, self._dropped_out(rows), bias).reshape(y.shape)


class LoRAEmbed(LoRALayer):
    """An embedding and its adapters: ``base(tokens) + scale a^T[tokens] b``.

    ``base`` is an `nnx.Embed`, ``n`` the size of its vocabulary. See :class:`LoRALayer`; tokens are
    not dropped out, as in PEFT.
    """

    adapted = "embedding"

    @staticmethod
    def takes(node: Any) -> bool:
        """See :meth:`LoRALayer.takes`."""
        return isinstance(node, nnx.Embed)

    def __call__(self, tokens: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Map integers ``(...)`` to ``(..., m)`` in the base layer's dtype."""
        return self.matrix().add_rows_to(self.base(tokens, *args, **kwargs), tokens)

    def attend(self, query: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Map ``(..., m)`` to ``(..., n)``: the products with all rows."""
        transposed = self.matrix().T
        query = transposed.scaled(query)
        return transposed.add_to(self.base.attend(query, *args, **kwargs), query)


class LoRAConv(LoRALayer):
    """A convolution and its adapters: ``base(x) + scale conv(x, a) b``.

    ``base`` is an `nnx.Conv` without groups of channels and without a mask. ``conv`` is its
    convolution, to ``r`` channels; ``n`` is the product of the size of a kernel and of the channels
    that come in, ``m`` the channels that go out. See :class:`LoRALayer`.
    """

    @staticmethod
    def takes(node: Any) -> bool:
        """See :meth:`LoRALayer.takes`."""
        is_whole = isinstance(node, nnx.Conv) and node.feature_group_count == 1
        return is_whole and node.mask is None

    @staticmethod
    def kernel_axes(base: Any) -> tuple[int, int]:
        """See :meth:`LoRALayer.kernel_axes`."""
        return len(base.kernel_size) + 1, 1

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Map what the base layer maps, to its dtype. Further arguments are the base layer's."""
        y, matrix = self.base(x, *args, **kwargs), self.matrix()
        dtype = float_dtype(y.dtype)
        low = self._to_rank(dtype)(self._dropped_out(x.astype(dtype))) @ matrix.b.astype(dtype)
        bias = None if self.base.bias is None else self.base.bias[...]
        return matrix.add_product_to(y, low, bias)

    def _to_rank(self, dtype: Any) -> nnx.Conv:
        """The convolution of the base layer with ``a`` as its kernel."""
        layer = nnx.clone(self.base, variables=False)
        rank = self.lora_a.shape[0]
        kernel = self.lora_a[...].T.reshape(*self.base.kernel.shape[:-1], rank)
        layer.kernel = nnx.Param(kernel)
        layer.use_bias, layer.bias = False, nnx.data(None)
        layer.dtype, layer.preferred_element_type = dtype, None
        return layer


def in_rows(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """``(..., n)`` of an array that is summed over ``axes``, in Flax's order: the array's."""
    axes = tuple(sorted(axis % x.ndim for axis in axes))
    kept = tuple(axis for axis in range(x.ndim) if axis not in axes)
    shape = [x.shape[axis] for axis in kept]
    return x.transpose(*kept, *axes).reshape(*shape, math.prod(x.shape[axis] for axis in axes))


def node_path(path: tuple[Any, ...], *more: str) -> str:
    """What `nnx.iter_graph` calls a node, as the paths of a tree are written."""
    return "/".join(map(str, (*path, *more)))
