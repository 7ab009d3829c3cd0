"""Runs an optax transform leaf by leaf and tile by tile, its moments kept in few bits in between.

Algorithm 1 of the paper: dequantize the moments, let the optimizer take its own step in float32,
requantize. The update comes from the unquantized new moments. The step is optax's own, so that what
is kept in float32 follows optax to the bit.

References:
  Li et al, `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_,
  2023, Algorithm 1.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowbit.kernels.backends import (
    Backend,
    checked,
    platform_backend,
    why_not,
    why_not_spread,
)
from optax_lowbit.kernels.parameters import Descent, descended
from optax_lowbit.kernels.reference import Step, widened
from optax_lowbit.kernels.steps import Fused, step_leaf
from optax_lowbit.moments import storage
from optax_lowbit.moments.flax_variables import is_variable, unwrapped, wrapped_like
from optax_lowbit.moments.keys import fold_in_path, noise_key
from optax_lowbit.moments.policy import KernelChoice, Policy, path_name, record
from optax_lowbit.moments.storage import Moment, checked_policy, is_factored, is_low_bit
from optax_lowbit.quant import QuantizedArray, random_bits


def quantize_moments(
    inner: optax.GradientTransformation,
    moments: Mapping[str, Moment],
    policy: Policy | None,
    key: jax.Array | int | None,
    fused: Fused | None = None,
    backend: Backend = "auto",
    restored: Callable[[dict[str, Any]], dict[str, Any]] = lambda moments: moments,
) -> "LowBitTransformation":
    """``inner``, elementwise, with the named fields of its NamedTuple state kept in few bits.

    Args:
      inner: A transform whose update of an element depends on that element alone. What its state
        has beside the moments (a count) must not depend on the parameters. With a key it needs a
        count: see :func:`counted`.
      moments: The moments by field name.
      policy: Decides leaf by leaf; None: the default one.
      key: For stochastic rounding.
      fused: The same step as the kernels know it; None: there is no kernel.
      backend: Which kernel.
      restored: Makes dequantized moments of a leaf, which the reference's step is given, consistent
        with one another.

    Returns:
      A transform with the same state type.
    """
    policy = checked_policy(moments, policy, key)
    checked(backend)
    transform = under_standard_promotion(inner)

    def init_fn(params):
        state = transform.init(())
        fields = {
            name: storage.init_moment(name, moment, params, policy)
            for name, moment in moments.items()
        }
        record_backends(fused, backend, params, fields)
        return state._replace(**fields)

    def step_one(leaf: Leaf, step: Step, scalars: Any) -> tuple[jax.Array, dict[str, Any]]:
        def restored_step(grad, moments, constants):
            return step(grad, restored(moments), constants)

        return step_leaf(
            restored_step, fused, backend, scalars, leaf.grad, leaf.moments, leaf.key,
            descent=leaf.descent, name=leaf.name,
        )  # fmt: skip

    def step_all(updates, state, descents=None):
        return update_state(
            transform, updates, state, tuple(moments), key, step_one, fused, descents
        )

    return low_bit_transformation(init_fn, step_all)


class LowBitTransformation(optax.GradientTransformationExtraArgs):
    """An optax transform that can also write parameters as it steps.

    Attributes:
      step_all: ``(updates, state, descents) -> (updates or parameters, state)``, with a
        :class:`~optax_lowbit.kernels.parameters.Descent` for each leaf, or None.
    """

    step_all: Callable[..., tuple[Any, Any]]


def low_bit_transformation(init_fn: Any, step_all: Callable[..., Any]) -> LowBitTransformation:
    """The transform whose update is ``step_all`` without descents."""

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        return step_all(updates, state)

    transformation = LowBitTransformation(init_fn, update_fn)
    transformation.step_all = step_all
    return transformation


class Leaf(NamedTuple):
    """What a step of one leaf with low-bit moments is given."""

    grad: jax.Array
    moments: dict[str, Any]
    key: random_bits.Key | None
    descent: Descent | None
    name: str


def update_state(
    transform: "Inner",
    updates: optax.Updates,
    state: Any,
    names: tuple[str, ...],
    key: jax.Array | int | None,
    step_one: Callable[[Leaf, Step, Any], tuple[jax.Array, dict[str, Any]]],
    fused: Fused | None,
    descents: Sequence[Descent] | None = None,
) -> tuple[Any, Any]:
    """One step of ``transform`` on all leaves, its moments in whatever way each is stored.

    Args:
      transform: The elementwise optax transform.
      updates: Gradients.
      state: The transform's state, with low-bit moments.
      names: The state's fields that are moments.
      key: For stochastic rounding.
      step_one: ``(leaf, step, scalars) -> (update, moments)`` for a leaf with low-bit moments.
      fused: What the kernels know of the step.
      descents: One for each leaf, for a step that writes parameters.
    """
    paths_and_grads, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=is_variable)
    columns = {name: treedef.flatten_up_to(getattr(state, name)) for name in names}
    step_key = None if key is None else noise_key(key, state.count)
    leaves = _leaves(paths_and_grads, columns, step_key, descents)
    new_leaves, new_state = _step_plain_leaves(transform, state, names, leaves)
    step = _step_of(transform, state, names)
    scalars = None
    if fused is not None:
        count: Any = optax.safe_increment(state.count)
        scalars = fused.scalars(count)
    results = [
        new or step_one(leaf, step, scalars) for leaf, new in zip(leaves, new_leaves, strict=True)
    ]
    new_updates = [
        wrapped_like(grad, update) for (_, grad), (update, _) in zip(paths_and_grads, results)
    ]
    new_moments = {
        name: treedef.unflatten(wrapped_like(x, new[name]) for x, (_, new) in zip(column, results))
        for name, column in columns.items()
    }
    return treedef.unflatten(new_updates), new_state._replace(**new_moments)


def _leaves(
    paths_and_grads: Sequence[tuple[Any, Any]],
    columns: Mapping[str, Sequence[Any]],
    step_key: random_bits.Key | None,
    descents: Sequence[Descent] | None,
) -> list[Leaf]:
    """The leaves of the gradients, each with its moments, which ``columns`` has by name."""
    return [
        Leaf(
            unwrapped(grad),
            {name: x if is_low_bit(x) else unwrapped(x) for name, x in zip(columns, row)},
            fold_in_path(step_key, path),
            descent,
            f"parameter {path_name(path)!r}",
        )
        for (path, grad), row, descent in zip(
            paths_and_grads, zip(*columns.values()), descents or [None] * len(paths_and_grads)
        )
    ]


def _step_of(transform: "Inner", state: Any, names: tuple[str, ...]) -> Step:
    def step(grad, moments, constants):
        del constants
        update, new_state = transform.update(grad, state._replace(**moments))
        return update, {name: getattr(new_state, name) for name in names}

    return step


def _step_plain_leaves(
    transform: "Inner", state: Any, names: tuple[str, ...], leaves: list[Leaf]
) -> tuple[list[Any], Any]:
    """Results of the leaves whose moments are floats, None in place of others; the new state.

    They go through optax together: the program is optax's own, so its bits are too.
    """
    is_plain = [not any(map(is_low_bit, leaf.moments.values())) for leaf in leaves]
    plain = list(itertools.compress(leaves, is_plain))
    updates, new_state = transform.update(
        [widened(leaf.grad) for leaf in plain],
        state._replace(**{n: [widened(leaf.moments[n]) for leaf in plain] for n in names}),
    )
    columns = [getattr(new_state, name) for name in names]
    results = iter(
        (
            descended(update.astype(leaf.grad.dtype), leaf.descent),
            {name: x.astype(leaf.moments[name].dtype) for name, x in zip(names, row)},
        )
        for leaf, update, *row in zip(plain, updates, *columns)
    )
    return [next(results) if each else None for each in is_plain], new_state


def record_backends(
    fused: Fused | None, backend: Backend, params: Any, fields: Mapping[str, Any]
) -> None:
    """Notes the kernel of each leaf with low-bit moments, for `describe`.

    Raises:
      ValueError: If a kernel was asked for that cannot take a leaf.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_variable)
    columns = [treedef.flatten_up_to(field) for field in fields.values()]
    for (path, leaf), *row in zip(leaves, *columns):
        if not any(map(is_low_bit, row)):
            continue
        param, label = unwrapped(leaf), path_name(path)
        moments = dict(zip(fields, row))
        chosen, reason = _backend_of(fused, backend, param, moments)
        if reason and backend not in ("auto", "reference"):
            raise ValueError(f"backend={backend!r} cannot take parameter {label!r}: {reason}")
        record(KernelChoice(label, tuple(param.shape), chosen, reason))


def _backend_of(fused, backend, param, moments) -> tuple[str, str]:
    """The backend of a leaf on this platform, and why it is not the one that it would be."""
    if backend == "reference":
        return backend, ""
    wanted = backend if backend != "auto" else platform_backend()
    if wanted is None:
        return "reference", "no kernels for this platform"
    if fused is None:
        return "reference", "no kernel of this optimizer"
    stored = [x for x in moments.values() if not is_factored(x)]
    if not all(isinstance(x, QuantizedArray) for x in stored):
        return "reference", "a moment in floats"
    specs = fused.specs({name: x for name, x in moments.items() if not is_factored(x)})
    reason = why_not(wanted, fused.op, tuple(param.shape), param.dtype, *specs)
    if backend == "auto":
        reason = reason or why_not_spread(wanted, fused.op, param)
    return ("reference", reason) if reason else (wanted, "")


class Inner(NamedTuple):
    """An optax transform whose state is known to be a NamedTuple (optax's types do not say so)."""

    init: Callable[..., Any]
    update: Callable[..., Any]


def under_standard_promotion(inner: optax.GradientTransformation) -> Inner:
    """``inner``, whose powers of a float and an int32 count strict dtype promotion would refuse."""

    def update_fn(updates, state):
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state)

    return Inner(inner.init, update_fn)


def counted(
    inner: optax.GradientTransformation, state_type: Callable[..., Any]
) -> optax.GradientTransformation:
    """``inner`` with its state's fields behind a count, which numbers the draws of random rounding.

    Args:
      inner: A transform whose state is a NamedTuple without a count.
      state_type: The NamedTuple of ``count`` and the fields of that state.
    """
    transform: Any = inner
    uncounted = type(transform.init(()))

    def init_fn(params):
        return state_type(jnp.zeros([], jnp.int32), *transform.init(params))

    def update_fn(updates, state, params=None):
        count, *fields = state
        updates, new_state = transform.update(updates, uncounted(*fields), params)
        return updates, state_type(optax.safe_increment(count), *new_state)

    return optax.GradientTransformation(init_fn, update_fn)


def checked_transform(tx: Any, name: str = "tx") -> optax.GradientTransformationExtraArgs:
    """``tx`` with support for extra arguments; raises TypeError if it is no transform."""
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        given = type(tx).__name__
        raise TypeError(f"{name} must be an optax.GradientTransformation, got {given}")
    return optax.with_extra_args_support(tx)
