"""Fresh moments, in few bits or not, laid out over devices as their parameters are."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from optax_lowbit.kernels.meshes import is_explicit
from optax_lowbit.kernels.reference import float_dtype
from optax_lowbit.moments.flax_variables import is_variable, unwrapped, wrapped_like
from optax_lowbit.moments.placement import (
    check_alignment,
    placement_like,
    zeros_placed_like,
)
from optax_lowbit.moments.policy import Decision, Factored, Policy, path_name, record
from optax_lowbit.quant import QuantizedArray, QuantSpec, flax_serialization, quantize, random_bits
from optax_lowbit.quant.array import abstract_quantized
from optax_lowbit.quant.double_quant import CodedScales


@dataclasses.dataclass(frozen=True)
class Moment:
    """A field of an optax state that has a value for every element of the parameters."""

    # How it is stored; a dtype for leaves that are large enough; None for `dtype`.
    spec: QuantSpec | np.dtype | None
    # Whether it never has a negative value.
    nonnegative: bool = False
    # Whether matrices keep their row and column means instead, and `spec` is for vectors.
    factored: bool = False
    # Of leaves that are not quantized; None: float32, or wider if the parameter is.
    dtype: Any = None
    # What every element is at first; of a moment that is not factored.
    initial: jax.typing.ArrayLike = 0.0
    # Of leaves with two axes or more: the length of the last axis where that is not the leaf's; it
    # is then float32, and zero at first.
    columns: int | None = None


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


def init_moment(name: str, moment: Moment, params: Any, policy: Policy) -> Any:
    """A tree of fresh moments shaped like ``params``, which may be abstract."""
    flax_serialization.ensure_registered(QuantizedArray, CodedScales, FactoredMoment)

    def init_leaf(path, leaf):
        param = unwrapped(leaf)
        label = path_name(path)
        default = Factored() if moment.factored and len(param.shape) > 1 else moment.spec
        spec, reason = policy.choose(name, label, param, default, moment.nonnegative)
        if isinstance(spec, QuantSpec) and is_explicit(param):
            check_alignment(label, param, spec)
        if moment.columns is not None and len(param.shape) > 1:
            value = _zeros_resized(param, -1, moment.columns)
        else:
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
        return FactoredMoment(_zeros_resized(param, -1, 1), _zeros_resized(param, -2, 1))
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


def _zeros_resized(param: Any, axis: int, size: int) -> jax.Array:
    """Float32 zeros beside a parameter, with another length of one axis."""
    shape = list(param.shape)
    shape[axis] = size
    if is_explicit(param):

        def resized(p):
            return jnp.broadcast_to(jnp.sum(p, axis, keepdims=True), shape).astype(jnp.float32)

        return jnp.zeros_like(jax.eval_shape(resized, param))
    return zeros_placed_like(param, jax.ShapeDtypeStruct(tuple(shape), jnp.float32))


def _without_key(x: jax.Array, spec: QuantSpec) -> QuantizedArray:
    key = 0 if spec.rounding == "stochastic" else None
    return quantize(x, spec, key=key)


def is_factored(moment: Any) -> bool:
    """Whether a moment is kept as its row and column means."""
    return isinstance(moment, FactoredMoment)


def is_low_bit(moment: Any) -> bool:
    """Whether a moment is stored as something else than one array."""
    return isinstance(moment, QuantizedArray | FactoredMoment)


def checked_policy(
    moments: Mapping[str, Moment], policy: Policy | None, key: jax.Array | int | None
) -> Policy:
    """The policy, or the default one; raises where low-bit arguments are impossible."""
    policy = Policy() if policy is None else policy
    if not isinstance(policy, Policy):
        raise TypeError(f"policy must be a Policy or None, got {type(policy).__name__}")
    specs = []
    for name, moment in moments.items():
        if moment.spec is not None and not isinstance(moment.spec, QuantSpec):
            given = type(moment.spec).__name__
            raise TypeError(f"{name}_spec must be a QuantSpec or None, got {given}")
        if moment.spec is not None and not moment.nonnegative and not moment.spec.signed:
            raise ValueError(f"{name}_spec must be signed, as {name} has values of both signs")
        specs.append(moment.spec)
    if key is not None:
        random_bits.key_words(key)
    for _, choice in policy.rules:
        named = {moment for moment, _ in choice} if isinstance(choice, tuple) else set()
        if not named <= moments.keys():
            raise ValueError(
                f"policy.rules name the moments {sorted(named)}, and there are {sorted(moments)}"
            )
        specs += [spec for _, spec in choice] if isinstance(choice, tuple) else [choice]
    if any(isinstance(spec, QuantSpec) and spec.double_quant == "offset" for spec in specs):
        raise ValueError("double_quant='offset' is for weights; moments take double_quant=True")
    if key is None and any(map(is_random, specs)):
        raise ValueError(
            "key must be given (a jax.random.key or a seed) for stochastic rounding, of codes or, "
            "under double_quant, of scales"
        )
    return policy


def is_random(spec: Any) -> bool:
    """Whether a state that is kept so draws random numbers in each step.

    Scales in 8 bits do: a step may change them by less than rounding to nearest can see.
    """
    return isinstance(spec, QuantSpec) and (
        spec.rounding == "stochastic" or spec.double_quant is True
    )
