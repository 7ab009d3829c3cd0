"""What few bits do to the moments and updates of chosen leaves, beside a float32 shadow."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowbit.moments.flax_variables import is_variable, unwrapped
from optax_lowbit.moments.policy import path_name
from optax_lowbit.moments.storage import is_low_bit
from optax_lowbit.optimizers.leafwise import checked_transform
from optax_lowbit.optimizers.ownership import is_state_leaf, moment_names, slots
from optax_lowbit.quant import QuantizedArray, dequantize, is_quantized, packing

Measures = dict[str, jax.Array]


class DiagnosticsState(NamedTuple):
    """State of :func:`with_diagnostics`."""

    # shape=(), dtype=jnp.int32; a name of its own, as `inner_state` has a `count`.
    step: jax.typing.ArrayLike
    inner_state: Any
    shadow_state: Any
    measures: Measures  # float32 scalars by name; NaN before the first measurement.


def with_diagnostics(
    tx: optax.GradientTransformation,
    shadow: optax.GradientTransformation,
    leaves: str,
    *,
    every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""``tx``, and measures of what its few bits do to chosen leaves.

    ``shadow`` is given the same gradients, for these leaves alone. The measures, a plain dict of
    scalars for any logger, are ``optax.tree.get(state, "measures")``:

    - ``"{path}/{moment}/relative_error"``: :math:`\|Q^{-1}(\bar m) - m\| / \|m\|`, with :math:`m`
      the shadow's moment: errors of all steps so far, not of one rounding.
    - ``"{path}/{moment}/occupancy"``: the share of the code table that is in use.
    - ``"{path}/{moment}/frozen"``: the share of codes that this step left as they were. Near 1
      where steps are too small for the table (signal swamping).
    - ``"{path}/update_cosine"``: of the angle between the update and the shadow's.

    The updates and ``inner_state`` are those of ``tx``. Without the wrapper there is no cost; with
    it, the shadow's state (8 bytes a parameter of the chosen leaves for Adam) and its step.

    Args:
      tx: A transform with low-bit moments. Put what sees all leaves, such as clipping by the global
        norm, before this in the chain.
      shadow: The same transform in float32, such as ``optax.adamw(1e-3)`` for ``adamw4bit(1e-3)``.
        Moments are matched by their place in the state; one that it lacks has no relative error.
      leaves: A regular expression, searched for in the paths of the parameters.
      every: Measure in every so many steps, beginning with the first.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`, with a
      :class:`DiagnosticsState`.

    Raises:
      ValueError: If ``every`` is less than 1 or ``leaves`` is no regular expression; at init, if it
        matches no parameter with low-bit moments.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_lowbit
      >>> params = {"w": jax.random.normal(jax.random.key(0), (128, 128)), "b": jnp.zeros(128)}
      >>> tx = optax_lowbit.with_diagnostics(
      ...     optax_lowbit.adamw4bit(1e-3), optax.adamw(1e-3), leaves="w")
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> measures = optax.tree.get(state, "measures")
      >>> sorted(measures)
      ['w/mu/frozen', 'w/mu/occupancy', 'w/mu/relative_error',
       'w/nu/frozen', 'w/nu/occupancy', 'w/nu/relative_error', 'w/update_cosine']
      >>> f"{measures['w/mu/relative_error']:.1f}"
      '0.1'

    References:
      Li et al, `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_,
      2023, Section 4.1, which looks at errors of moments in this way.
    """
    if type(every) is not int or every < 1:
        raise ValueError(f"every must be an int of at least 1, got {every!r}")
    try:
        pattern = re.compile(leaves)
    except (re.error, TypeError) as error:
        raise ValueError(f"leaves must be a regular expression, got {leaves!r}: {error}") from error
    tx = checked_transform(tx)
    shadowed = optax.masked(
        checked_transform(shadow, "shadow"), lambda params: _is_chosen(pattern, params)
    )

    def init_fn(params):
        inner_state, shadow_state = tx.init(params), shadowed.init(params)
        if any(map(is_low_bit, jax.tree.leaves(shadow_state, is_leaf=is_state_leaf))):
            raise ValueError("shadow must keep its state in float32, as optax.adamw does")
        state = DiagnosticsState(jnp.zeros([], jnp.int32), inner_state, shadow_state, {})
        like = jax.eval_shape(lambda s, u: _measured(pattern, u, u, s, s), state, params)
        if not like and jax.tree.leaves(params):
            raise ValueError(
                f"leaves must match a parameter with low-bit moments, got {leaves!r}; see describe"
            )
        return state._replace(measures={name: jnp.float32(jnp.nan) for name in like})

    def update_fn(updates, state, params=None, **extra_args):
        new, inner_state = tx.update(updates, state.inner_state, params, **extra_args)
        with jax.numpy_dtype_promotion("standard"):  # as in optax
            expected, shadow_state = shadowed.update(
                updates, state.shadow_state, params, **extra_args
            )
        step = optax.safe_increment(state.step)
        new_state = DiagnosticsState(step, inner_state, shadow_state, state.measures)
        measures = jax.lax.cond(
            state.step % every == 0,
            lambda: _measured(pattern, new, expected, state, new_state),
            lambda: state.measures,
        )
        return new, new_state._replace(measures=measures)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_chosen(pattern: re.Pattern[str], params: Any) -> Any:
    def matches(path, leaf):
        return bool(pattern.search(path_name(path)))

    return jax.tree_util.tree_map_with_path(matches, params, is_leaf=is_variable)


def _measured(
    pattern: re.Pattern[str],
    updates: Any,
    expected: Any,
    old: DiagnosticsState,
    new: DiagnosticsState,
) -> Measures:
    """All measures of one step; empty if no chosen leaf has a low-bit moment."""
    shadow = dict(_by_path(new.shadow_state.inner_state))
    before = dict(_by_path(old.inner_state))
    paths = jax.tree_util.tree_leaves_with_path(updates, is_leaf=is_variable)
    names = [path_name(path) for path, _ in paths]
    measures, measured = {}, set()
    state_slots = slots(new.inner_state, updates)
    for (path, moment), slot, field in zip(
        _by_path(new.inner_state), state_slots, moment_names(state_slots), strict=True
    ):
        owner = slot.owner
        if owner is None or not is_quantized(moment) or not pattern.search(names[owner]):
            continue
        prefix = f"{names[owner]}/{field}"
        measures[f"{prefix}/occupancy"] = _occupancy(moment)
        measures[f"{prefix}/frozen"] = jnp.mean(_codes(moment) == _codes(before[path]))
        if path in shadow:
            error = dequantize(moment).astype(jnp.float32) - _float32(shadow[path])
            measures[f"{prefix}/relative_error"] = _ratio(error, _float32(shadow[path]))
        measured.add(owner)
    pairs = zip(names, paths, jax.tree.leaves(expected, is_leaf=is_variable), strict=True)
    for index, (name, (_, update), shadow_update) in enumerate(pairs):
        if index in measured:
            measures[f"{name}/update_cosine"] = _cosine(_float32(update), _float32(shadow_update))
    return measures


def _by_path(state: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_state_leaf)
    return [(path_name(path), leaf) for path, leaf in leaves]


def _codes(q: QuantizedArray) -> jax.Array:
    return packing.unpack(q.codes, q.spec.bits, q.spec.group_size, q.last_dim)


def _occupancy(q: QuantizedArray) -> jax.Array:
    codes, values = _codes(q), jnp.arange(len(q.spec.values), dtype=jnp.uint8)
    return jnp.mean(jax.lax.map(lambda value: jnp.any(codes == value), values))


def _float32(x: Any) -> jax.Array:
    return unwrapped(x).astype(jnp.float32)


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """The norm of ``x`` over that of ``y``; 0 if ``x`` is 0."""
    norm = jnp.linalg.norm(x)
    return jnp.where(norm == 0, 0.0, norm / jnp.linalg.norm(y))


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Of the angle between them; 1 if both are 0."""
    norms = jnp.linalg.norm(x) * jnp.linalg.norm(y)
    return jnp.where(norms == 0, jnp.all(x == y).astype(jnp.float32), jnp.sum(x * y) / norms)
