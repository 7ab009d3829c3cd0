"""The fresh state of any optax transform with its moments in few bits, made leaf by leaf.

A state in float32 never exists as a whole: each result of the transform's init is computed on its
own, and what is full of zeros is made of codes at once.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from optax_lowbit.kernels.meshes import is_explicit
from optax_lowbit.kernels.reference import float_dtype
from optax_lowbit.moments import storage
from optax_lowbit.moments.flax_variables import is_variable, unwrapped, wrapped_like
from optax_lowbit.moments.placement import check_alignment
from optax_lowbit.moments.policy import (
    KernelChoice,
    Policy,
    path_name,
    record,
)
from optax_lowbit.moments.storage import is_low_bit, is_random
from optax_lowbit.optimizers.corrected_bfloat16 import CorrectedBfloat16State
from optax_lowbit.optimizers.leaf_programs import Results, results_of
from optax_lowbit.optimizers.ownership import Slot, is_state_leaf, moment_names, slots
from optax_lowbit.optimizers.state_fields import Fields, Kind, kind_of
from optax_lowbit.quant import QuantizedArray, QuantSpec, flax_serialization, quantize


def init_state(
    init: Callable[[Any], Any],
    params: Any,
    specs: Mapping[Kind, QuantSpec | None],
    fields: Fields,
    policy: Policy,
    key: jax.Array | int | None,
) -> Any:
    """``init(params)`` with the moments that the policy says in few bits.

    Args:
      init: Of an optax transform.
      params: Parameters; leaves may be abstract.
      specs: How moments of either kind are stored by default.
      fields: What the user said of fields.
      policy: Decides leaf by leaf.
      key: For stochastic rounding.

    Raises:
      ValueError: If the state can't be kept in few bits; says why.
    """
    flax_serialization.ensure_registered(QuantizedArray)
    leaves, treedef = jax.tree.flatten(params)

    def flat_init(*leaves):
        with jax.numpy_dtype_promotion("standard"):
            return init(treedef.unflatten([in_float32(leaf) for leaf in leaves]))

    abstract = jax.eval_shape(flat_init, *leaves)
    plan = _Plan(params, abstract, specs, fields, policy)
    if not any(plan.specs):
        with jax.numpy_dtype_promotion("standard"):
            return init(params)
    plan.check_counter()
    results = results_of(lambda *leaves: jax.tree.leaves(flat_init(*leaves)), leaves)
    fresh = [
        _fresh_leaf(results, index, leaves, like, plan.param_of(index), plan.specs[index], key)
        for index, like in enumerate(plan.leaves)
    ]
    plan.record(fresh)
    return jax.tree.unflatten(plan.treedef, fresh)


def in_float32(x: Any) -> Any:
    """``x`` in the dtype of maths if it is of a narrower float dtype; abstract or not."""
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    dtype = float_dtype(x.dtype)
    if x.dtype == dtype:
        return x
    return x.update(dtype=dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(dtype)


def counter_of(state: Any) -> Any:
    """The first field of the name ``count``, or None."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_state_leaf):
        is_count = bool(path) and getattr(path[-1], "name", None) == "count"
        if is_count and not is_low_bit(leaf) and jnp.issubdtype(leaf.dtype, jnp.integer):
            return leaf
    return None


class _Plan:
    """How each leaf of a state is stored.

    Attributes:
      leaves, treedef: The abstract state in float32 under :func:`is_state_leaf`.
      specs: Of each leaf, its spec or None.
    """

    def __init__(self, params, abstract, specs, fields, policy):
        paths = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable)
        self._params = [(path_name(path), unwrapped(leaf)) for path, leaf in paths]
        self._defaults, self._fields, self._policy = specs, fields, policy
        self._abstract = abstract
        self.leaves, self.treedef = jax.tree.flatten(abstract, is_leaf=is_state_leaf)
        if any(map(is_low_bit, self.leaves)):
            raise ValueError("tx keeps its state in few bits already; give it as it is")
        self._slots = slots(abstract, params)
        self._check_names()
        choices = [self._choose(*pair) for pair in zip(self._slots, map(unwrapped, self.leaves))]
        self.specs = [spec for spec, _ in choices]
        self._reasons = [reason for _, reason in choices]

    def _check_names(self) -> None:
        if _has_node(self._abstract, CorrectedBfloat16State):
            raise ValueError(
                "correct_bfloat16 must be outside, last in a chain: "
                "optax.chain(quantize_state(tx), correct_bfloat16())"
            )
        names = {slot.field for slot in self._slots}
        unknown = sorted(self._fields.keys() - names)
        if unknown and self._params:
            raise ValueError(
                f"fields names {unknown}, and the state has the fields {sorted(names - {''})}"
            )

    def param_of(self, index: int) -> Any:
        """The parameter that a leaf belongs to, or None."""
        owner = self._slots[index].owner
        return None if owner is None else self._params[owner][1]

    def _choose(self, slot: Slot, like: Any) -> tuple[QuantSpec | None, str]:
        kind = kind_of(slot.state, slot.field, self._fields)
        if kind is None:
            return None, f"field {slot.field!r} is no moment"
        if slot.owner is None:
            self._check_ownerless(slot, like)
            return None, ""
        label, param = self._params[slot.owner]
        default, is_nonnegative = self._defaults[kind], kind == "nonnegative"
        spec, reason = self._policy.choose(slot.field, label, like, default, is_nonnegative)
        if spec is not None and is_explicit(param) and param.shape == like.shape:
            check_alignment(label, param, spec)
        return spec, reason

    def _check_ownerless(self, slot: Slot, like: Any) -> None:
        is_float = jnp.issubdtype(like.dtype, jnp.floating)
        if self._params and is_float and math.prod(like.shape) > self._policy.min_size:
            raise ValueError(
                f"the moment {slot.path!r} of the state has a path that ends in that of no "
                "parameter, so it can't be told which one it belongs to; quantize the state of the "
                "transform inside, as in optax.lookahead(quantize_state(tx), ...), or leave the "
                f"moment in float32 by fields={{{slot.field!r}: None}}"
            )

    def check_counter(self) -> None:
        """Raises ValueError if stochastic rounding has no counter to number its draws."""
        if any(map(is_random, self.specs)) and counter_of(self._abstract) is None:
            raise ValueError(
                "stochastic rounding needs a state with a field 'count', to draw other numbers in "
                f"each step; that of tx has none: {jax.tree.structure(self._abstract)}"
            )

    def record(self, fresh: Sequence[Any]) -> None:
        """Notes the decisions, and who steps the leaves, for `describe`."""
        low_bit = set()
        for name, slot, leaf, spec, reason in zip(
            moment_names(self._slots), self._slots, fresh, self.specs, self._reasons
        ):
            if slot.owner is None:
                continue
            label, param = self._params[slot.owner]
            storage.record_moment(label, tuple(param.shape), name, spec, unwrapped(leaf), reason)
            low_bit |= {slot.owner} if spec else set()
        for owner in sorted(low_bit):
            label, param = self._params[owner]
            reason = "no kernel of this optimizer"
            record(KernelChoice(label, tuple(param.shape), "reference", reason))


def _fresh_leaf(
    results: Results,
    index: int,
    arguments: Sequence[Any],
    like: Any,
    param: Any,
    spec: QuantSpec | None,
    key: jax.Array | int | None,
) -> Any:
    aval = unwrapped(like)
    fill: Any = None
    if getattr(param, "shape", None) == aval.shape:
        with jax.ensure_compile_time_eval():
            fill = results.fill(index, arguments)
    is_float = jnp.issubdtype(getattr(param, "dtype", aval.dtype), jnp.floating)
    if spec is not None and is_float and fill is not None and _is_zero(fill):
        return storage.fresh_moment(param, spec, None, 0)
    if fill is None:
        value = results.compute(index, arguments)
    else:
        value = jnp.full_like(param, fill, dtype=aval.dtype)  # lies where the parameter does
    if spec is None:
        return wrapped_like(like, value)
    quantized = quantize(in_float32(value), spec, key=key)
    return dataclasses.replace(quantized, dtype=param.dtype if is_float else quantized.dtype)


def _has_node(tree: Any, node_type: type) -> bool:
    def is_node(x):
        return isinstance(x, node_type)

    return any(map(is_node, jax.tree.leaves(tree, is_leaf=is_node)))


def _is_zero(fill: jax.Array) -> bool:
    return not isinstance(fill, jax.core.Tracer) and not np.asarray(fill).any()
