"""One leaf of a state, from the way that it is stored in to the way that another state needs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit.checkpoint.leaves import (
    Leaf,
    dtype_of,
    is_on_host,
    pieces_of,
    shape_of,
)
from optax_lowbit.kernels.means import mean
from optax_lowbit.kernels.meshes import on_own_mesh
from optax_lowbit.moments.storage import is_factored, is_low_bit
from optax_lowbit.optimizers import FactoredMoment
from optax_lowbit.quant import QuantSpec, is_quantized, quantize
from optax_lowbit.quant.array import decode
from optax_lowbit.quant.scaling import divide, effective_scaling

# What a leaf is to become: a spec and a dtype, factors, or an array of a dtype.
Form = tuple[QuantSpec, np.dtype] | type[FactoredMoment] | np.dtype


def check_convertible(source: Leaf, target: Leaf) -> None:
    """Raises ValueError if one leaf cannot become the other."""
    given, wanted = shape_of(source.value), shape_of(target.value)
    if given != wanted:
        raise ValueError(f"{source.name} has shape {given}, and {target.name} must have {wanted}")
    given, wanted = dtype_of(source.value), dtype_of(target.value)
    if given == wanted or all(jnp.issubdtype(d, jnp.floating) for d in (given, wanted)):
        return
    is_count = all(jnp.issubdtype(d, jnp.integer) for d in (given, wanted))
    if not (is_count and shape_of(source.value) == ()):
        raise ValueError(f"{source.name} has dtype {given}, and {target.name} must have {wanted}")


def is_same_form(source: Any, like: Any) -> bool:
    """Whether the arrays of a leaf are those that the other needs, as they are."""
    if is_quantized(source) and is_quantized(like):
        return _is_same_code(source.spec, like.spec, len(source.shape))
    if is_low_bit(source) or is_low_bit(like):
        return is_factored(source) and is_factored(like)
    return dtype_of(source) == dtype_of(like)


def _is_same_code(a: QuantSpec, b: QuantSpec, ndim: int) -> bool:
    """Whether two specs read the same codes and scales as the same numbers."""
    if ndim and effective_scaling(a.scaling, ndim) != effective_scaling(b.scaling, ndim):
        return False
    elsewhere = {"codebook", "signed", "rounding", "scaling"}  # in the table, or only in writing
    names = {field.name for field in dataclasses.fields(QuantSpec)} - elsewhere
    if any(getattr(a, name) != getattr(b, name) for name in names):
        return False
    return np.array_equal(np.asarray(a.values, np.float32), np.asarray(b.values, np.float32))


def converted(source: Any, like: Any) -> Any:
    """The values of ``source`` in the form, the dtype and the place of ``like``.

    Codes are kept where they mean the same. Everything else goes through float32, under jit; codes
    are rounded to nearest. A full second moment becomes its row and column means; means
    ``r``, ``c`` become ``r c / mean(r)``, which is how :func:`~optax_lowbit.factor4bit` reads them.
    """
    if _is_integer(source) and not shape_of(source):
        # A count may become several, and none may share a buffer: states are donated.
        source = np.asarray(source)
    if is_same_form(source, like):
        value = source
        if is_quantized(like):
            value = dataclasses.replace(source, spec=like.spec, dtype=like.dtype)
    elif is_low_bit(source) or is_low_bit(like) or not _is_integer(source):
        array = source if is_low_bit(source) else jnp.asarray(source)
        with on_own_mesh(array):
            value = _converted(jax.device_put(array, jax.memory.Space.Device), _form(like))
    else:
        value = _same_integer(source, dtype_of(like))
    return _placed(value, like)


def _form(like: Any) -> Form:
    if is_quantized(like):
        return like.spec, np.dtype(like.dtype)
    return FactoredMoment if is_factored(like) else np.dtype(dtype_of(like))


@functools.partial(jax.jit, static_argnames="form")
def _converted(source: Any, form: Form) -> Any:
    x = _dense(source)
    if isinstance(form, tuple):
        spec, dtype = form
        # Nearest, as a conversion has no key.
        q = quantize(x, dataclasses.replace(spec, rounding="nearest"))
        return dataclasses.replace(q, spec=spec, dtype=dtype)
    if form is FactoredMoment:
        x = x.astype(jnp.float32)
        return FactoredMoment(mean(lambda x: x, x, -1), mean(lambda x: x, x, -2))
    return x.astype(form)


def _dense(source: Any) -> jax.Array:
    if is_quantized(source):
        return decode(source)
    if is_factored(source):
        return divide(source.rows, mean(lambda x: x, source.rows, -2)) * source.columns
    return source


def _is_integer(value: Any) -> bool:
    return jnp.issubdtype(dtype_of(value), jnp.integer)


def _same_integer(value: Any, dtype: Any) -> np.ndarray:
    """A scalar in another integer dtype, which must hold it."""
    wide = np.asarray(value)
    narrow = wide.astype(dtype)
    if narrow != wide:
        raise ValueError(f"{wide} is out of the range of {dtype}")
    return narrow


def _placed(value: Any, like: Any) -> Any:
    if is_on_host(like):
        array = np.asarray(value)
        return array if isinstance(like, np.ndarray) else type(like)(array.item())
    pieces = [
        _piece_placed(piece, getattr(place, "sharding", None))
        for piece, place in zip(jax.tree.leaves(value), pieces_of(like).values(), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(value), pieces)


def _piece_placed(piece: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if not isinstance(piece, jax.Array):
        piece = jnp.asarray(piece)
    # An array that lies there is not moved: naming its device would commit it, and the first
    # update after that would compile again.
    if sharding is None or piece.sharding == sharding:
        return piece
    return jax.device_put(piece, sharding)
