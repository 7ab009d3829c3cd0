"""Runs an optax transform leaf by leaf and tile by tile, its moments kept in few bits in between.

Algorithm 1 of the paper: dequantize the moments, let the optimizer take its own step in float32,
requantize. The update comes from the unquantized new moments. The step is optax's own, so that what
is kept in float32 follows optax to the bit.

References:
  Li et al, `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_,
  2023, Algorithm 1.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from optax_lowbit.kernels.reference import name_hash, update_leaf, widened
from optax_lowbit.optimizers import storage
from optax_lowbit.optimizers.flax_variables import is_variable, unwrapped, wrapped_like
from optax_lowbit.optimizers.policy import Policy, path_name
from optax_lowbit.optimizers.storage import FactoredMoment
from optax_lowbit.quant import QuantizedArray, QuantSpec, random_bits


@dataclasses.dataclass(frozen=True)
class Moment:
    """A field of an optax state that has a value for every element of the parameters."""

    # How it is stored; None for `dtype`.
    spec: QuantSpec | None
    # Whether it never has a negative value.
    nonnegative: bool = False
    # Whether matrices keep their row and column means instead, and `spec` is for vectors.
    factored: bool = False
    # Of leaves that are not quantized; None: float32, or wider if the parameter is.
    dtype: Any = None


def quantize_moments(
    inner: optax.GradientTransformation,
    moments: Mapping[str, Moment],
    policy: Policy | None,
    key: jax.Array | int | None,
) -> optax.GradientTransformationExtraArgs:
    """``inner``, elementwise, with the named fields of its NamedTuple state kept in few bits.

    Args:
      inner: A transform whose update of an element depends on that element alone. What its state
        has beside the moments (a count) must not depend on the parameters.
      moments: The moments by field name.
      policy: Decides leaf by leaf; None: the default one.
      key: For stochastic rounding.

    Returns:
      A transform with the same state type.
    """
    policy = checked_policy(moments, policy, key)
    transform = under_standard_promotion(inner)

    def init_fn(params):
        state = transform.init(())
        return state._replace(
            **{
                name: storage.init_moment(name, moment, params, policy)
                for name, moment in moments.items()
            }
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        return update_state(transform, updates, state, tuple(moments), key)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def update_state(
    transform: "Inner",
    updates: optax.Updates,
    state: Any,
    names: tuple[str, ...],
    key: jax.Array | int | None,
    update_one: Callable[..., tuple[jax.Array, dict[str, Any]]] | None = None,
) -> tuple[Any, Any]:
    """One step of ``transform`` on all leaves, its moments in whatever way each is stored.

    Args:
      transform: The elementwise optax transform.
      updates: Gradients.
      state: The transform's state, with low-bit moments.
      names: The state's fields that are moments.
      key: For stochastic rounding.
      update_one: ``(step, gradient, moments, key) -> (update, moments)`` for a leaf with low-bit
        moments; default :func:`update_leaf`.
    """
    step_key = noise_key(key, state.count)

    def step(grad, leaf_moments, constants):
        del constants
        update, new_state = transform.update(grad, state._replace(**leaf_moments))
        return update, {name: getattr(new_state, name) for name in names}

    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=is_variable)
    columns = {name: treedef.flatten_up_to(getattr(state, name)) for name in names}
    rows = [dict(zip(names, row)) for row in zip(*columns.values())]
    results: list[Any] = [None] * len(rows)

    # Leaves in floats go through optax together: the program is optax's own, so its bits are too.
    plain = [i for i, row in enumerate(rows) if not any(map(is_low_bit, row.values()))]
    grads = [unwrapped(paths_and_leaves[i][1]) for i in plain]
    floats = {name: [widened(unwrapped(rows[i][name])) for i in plain] for name in names}
    plain_updates, new_state = transform.update(
        [widened(grad) for grad in grads], state._replace(**floats)
    )
    for position, i in enumerate(plain):
        new = {name: getattr(new_state, name)[position] for name in names}
        stored = {name: x.astype(unwrapped(rows[i][name]).dtype) for name, x in new.items()}
        results[i] = plain_updates[position].astype(grads[position].dtype), stored

    for i, row in enumerate(rows):
        if results[i] is None:
            path, leaf = paths_and_leaves[i]
            row = {name: x if is_low_bit(x) else unwrapped(x) for name, x in row.items()}
            leaf_key = fold_in_path(step_key, path)
            results[i] = (update_one or update_leaf)(step, unwrapped(leaf), row, leaf_key)

    new_updates = [wrapped_like(leaf, u) for (_, leaf), (u, _) in zip(paths_and_leaves, results)]
    new_moments = {
        name: treedef.unflatten(
            wrapped_like(row[name], new[name]) for row, (_, new) in zip(rows, results)
        )
        for name in names
    }
    return treedef.unflatten(new_updates), new_state._replace(**new_moments)


def is_low_bit(moment: Any) -> bool:
    """Whether a moment is stored as something else than one array."""
    return isinstance(moment, QuantizedArray | FactoredMoment)


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
    if key is None and any(spec and spec.rounding == "stochastic" for spec in specs):
        raise ValueError("key must be given (a jax.random.key or a seed) for stochastic rounding")
    return policy


def noise_key(key: jax.Array | int | None, count: Any) -> random_bits.Key | None:
    """The key of one step."""
    return None if key is None else random_bits.fold_in(random_bits.key_words(key), count)


def fold_in_path(key: random_bits.Key | None, path: tuple[Any, ...]) -> random_bits.Key | None:
    """The key of one leaf."""
    # Of names, not of positions: adding a leaf leaves the noise of the others alone.
    return None if key is None else random_bits.fold_in(key, name_hash(path_name(path)))
