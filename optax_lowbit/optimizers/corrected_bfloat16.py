"""Weights of 24 bits: bfloat16 parameters, and 8 more bits of each in the optimizer's state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_lowbit.moments.flax_variables import is_variable, unwrapped, wrapped_like
from optax_lowbit.moments.policy import path_name
from optax_lowbit.moments.storage import record_moment


class CorrectedBfloat16State(NamedTuple):
    """State of :func:`correct_bfloat16`.

    Attributes:
      correction: int8 arrays of the shapes of the bfloat16 parameters, in 256ths of the distance to
        their neighbours; `optax.MaskedNode` for other parameters.
    """

    correction: Any


def correct_bfloat16() -> optax.GradientTransformationExtraArgs:
    r"""Lets bfloat16 parameters add up updates as weights of 24 bits do; last in a chain.

    The state keeps, for each bfloat16 parameter :math:`p`, what of its weight :math:`w` does not
    fit: :math:`c`, an int8. Bits of floats, without their sign, grow with their size, so :math:`p`
    are the upper 16 of the 24 bits, rounded, and :math:`c` is the rest:

    .. math::
      \mathrm{bits}(w) = 2^{16}\, \mathrm{bits}(p) + 2^{8} c, \qquad -128 \le c \le 127

    An update :math:`u` gives :math:`w' = w + u` in float32, rounded to nearest in its upper 24
    bits, and so :math:`p'` and :math:`c'`. What is emitted is :math:`p' - p`, in float32, to which
    `optax.apply_updates` adds :math:`p` and has :math:`p'` exactly, whatever the two are. (Where
    float32 has no such difference, as for 1 and :math:`-2^{-24}`, or the platform takes it for
    zero, as CPUs do below :math:`2^{-126}`, :math:`p'` is what the sum gives, and :math:`c' = 0`.)
    So 15 bits of a weight's fraction are kept, and updates as small as :math:`2^{-17}` of it, where
    bfloat16 alone loses those below :math:`2^{-9}`.

    Infinities and NaN stay, and have no correction. Parameters of other dtypes, and their updates,
    pass unchanged. All is elementwise: the same on every mesh, and without communication.

    **Memory.** One byte a bfloat16 parameter: 3 with the parameter itself, against 6 for bfloat16
    parameters with float32 copies.

    **Gradients.** Updates have the dtype of gradients. Let those be float32: in bfloat16 an update
    is right to 0.4%, which training bears, but a chain also adds in bfloat16, and a weight decay of
    less than 1/512 of the update is lost there.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`, with a
      :class:`CorrectedBfloat16State`. Its update needs ``params``.

    Raises:
      ValueError: In an update, without parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_lowbit
      >>> tx = optax.chain(optax.sgd(1e-3), optax_lowbit.correct_bfloat16())
      >>> params = jnp.ones((), jnp.bfloat16)
      >>> state = tx.init(params)
      >>> for _ in range(10):
      ...     updates, state = tx.update(jnp.ones(()), state, params)
      ...     with jax.numpy_dtype_promotion("standard"):  # JAX's default
      ...         params = optax.apply_updates(params, updates)
      >>> float(params), f"{optax_lowbit.join_bfloat16(params, state):.4f}"
      (0.98828125, '0.9899')

    References:
      Gonzalez Ortiz et al, `FlashOptim <https://arxiv.org/abs/2602.23349>`_, 2026: there
      :math:`c` counts 127ths of half the distance, in float arithmetic. Here 24 bits are split, in
      integers, so that splitting and joining are exact, subnormals too.

    .. seealso:: :func:`apply_updates_stochastic`, which needs no state, and adds noise instead.
    """

    def init_fn(params):
        return CorrectedBfloat16State(_map(_no_correction, params))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("correct_bfloat16 needs params: call update(updates, state, params)")
        pairs = _map(_corrected, params, updates, state.correction)
        return _unzip(params, pairs, CorrectedBfloat16State)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def split_bfloat16(weights: Any) -> tuple[Any, CorrectedBfloat16State]:
    """Float32 weights as bfloat16 parameters and the state that has 8 more bits of each.

    Args:
      weights: A tree; leaves that are not float32 stay as they are.

    Returns:
      Parameters, and a state to be put where that of :func:`correct_bfloat16` is, the last of its
      chain. Together they are the weights, rounded to nearest to 24 bits.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_lowbit
      >>> weights = {"w": jnp.linspace(0.5, 1.0, 5000)}
      >>> tx = optax.chain(optax_lowbit.adamw4bit(1e-3), optax_lowbit.correct_bfloat16())
      >>> params, corrected = optax_lowbit.split_bfloat16(weights)
      >>> state = (*tx.init(params)[:-1], corrected)
      >>> error = optax_lowbit.join_bfloat16(params, state)["w"] - weights["w"]
      >>> bool(abs(error).max() <= 2**-17)
      True

    .. seealso:: :func:`join_bfloat16`
    """
    pairs = _map(lambda path, leaf: _split_leaf(leaf), weights)
    return _unzip(weights, pairs, CorrectedBfloat16State)


def join_bfloat16(params: Any, state: Any) -> Any:
    """The weights of 24 bits, in float32: to evaluate, or to save.

    Args:
      params: The parameters.
      state: A :class:`CorrectedBfloat16State`, or the state of a chain that has one.

    Returns:
      A tree like ``params`` with float32 in place of bfloat16.

    Raises:
      KeyError: If there are several such states.
      ValueError: If there is none.

    Examples:
      >>> import jax.numpy as jnp, optax_lowbit
      >>> params, state = optax_lowbit.split_bfloat16(jnp.float32(0.3))
      >>> float(params), f"{optax_lowbit.join_bfloat16(params, state):.6f}"
      (0.30078125, '0.300003')

    .. seealso:: :func:`split_bfloat16`
    """
    correction = optax.tree.get(state, "correction")
    if correction is None:
        raise ValueError("state has no state of correct_bfloat16")
    return _map(lambda path, p, c: _joined_leaf(p, c), params, correction)


def _map(function: Any, tree: Any, *rest: Any) -> Any:
    return jax.tree_util.tree_map_with_path(function, tree, *rest, is_leaf=is_variable)


def _unzip(tree: Any, pairs: Any, state_type: Any) -> tuple[Any, Any]:
    treedef = jax.tree.structure(tree, is_leaf=is_variable)
    columns = list(zip(*treedef.flatten_up_to(pairs))) or [(), ()]
    return treedef.unflatten(columns[0]), state_type(treedef.unflatten(columns[1]))


def _no_correction(path: Any, leaf: Any) -> Any:
    param = unwrapped(leaf)
    if param.dtype != jnp.bfloat16:
        return optax.MaskedNode()
    correction = jnp.zeros_like(param, dtype=jnp.int8)
    dtype = np.dtype(np.int8)
    record_moment(path_name(path), tuple(param.shape), "correction", dtype, correction, "")
    return wrapped_like(leaf, correction)


def _corrected(path: Any, leaf: Any, update: Any, correction: Any) -> tuple[Any, Any]:
    """The update that apply_updates is to add, and the new correction."""
    del path
    param = unwrapped(leaf)
    if param.dtype != jnp.bfloat16:
        return update, correction
    old = param.astype(jnp.float32)
    weight = _joined(param, unwrapped(correction)) + unwrapped(update).astype(jnp.float32)
    aim, rest = _split(weight)
    difference = jnp.where(aim == param, jnp.float32(0), aim.astype(jnp.float32) - old)
    reached = (old + difference).astype(jnp.bfloat16)
    rest = jnp.where(_bits(reached) == _bits(aim), rest, jnp.int8(0))
    return wrapped_like(update, difference), wrapped_like(correction, rest)


def _split_leaf(leaf: Any) -> tuple[Any, Any]:
    weight = unwrapped(leaf)
    if weight.dtype != jnp.float32:
        return leaf, optax.MaskedNode()
    param, rest = _split(weight)
    return wrapped_like(leaf, param), wrapped_like(leaf, rest)


def _joined_leaf(leaf: Any, correction: Any) -> Any:
    if isinstance(correction, optax.MaskedNode):
        return leaf
    return wrapped_like(leaf, _joined(unwrapped(leaf), unwrapped(correction)))


def _split(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Float32 as bfloat16, halves away from zero, and the rest of its upper 24 bits."""
    bits = jax.lax.bitcast_convert_type(weight, jnp.uint32)
    bits = bits + jnp.uint32(0x7F) + (bits >> 8 & 1) & jnp.uint32(0xFFFFFF00)  # ties to even
    upper = bits + jnp.uint32(0x8000) >> 16
    rest = jax.lax.bitcast_convert_type(bits - (upper << 16), jnp.int32) >> 8
    param = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
    param = jnp.where(jnp.isnan(weight), weight.astype(jnp.bfloat16), param)
    return param, jnp.where(jnp.isfinite(param), rest, 0).astype(jnp.int8)


def _joined(param: jax.Array, correction: jax.Array) -> jax.Array:
    """The float32 that :func:`_split` has split."""
    bits = (_bits(param).astype(jnp.int32) << 16) + (correction.astype(jnp.int32) << 8)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16)
