"""Steps of a leaf whose moments are kept in few bits, by whatever kernel takes it."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from optax_lowbit.kernels import backends
from optax_lowbit.kernels.adam import Coefficients, adam_direction, adam_step, coefficients
from optax_lowbit.kernels.parameters import Descent, descended, noise_operands
from optax_lowbit.kernels.partitioning import per_device
from optax_lowbit.kernels.reference import Step, exchanged, scales_stored_like, update_leaf
from optax_lowbit.quant import QuantSpec, is_quantized, scaling
from optax_lowbit.quant.array import code_padding, with_float_scales

Moments = dict[str, Any]


class Fused(Protocol):
    """An optimizer's step as the kernels know it."""

    @property
    def op(self) -> str:
        """What `backends.why_not` calls it."""
        ...

    def scalars(self, count: jax.Array) -> jax.Array:
        """All that step number ``count``, from 1, multiplies and adds: a float32 vector."""
        ...

    def specs(self, moments: Moments) -> tuple[QuantSpec | None, ...]:
        """How the moments are stored, in the op's order; None for a factored one."""
        ...

    def run(
        self,
        backend: str,
        scalars: jax.Array,
        grad: jax.Array,
        moments: Moments,
        factors: tuple[jax.Array, jax.Array] | None,
        descent: Descent | None,
    ) -> tuple[jax.Array, Moments]:
        """The step by a backend's kernel."""
        ...

    def step(
        self, scalars: jax.Array, grad: jax.Array, moments: dict[str, jax.Array], factors: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The step in float32."""
        ...


@dataclasses.dataclass(frozen=True)
class FusedAdam:
    """Adam, with moments ``mu`` and ``nu``, or ``mu`` and given factors of ``nu``."""

    b1: jax.typing.ArrayLike
    b2: jax.typing.ArrayLike
    eps: jax.typing.ArrayLike
    eps_root: jax.typing.ArrayLike
    nesterov: bool
    op: str = dataclasses.field(default="adam", init=False)

    def scalars(self, count: jax.Array) -> jax.Array:
        """The :class:`~optax_lowbit.kernels.adam.Coefficients`."""
        return jnp.stack(
            coefficients(self.b1, self.b2, self.eps, self.eps_root, count, nesterov=self.nesterov)
        )

    def specs(self, moments: Moments) -> tuple[QuantSpec | None, ...]:
        """Of ``mu`` and ``nu``."""
        return moments["mu"].spec, moments["nu"].spec if "nu" in moments else None

    def run(self, backend, scalars, grad, moments, factors, descent):
        """One call, or two under rank-1: the new scales must be known before codes are written."""
        kernels, options = backends.kernels(backend), backends.options(backend)
        mu, nu = moments["mu"], moments.get("nu", factors)
        group, nu_scales = mu.spec.group_size, None
        if is_quantized(nu) and isinstance(nu.scales, tuple):

            def maxima(scalars, grad, codes, *scales, spread):
                local = _of_part(dataclasses.replace(nu, codes=codes, scales=scales), grad)
                found = kernels.adam_rank1_maxima(grad, local, Coefficients(*scalars), **options)
                spread = spread[-len(found) :]  # of other axes each slice has maxima of its own
                return tuple(_over_other_axes(x, i, spread) for i, x in enumerate(found))

            nu_scales = per_device(
                maxima, scalars, (grad, nu.codes, *nu.scales), group, exchanges=True
            )
            nu_scales = exchanged(nu_scales, nu, grad)

        def step(c, grad, mu, nu, nu_scales, descent):
            return kernels.adam(
                grad, mu, nu, Coefficients(*c), nu_scales=nu_scales, descent=descent, **options
            )

        result, mu, nu = _on_leaves(step, scalars, grad, (mu, nu, nu_scales), descent, group, 2)
        if nu_scales is not None:
            nu = dataclasses.replace(nu, scales=nu_scales)  # with the types of what was exchanged
        return result, {"mu": mu, "nu": nu} if "nu" in moments else {"mu": mu}

    def step(self, scalars, grad, moments, factors):
        """As :func:`~optax_lowbit.kernels.adam.adam_step`; the factors give the new ``nu``."""
        c = Coefficients(*scalars)
        if "nu" in moments:
            update, mu, nu = adam_step(grad, moments["mu"], moments["nu"], c)
            return update, {"mu": mu, "nu": nu}
        row_shares, columns = factors
        mu = c.one_minus_b1 * grad + c.b1 * moments["mu"]
        return adam_direction(grad, mu, row_shares * columns, c), {"mu": mu}


@dataclasses.dataclass(frozen=True)
class FusedMomentum:
    """Momentum, with the moment ``trace``."""

    decay: jax.typing.ArrayLike
    nesterov: bool
    op: str = dataclasses.field(default="momentum", init=False)

    def scalars(self, count: jax.Array) -> jax.Array:
        """The decay rate."""
        del count
        return jnp.asarray(self.decay, jnp.float32)[None]

    def specs(self, moments: Moments) -> tuple[QuantSpec | None, ...]:
        """Of ``trace``."""
        return (moments["trace"].spec,)

    def run(self, backend, scalars, grad, moments, factors, descent):
        """One call."""
        del factors
        kernels, options = backends.kernels(backend), backends.options(backend)

        def step(scalars, grad, trace, descent):
            (decay,) = scalars
            return kernels.momentum(
                grad, trace, decay, nesterov=self.nesterov, descent=descent, **options
            )

        trace = moments["trace"]
        result, trace = _on_leaves(step, scalars, grad, (trace,), descent, trace.spec.group_size, 1)
        return result, {"trace": trace}

    def step(self, scalars, grad, moments, factors):
        """As in `optax.trace`."""
        del factors
        (decay,) = scalars
        trace = grad + decay * moments["trace"]
        return grad + decay * trace if self.nesterov else trace, {"trace": trace}


def step_leaf(
    step: Step,
    fused: Fused | None,
    backend: str,
    scalars: jax.Array | None,
    grad: jax.Array,
    moments: Moments,
    key: Any,
    factors: Any = None,
    descent: Descent | None = None,
    name: str = "",
) -> tuple[jax.Array, Moments]:
    """One step of one leaf.

    Args:
      step: The step in float32, of the reference.
      fused: The same step as the kernels know it, if they do.
      backend: A :data:`~optax_lowbit.kernels.backends.Backend`.
      scalars: From ``fused.scalars``.
      grad: Gradient.
      moments: The leaf's moments, by name.
      key: For stochastic rounding.
      factors: Shares of rows and means of columns of a factored second moment; or, without
        ``fused``, any tree of constants of ``step``.
      descent: For a step that writes parameters.
      name: What errors call the leaf.

    Returns:
      The update, or the new parameters if there is a descent; and the new moments.

    Raises:
      ValueError: If gradient, moments and parameters are not of one shape, or a backend is named
        that cannot take them: the gradient may differ from the parameter that `init` saw.
    """
    _check_shapes(grad, moments, descent)
    stored, moments = moments, {name: _with_float_scales(x) for name, x in moments.items()}

    def run(name):
        if name == "reference":
            return functools.partial(_by_reference, step, key)
        return functools.partial(_by_kernel, fused, name, scalars)

    operands = grad, moments, factors, descent
    is_low_bit = all(map(is_quantized, moments.values()))
    if fused is None or scalars is None or not is_low_bit:
        result, moments = run("reference")(*operands)
    else:
        specs = fused.specs(moments)
        shape, kind = _shape_for_scales(grad.shape, moments), f"{grad.dtype}{[*grad.shape]}"
        task = " ".join(filter(None, ["step", name, f"by a gradient {kind}"]))
        chosen = backends.platforms(backend, fused.op, grad, shape, grad.dtype, *specs, task=task)
        result, moments = backends.by_platform(chosen, run, *operands)
    return result, {
        name: scales_stored_like(x, moments[name], name, key) for name, x in stored.items()
    }


def _shape_for_scales(shape: tuple[int, ...], moments: Moments) -> tuple[int, ...]:
    """``shape``, a matrix where a stack of it would have rank-1 scales of more axes than it has.

    A shard of a stack of matrices may have, if it were a leaf of its own.
    """
    for x in moments.values():
        scales = x.scales if isinstance(x.scales, tuple) else ()
        if len(scales) == 2 != scaling.rank1_axes(shape, x.spec.block_size):
            return math.prod(shape[:-1]), shape[-1]
    return shape


def _with_float_scales(moment: Any) -> Any:
    return with_float_scales(moment) if is_quantized(moment) else moment


def _by_reference(step, key, grad, moments, factors, descent):
    update, moments = update_leaf(step, grad, moments, key, factors)
    return descended(update, descent), moments


def _check_shapes(grad: jax.Array, moments: Moments, descent: Descent | None) -> None:
    # Before a kernel reads one array as long as another.
    others = {name: moment.shape for name, moment in moments.items()}
    if descent is not None:
        others["params"] = descent.params.shape
    for name, shape in others.items():
        if shape != grad.shape:
            raise ValueError(
                f"updates must have the shapes that the optimizer was initialized with: a gradient "
                f"of shape {grad.shape} has {name} of shape {shape}"
            )


def _by_kernel(fused, backend, *operands):
    """The kernel's step, whose derivatives are those of its arithmetic in JAX."""

    def differentiable(scalars, grad, moments, factors, descent):
        step = functools.partial(fused.step, scalars)
        return _by_reference(step, None, grad, moments, factors, descent)

    run = jax.custom_jvp(functools.partial(_run_kernel, fused, backend))
    run.defjvp(lambda primals, tangents: jax.jvp(differentiable, primals, tangents))
    return run(*operands)


def _run_kernel(fused, backend, scalars, grad, moments, factors, descent):
    # Kernels know float32 and bfloat16, and those in Pallas round to nearest alone.
    takes_descent = descent is None or (
        descent.params.dtype in (jnp.float32, jnp.bfloat16)
        and (descent.key is None or backend == "cpu")
    )
    if takes_descent:
        return fused.run(backend, scalars, grad, moments, factors, descent)
    update, moments = fused.run(backend, scalars, grad, moments, factors, None)
    return descended(update, descent), moments


def _over_other_axes(maxima: jax.Array, axis: int, spread: Any) -> jax.Array:
    """Maxima along ``axis`` over all devices that the other axes are spread over."""
    names = [name for i, others in enumerate(spread) if i != axis for name in others]
    return jax.lax.pmax(maxima, tuple(names)) if names else maxima


def _on_leaves(
    step: Callable[..., tuple[Any, ...]],
    scalars: jax.Array,
    grad: jax.Array,
    stored: tuple[Any, ...],
    descent: Descent | None,
    group: int,
    returned: int,
) -> tuple[Any, ...]:
    """``step(scalars, grad, *stored, descent)`` device by device.

    Quantized arrays go as the arrays that they consist of, as their static part is that of a shard
    inside. The first ``returned`` of them come back.
    """
    noise = None
    if descent is not None and descent.key is not None:
        noise = noise_operands(descent.key, descent.params, descent.rows, group)
    flat, tree = jax.tree.flatten((stored, descent.params if descent else None, noise))
    rates = [descent.learning_rate, descent.weight_decay] if descent else []
    vector = jnp.concatenate([scalars, *(jnp.asarray(r, jnp.float32)[None] for r in rates)])

    def kernel(vector, grad, *flat):
        stored, params, noise = tree.unflatten(flat)
        stored = jax.tree.map(lambda x: _of_part(x, grad), stored, is_leaf=is_quantized)
        values = list(vector)
        local = Descent(params, values[-2], values[-1], noise=noise) if descent else None
        result, *new = step(values[: scalars.size], grad, *stored, local)
        return result, *jax.tree.leaves(new)

    result, *new = per_device(kernel, vector, (grad, *flat), group)
    structure = jax.tree.structure(list(stored[:returned]))
    return result, *structure.unflatten(new)


def _of_part(x: Any, leaf: jax.Array) -> Any:
    """A quantized array whose arrays are parts, as long as ``leaf``, with the padding of a part."""
    if not is_quantized(x):
        return x
    return dataclasses.replace(x, padding=code_padding(leaf.shape[-1], x.spec.bits))
