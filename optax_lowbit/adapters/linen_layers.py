"""Layers of Flax linen whose kernels are not plain arrays. Imported only where it is used."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta
from flax.linen.dtypes import promote_dtype

from optax_lowbit.adapters.arrays import is_quantized_matrix
from optax_lowbit.adapters.linear_fields import check_fields
from optax_lowbit.adapters.lora_matrix import LoRAMatrix
from optax_lowbit.kernels.quantized_matrix import QuantizedMatrix

_LAYERS = (nn.Dense, nn.DenseGeneral)
_CONVOLUTIONS = (nn.Conv, nn.ConvLocal, nn.ConvTranspose)


@contextlib.contextmanager
def intercepted() -> Iterator[None]:
    """See :func:`intercept_linen`."""
    with nn.intercept_methods(_intercept):
        yield


def kernel_axes(
    model: nn.Module, variables: Any, *args: Any, **kwargs: Any
) -> dict[str, tuple[int, int]]:
    """See :func:`linen_kernel_axes`."""
    found = {}

    def note(next_fun, args, kwargs, context):
        layer = context.module
        if isinstance(layer, nn.DenseGeneral) and context.method_name == "__call__":
            if not layer.batch_dims:
                path = "/".join((*layer.path, "kernel"))
                found[path] = (len(_tuple(layer.axis)), len(_tuple(layer.features)))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda variables: model.apply(variables, *args, **kwargs), variables)
    return {f"(^|/){path}$": axes for path, axes in found.items()}


def _intercept(next_fun, args, kwargs, context):
    layer, method = context.module, context.method_name
    if isinstance(layer, _LAYERS) and method == "__call__":
        kernel = _parameters(layer).get("kernel")
        if isinstance(kernel, LoRAMatrix | QuantizedMatrix):
            return _product(layer, kernel, *args, **kwargs)
    if isinstance(layer, _CONVOLUTIONS) and method == "__call__":
        if isinstance(_parameters(layer).get("kernel"), LoRAMatrix | QuantizedMatrix):
            raise ValueError(
                f"{'/'.join((*layer.path, 'kernel'))!r} is of a {type(layer).__name__}, which can "
                "have no adapters and not be in few bits: exclude it"
            )
    if isinstance(layer, nn.Embed) and method in ("__call__", "attend"):
        table = _parameters(layer).get("embedding")
        if isinstance(table, LoRAMatrix):
            return (_looked_up if method == "__call__" else _attended)(layer, table, *args)
    return next_fun(*args, **kwargs)


def _product(layer: Any, kernel: LoRAMatrix | QuantizedMatrix, inputs: jax.Array) -> jax.Array:
    """What the layer computes of its inputs: ``inputs`` times its kernel, and its bias."""
    base = kernel.base if isinstance(kernel, LoRAMatrix) else kernel
    rows = _in_rows(layer, inputs)
    if is_quantized_matrix(base):
        y = _quantized_product(layer, base, rows)
    else:
        y = _plain(layer, {"kernel": base}, inputs)
    if not isinstance(kernel, LoRAMatrix):
        return y
    bias = _parameters(layer).get("bias")
    flat = y.reshape(*rows.shape[:-1], kernel.b.shape[-1])
    return kernel.add_to(flat, rows, None if bias is None else bias.reshape(-1)).reshape(y.shape)


def _quantized_product(layer, base, rows):
    check_fields("/".join((*layer.path, "kernel")), layer, promote_dtype)
    bias = _parameters(layer).get("bias")
    dtypes = [base.dtype, *([] if bias is None else [bias.dtype])]
    dtype = layer.dtype or functools.reduce(np.promote_types, dtypes, rows.dtype)
    y = base.left_dot(rows.astype(dtype), precision=layer.precision)
    y = y.reshape(*rows.shape[:-1], *_tuple(layer.features))
    if bias is not None:
        y += bias.astype(dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
    return y


def _looked_up(layer, table, tokens):
    return table.add_rows_to(_plain(layer, {"embedding": table.base}, tokens), tokens)


def _attended(layer, table, query):
    query = table.T.scaled(query)
    plain = _plain(layer, {"embedding": table.base}, query, method="attend")
    return table.T.add_to(plain, query)


def _plain(layer, changes, *args, method="__call__"):
    """What a layer of its own computes, with floats in the place of what is not plain."""
    own = layer.clone(parent=None, name=None)
    return own.apply({"params": {**_parameters(layer), **changes}}, *args, method=method)


def _in_rows(layer, inputs):
    from optax_lowbit.adapters.nnx_layers import in_rows

    if getattr(layer, "batch_dims", ()):
        raise ValueError(f"{layer.name} has batch_dims, and so its kernel can't have adapters")
    return in_rows(inputs, _tuple(getattr(layer, "axis", -1)))


def _parameters(layer: Any) -> dict[str, Any]:
    """Its own parameters, without the boxes of `nn.with_partitioning`."""
    return {name: _unboxed(x) for name, x in layer.variables.get("params", {}).items()}


def _unboxed(x: Any) -> Any:
    if isinstance(x, meta.AxisMetadata):
        value: Any = getattr(x, "value", None)
        # A box would put the sharding of an array on what is none.
        return value if isinstance(value, LoRAMatrix | QuantizedMatrix) else x.unbox()
    return x


def _tuple(x) -> tuple[int, ...]:
    return tuple(x) if isinstance(x, list | tuple) else (x,)
