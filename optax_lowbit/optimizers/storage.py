"""Fresh moments, in few bits or not, laid out over devices as their parameters are."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from optax_lowbit.kernels.meshes import is_explicit
from optax_lowbit.kernels.reference import float_dtype
from optax_lowbit.optimizers.flax_variables import is_variable, unwrapped, wrapped_like
from optax_lowbit.optimizers.placement import (
    check_alignment,
    placement_like,
    zeros_placed_like,
)
from optax_lowbit.optimizers.policy import Decision, Factored, Policy, path_name, record
from optax_lowbit.quant import QuantizedArray, QuantSpec, flax_serialization, quantize
from optax_lowbit.quant.array import abstract_quantized
from optax_lowbit.quant.double_quant import CodedScales

if TYPE_CHECKING:
    from optax_lowbit.optimizers.leafwise import Moment


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactoredMoment:
    """The second moment of a matrix ``(..., n, m)``, kept as its row and column means.

    Attributes:
      rows: float32 ``(..., n, 1)``.
      columns: float32 ``(..., 1, m)``.
    """

    rows: jax.Array
    columns: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return (*self.rows.shape[:-1], self.columns.shape[-1])

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.rows.ndim

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the means."""
        return self.rows.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the means."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in (self.rows, self.columns))


def init_moment(name: str, moment: "Moment", params: Any, policy: Policy) -> Any:
    """A tree of fresh moments shaped like ``params``, which may be abstract."""
    flax_serialization.ensure_registered(QuantizedArray, CodedScales, FactoredMoment)

    def init_leaf(path, leaf):
        param = unwrapped(leaf)
        label = path_name(path)
        default = Factored() if moment.factored and len(param.shape) > 1 else moment.spec
        spec, reason = policy.choose(name, label, param, default, moment.nonnegative)
        if isinstance(spec, QuantSpec) and is_explicit(param):
            check_alignment(label, param, spec)
        value = fresh_moment(param, spec, moment.dtype, moment.initial)
        record_moment(label, tuple(param.shape), name, spec, value, reason)
        return value if isinstance(spec, QuantSpec | Factored) else wrapped_like(leaf, value)

    return jax.tree_util.tree_map_with_path(init_leaf, params, is_leaf=is_variable)


def record_moment(
    path: str, shape: tuple[int, ...], moment: str, spec: Any, value: Any, reason: str
) -> None:
    """Notes for `describe` how one moment of one leaf, ``value``, is stored, and why."""
    nbytes = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(value))
    record(Decision(path, shape, moment, spec, str(value.dtype), nbytes, reason))


def fresh_moment(
    param: Any,
    spec: QuantSpec | Factored | np.dtype | None,
    dtype: Any,
    initial: jax.typing.ArrayLike,
) -> Any:
    """A constant for one parameter, quantized if there is a spec. Always buffers of their own."""
    if isinstance(spec, Factored):
        return FactoredMoment(_zeros_reduced(param, -1), _zeros_reduced(param, -2))
    if not isinstance(spec, QuantSpec):
        dtype = dtype if spec is None else spec
        if dtype is None:
            dtype = float_dtype(param.dtype)
        return jnp.full_like(param, initial, dtype=dtype)
    if not isinstance(initial, int | float) or initial != 0:
        return _filled(param, spec, initial)
    if is_explicit(param):
        # The type carries the sharding then, and must be what an update gives.
        like = jax.eval_shape(lambda p: _without_key(jnp.zeros_like(p), spec), param)
        return jax.tree.map(jnp.zeros_like, like)
    like = abstract_quantized(tuple(param.shape), param.dtype, spec)
    return jax.tree.map(lambda leaf: zeros_placed_like(param, leaf), like)


def _filled(param: Any, spec: QuantSpec, initial: jax.typing.ArrayLike) -> QuantizedArray:
    """What quantizing ``initial`` everywhere gives, never in float32 as a whole."""
    if isinstance(param, jax.core.Tracer) or is_explicit(param):
        return jax.jit(lambda p, x: _without_key(jnp.full_like(p, x), spec))(param, initial)
    like = abstract_quantized(tuple(param.shape), param.dtype, spec)
    fill = jax.jit(
        lambda x: _without_key(jnp.full(param.shape, x, param.dtype), spec),
        out_shardings=jax.tree.map(lambda leaf: placement_like(param, leaf.shape), like),
    )
    return fill(initial)


def _zeros_reduced(param: Any, axis: int) -> jax.Array:
    if is_explicit(param):
        like = jax.eval_shape(lambda p: jnp.sum(p, axis, keepdims=True).astype(jnp.float32), param)
        return jnp.zeros_like(like)
    shape = list(param.shape)
    shape[axis] = 1
    return zeros_placed_like(param, jax.ShapeDtypeStruct(tuple(shape), jnp.float32))


def _without_key(x: jax.Array, spec: QuantSpec) -> QuantizedArray:
    key = 0 if spec.rounding == "stochastic" else None
    return quantize(x, spec, key=key)
