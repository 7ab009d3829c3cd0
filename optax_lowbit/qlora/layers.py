"""Linear layers of Flax NNX with a frozen kernel in few bits. Imported only where it is used."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.sharding import PartitionSpec

from optax_lowbit.adapters.arrays import is_quantized_matrix
from optax_lowbit.adapters.linear_fields import check_fields
from optax_lowbit.adapters.nnx_layers import in_rows
from optax_lowbit.kernels.quantized_matrix import QuantizedMatrix
from optax_lowbit.qlora.placement import matrix_specs


class FrozenParam(nnx.Variable):
    """A value that neither training nor a call changes; no `nnx.Param`.

    Its metadata are those of the parameter that it was. An ``out_sharding`` among them is that of
    the parameter as floats, and `nnx.get_partition_spec` and `nnx.get_named_sharding` give those of
    codes and scales.
    """

    def replace(self, *args: Any, **kwargs: Any) -> Any:
        """As `nnx.Variable.replace`; in the place of a matrix a `PartitionSpec` becomes several."""
        kernel: Any = self.get_raw_value()
        if args and isinstance(args[0], PartitionSpec) and is_quantized_matrix(kernel):
            spec = self._flat_spec(args[0], kernel.ndim - 2)
            args = (matrix_specs(kernel, spec), *args[1:])
        return self.copy(*args, **kwargs)

    def _flat_spec(self, spec, stack):
        """Of the matrix, whose axes may be several of the parameter: the first of each."""
        n, m = self.get_metadata("kernel_axes", (1, 1))
        entries = (*spec, *[None] * (stack + n + m - len(spec)))
        return PartitionSpec(*entries[:stack], entries[stack], entries[stack + n])


class QuantizedLayer(nnx.Module):
    """What layers with a frozen kernel in few bits have in common.

    `LoRA.wrap` puts adapters around it as around any other; it is what `nnx.merge` and `nnx.scan`
    take apart and put together, stacked layers included.

    Attributes:
      kernel: :class:`FrozenParam` with the :class:`QuantizedMatrix` ``(..., n, m)``.
      bias: As in the plain layer, in a :class:`FrozenParam`; None without one.
    """

    kernel: Any
    bias: Any

    def __init__(self, layer: Any, kernel: QuantizedMatrix):
        """The layer with another kernel; everything else is the layer's."""
        for name, value in vars(layer).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        # Not by the constructor, which places what it is given as if it were the floats.
        metadata = {**layer.kernel.get_metadata(), "kernel_axes": self.kernel_axes(layer)}
        self.kernel = FrozenParam.from_metadata(kernel, metadata)
        # A bias that LoRA trains goes on training.
        if layer.bias is not None and not isinstance(layer.bias, nnx.LoRAParam):
            bias = layer.bias.get_value()
            self.bias = FrozenParam.from_metadata(bias, layer.bias.get_metadata())

    @staticmethod
    def kernel_axes(layer: Any) -> tuple[int, int]:
        """How many of the last axes of its kernel as floats make ``n``, and how many ``m``."""
        del layer
        return 1, 1

    def dequantized(self) -> Any:
        """The layer with its kernel as floats, whose parameters train."""
        raise NotImplementedError

    def _product(self, rows: jax.Array, out_sharding: Any) -> jax.Array:
        """``(..., n)`` times the kernel, in ``dtype``, by default that of both and the bias."""
        layer: Any = self
        kernel = layer.kernel.get_value()
        parameters = [kernel, *([] if self.bias is None else [self.bias.get_value()])]
        dtypes = [parameter.dtype for parameter in parameters]
        dtype = layer.dtype or functools.reduce(jnp.promote_types, dtypes, rows.dtype)
        return kernel.left_dot(
            rows.astype(dtype), out_sharding=out_sharding, precision=layer.precision
        )

    def _plus_bias(self, outputs: jax.Array) -> jax.Array:
        if self.bias is None:
            return outputs
        bias = self.bias.get_value().astype(outputs.dtype)
        return outputs + bias.reshape((1,) * (outputs.ndim - bias.ndim) + bias.shape)

    def _with_floats(self, layer: Any) -> Any:
        """``layer``, of shapes alone, with everything of this one but its kernel as floats."""
        for name, value in vars(self).items():
            if not name.startswith("_") and name not in ("kernel", "bias"):
                setattr(layer, name, value)
        kernel = self.kernel.get_value()
        stack = kernel.shape[:-2]
        floats = kernel.dequantize().reshape(*stack, *layer.kernel.shape)
        metadata = self.kernel.get_metadata()
        del metadata["kernel_axes"]
        layer.kernel = nnx.Param.from_metadata(floats, metadata)
        if self.bias is not None:
            layer.bias = nnx.Param.from_metadata(self.bias.get_value(), self.bias.get_metadata())
        return layer


class QLinear(QuantizedLayer, nnx.Linear):
    """An `nnx.Linear` whose kernel is a frozen matrix in few bits. See :class:`QuantizedLayer`."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Map ``(..., n)`` to ``(..., m)``, in ``dtype``, by default of inputs and parameters."""
        return self._plus_bias(self._product(inputs, out_sharding))

    def dequantized(self) -> nnx.Linear:
        """See :meth:`QuantizedLayer.dequantized`."""
        n, m, use_bias = self.in_features, self.out_features, self.bias is not None
        return self._with_floats(
            nnx.eval_shape(lambda: nnx.Linear(n, m, use_bias=use_bias, rngs=nnx.Rngs(0)))
        )


class QLinearGeneral(QuantizedLayer, nnx.LinearGeneral):
    """An `nnx.LinearGeneral` without batch axes whose kernel is a frozen :class:`QuantizedMatrix`.

    ``n`` and ``m`` are the products of the axes that are summed over, and that are not. See
    :class:`QuantizedLayer`.
    """

    @staticmethod
    def kernel_axes(layer: Any) -> tuple[int, int]:
        """See :meth:`QuantizedLayer.kernel_axes`."""
        return len(layer.in_features), len(layer.out_features)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Map what `nnx.LinearGeneral` maps, in ``dtype``, by default of inputs and parameters."""
        rows = in_rows(inputs, self.axis)
        outputs = self._product(rows, self._flat_sharding(out_sharding, rows.ndim - 1))
        outputs = outputs.reshape(*outputs.shape[:-1], *self.out_features)
        return self._plus_bias(outputs)

    def dequantized(self) -> nnx.LinearGeneral:
        """See :meth:`QuantizedLayer.dequantized`."""
        sizes, use_bias = (self.in_features, self.out_features), self.bias is not None
        axis = self.axis
        return self._with_floats(
            nnx.eval_shape(
                lambda: nnx.LinearGeneral(*sizes, axis=axis, use_bias=use_bias, rngs=nnx.Rngs(0))
            )
        )

    def _flat_sharding(self, out_sharding, leading):
        """That of ``(..., m)``, of which a part of the first axis of several is a part."""
        if out_sharding is None:
            return out_sharding
        spec = (*out_sharding.spec, *[None] * (leading + 1 - len(out_sharding.spec)))
        if any(entry is not None for entry in spec[leading + 1 :]):
            raise ValueError(
                f"out_sharding must spread the first of the axes {self.out_features} alone, got "
                f"{spec}"
            )
        return out_sharding.update(spec=PartitionSpec(*spec[: leading + 1]))


def kernel_matrix(name: str, layer: Any, kernel: Any) -> Any:
    """The kernel of a layer as a matrix ``(..., n, m)``.

    Args:
      name: Its path.
      layer: An `nnx.Linear` or `nnx.LinearGeneral`.
      kernel: Floats, or a :class:`QuantizedMatrix`, which must be one already.
    """
    sizes = tuple(int(np.prod(x)) for x in (layer.in_features, layer.out_features))
    if is_quantized_matrix(kernel):
        if kernel.shape[-2:] != sizes:
            raise ValueError(
                f"{name!r} in few bits must be a matrix {sizes}, or a stack, got {kernel.shape}"
            )
        return kernel
    stack = kernel.ndim - sum(LAYERS[type(layer)].kernel_axes(layer))
    return kernel.reshape(*kernel.shape[:stack], *sizes)


# The plain layer -> that in few bits.
LAYERS: dict[type, type[QuantizedLayer]] = {nnx.Linear: QLinear, nnx.LinearGeneral: QLinearGeneral}


def check_layer(name: str, layer: Any) -> None:
    """Raise unless a layer is one that can have a kernel in few bits.

    Args:
      name: The path of its kernel.
      layer: An `nnx.Linear` or `nnx.LinearGeneral`, or of a subclass.
    """
    if type(layer) not in LAYERS or getattr(layer, "batch_axis", None):
        raise ValueError(
            f"targets finds {name!r} of a {type(layer).__name__}, which may do more than multiply "
            "by a matrix: exclude it"
        )
    check_fields(name, layer, promote_dtype)
