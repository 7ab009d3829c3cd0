"""Backpropagation for some leaves, and zeroth-order steps for the rest."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowbit.kernels.parameters import rounded
from optax_lowbit.kernels.reference import name_hash, widened
from optax_lowbit.moments.policy import path_name
from optax_lowbit.quant import random_bits
from optax_lowbit.zo import checks
from optax_lowbit.zo.directions import (
    Choice,
    Trainable,
    chooses,
    leaf_keys,
    split,
)
from optax_lowbit.zo.estimators import value_estimator
from optax_lowbit.zo.optimizer import Loss, ZeroOrderOptimizer
from optax_lowbit.zo.state import StepInfo, ZeroOrderState


def hybrid(
    opt: ZeroOrderOptimizer, tx: optax.GradientTransformation, first_order: Choice
) -> "HybridOptimizer":
    r"""Trains some leaves by backpropagation, and the rest by zeroth-order steps.

    With :math:`\theta` the leaves of zeroth and :math:`w` those of first order,

    .. math::
      c_i = \frac{L(\theta + \epsilon z_i, w) - L(\theta - \epsilon z_i, w)}{2 \epsilon}, \qquad
      g_w = \frac{1}{2 q} \sum_{i=1}^q \sum_{\pm} \nabla_w L(\theta \pm \epsilon z_i, w)

    Only leaves of first order are differentiated. Where those are a model's last layers, nothing
    before them is kept for the backward pass, which stops there. Choose them late: whatever a
    leaf's value passes through is kept, and a tied embedding is used by the first layer, too.

    The gradient is taken in the very evaluations that probe the rest, so it costs no forward pass
    of its own. Its mean over both signs is the gradient at ``theta`` up to ``eps^2``. An estimator
    that evaluates the loss at ``theta``, as :class:`OneSided`, has it from there, exactly.

    **Memory.** That of the loss, of backpropagation as far as the first-order leaves, and of their
    gradient in float32, twice. Of the rest: one perturbed leaf.

    Args:
      opt: For the rest, as far as its ``trainable`` chooses. A :class:`ZeroOrderOptimizer` whose
        estimator needs values of the loss alone, with ``probe_batch`` 1, and all of whose probes
        count, on each device.
      tx: Any optax transform, with its learning rate: ``optax.adamw(1e-4)``, or
        ``optax_lowbit.adamw4bit(1e-4)``. It sees the parameters' tree with
        :class:`optax.MaskedNode` in place of other leaves, as under :func:`optax.masked`.
      first_order: Which float leaves are differentiated: a regular expression that is searched for
        in a path such as ``layers/11/kernel``, or a predicate of path and leaf. Layers that are
        stacked in one leaf are chosen together.

    Returns:
      An optimizer with methods ``init`` and ``step``, whose state is a :class:`HybridState`. The
      record in its :class:`StepInfo` is that of the zeroth-order half: a gradient does not fit in
      one. Bfloat16 leaves are rounded stochastically. After a loss that is not finite ``tx`` gets
      what its gradient is; see :func:`optax.apply_if_finite`.

    Raises:
      TypeError: If an argument is of another type, or the estimator differentiates the loss.
      ValueError: If ``probe_batch`` is not 1, there is a schedule of probes, or they are spread
        over devices; at init, if no float leaf is chosen, or none is left.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_lowbit import zo
      >>> params = {"body": jnp.full((2, 4), 0.5), "head": jnp.ones((4, 1))}
      >>> def loss(params, x, y):
      ...     return jnp.mean((jnp.tanh(x @ params["body"]) @ params["head"] - y) ** 2)
      >>> opt = zo.hybrid(zo.zo_sgd(1e-2), optax.sgd(0.1), "head")
      >>> state = opt.init(params, 0)
      >>> step = jax.jit(opt.step, static_argnums=0)
      >>> x, y = jnp.eye(2), jnp.ones((2, 1))
      >>> for _ in range(100):
      ...     params, state, info = step(loss, params, state, x, y)
      >>> bool(info.loss < 0.01)
      True

    References:
      Zhang et al, `Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A
      Benchmark <https://arxiv.org/abs/2402.11592>`_, 2024, section 5.
    """
    if not isinstance(opt, ZeroOrderOptimizer):
        raise TypeError(f"opt must be a ZeroOrderOptimizer, got {type(opt).__name__}")
    if not hasattr(tx, "init") or not hasattr(tx, "update"):
        raise TypeError(f"tx must be an optax transform, got {type(tx).__name__}")
    if first_order is None:
        raise TypeError("first_order must choose leaves, got None")
    checks.check_choice("first_order", first_order)
    _ = opt.evaluations  # raises where values of the loss are not enough
    if opt.probe_batch != 1:
        raise ValueError(
            f"probe_batch must be 1, as each probe has a gradient of its own; got {opt.probe_batch}"
        )
    for name in ("active_probes", "probe_axis"):
        if getattr(opt, name) is not None:
            raise ValueError(f"opt must have no {name}: each probe has a gradient of its own")
    return HybridOptimizer(opt, tx, first_order)


class HybridState(NamedTuple):
    """State of a :class:`HybridOptimizer`.

    Attributes:
      zeroth: The :class:`ZeroOrderState` of the rest.
      first: The transform's own.
    """

    zeroth: ZeroOrderState
    first: Any

    @property
    def count(self) -> jax.Array:
        """Steps taken."""
        return self.zeroth.count


@dataclasses.dataclass(frozen=True)
class HybridOptimizer:
    """What :func:`hybrid` makes, which says what each field is."""

    opt: ZeroOrderOptimizer
    tx: optax.GradientTransformation
    first_order: Choice

    def init(self, params: Any, key: jax.Array | int) -> HybridState:
        """As :meth:`ZeroOrderOptimizer.init`."""
        top = self._top(params)
        if not jax.tree.leaves(top):
            raise ValueError(f"first_order={self.first_order!r} must choose a float leaf")
        is_ours = functools.partial(self._is_zeroth, self.opt.trainable)
        pairs = jax.tree_util.tree_leaves_with_path(params)
        if not any(_is_float(leaf) and is_ours(path_name(path), leaf) for path, leaf in pairs):
            raise ValueError(
                f"first_order={self.first_order!r} must leave a float leaf that trains"
            )
        return HybridState(self._rest.init(params, key), self.tx.init(top))

    def step(
        self, loss_fn: Loss, params: Any, state: HybridState, *args: Any
    ) -> tuple[Any, HybridState, StepInfo]:
        """As :meth:`ZeroOrderOptimizer.step`; both halves start from the same parameters."""
        rest, first = self._rest, split(params, self.first_order)
        losses, grads = self._evaluate(loss_fn, first, state.zeroth, args)
        info = rest._read(state.zeroth, losses)
        top = self._top(params)
        treedef = jax.tree.structure(top)
        grads = treedef.unflatten(
            [grad.astype(leaf.dtype) for grad, leaf in zip(grads, first.leaves)]
        )
        updates, first_state = self.tx.update(grads, state.first, top)
        new = _moved(first, jax.tree.leaves(updates), state.zeroth)
        params, zeroth = rest.apply(first.tree(new), state.zeroth, info.record)
        return params, HybridState(zeroth, first_state), info

    @property
    def _rest(self) -> ZeroOrderOptimizer:
        trainable = functools.partial(self._is_zeroth, self.opt.trainable)
        return dataclasses.replace(self.opt, trainable=trainable)

    def _is_zeroth(self, trainable: Choice | None, path: str, leaf: Any) -> bool:
        is_ours = trainable is None or chooses(trainable, path, leaf)
        return is_ours and not chooses(self.first_order, path, leaf)

    def _top(self, params: Any) -> Any:
        """The tree of first-order leaves, as optax's transforms are given a part of a tree."""

        def masked(path, leaf):
            is_ours = _is_float(leaf) and jnp.size(leaf) > 0
            is_ours = is_ours and chooses(self.first_order, path_name(path), leaf)
            return leaf if is_ours else optax.MaskedNode()

        return jax.tree_util.tree_map_with_path(masked, params)

    def _evaluate(
        self, loss_fn: Loss, first: Trainable, state: ZeroOrderState, args: tuple[Any, ...]
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The losses that a step needs, and the mean gradient of first-order leaves, float32."""
        rest = self._rest
        estimator = value_estimator(rest.estimator)
        probes, signs = jax.vmap(estimator.point)(jnp.arange(rest.evaluations))
        keys = rest.keys(rest.split(first.tree(first.leaves)), state)

        def loss(leaves, key, slope):
            ours = rest.split(first.tree(leaves))
            return rest._slice(loss_fn, ours, state, args).at(key, slope)

        points = keys[probes], signs * rest._eps(state)
        leaves = list(first.leaves)
        if estimator.uses_base:
            here = functools.partial(checks.scalar_loss, loss_fn, args)
            base, grads = jax.value_and_grad(lambda x: here(first.tree(x)))(leaves)
            others = jax.lax.map(
                lambda point: loss(leaves, *point), jax.tree.map(lambda x: x[1:], points)
            )
            return jnp.append(base, others), [widened(grad) for grad in grads]

        def turn(total, point):
            value, grads = jax.value_and_grad(loss)(leaves, *point)
            return [x + widened(grad) for x, grad in zip(total, grads)], value

        zeros = [jnp.zeros_like(widened(leaf)) for leaf in leaves]
        total, losses = jax.lax.scan(turn, zeros, points)
        return losses, [x / jnp.float32(len(losses)) for x in total]


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _moved(first: Trainable, updates: list[jax.Array], state: ZeroOrderState) -> list[jax.Array]:
    """The leaves after their updates, in their dtypes."""
    step = random_bits.fold_in((state.key[0], state.key[1]), state.count)
    keys = leaf_keys(random_bits.fold_in(step, name_hash("first order")), first.paths)
    return [
        rounded(widened(leaf) + widened(update), leaf.dtype, (key[0], key[1]))
        for leaf, update, key in zip(first.leaves, updates, keys)
    ]
