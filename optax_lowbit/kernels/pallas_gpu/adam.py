"""Adam on moments kept in few bits, as Triton kernels: one read and one write of everything."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowbit.kernels.adam import Coefficients, adam_direction, adam_step
from optax_lowbit.kernels.pallas_gpu import tiles
from optax_lowbit.kernels.pallas_gpu.launch import Refs, launch, launch_step, store_result
from optax_lowbit.kernels.pallas_gpu.moments import (
    BlockScaled,
    Codec,
    Rank1Scaled,
    from_bits,
    load_factors,
    magnitude_bits,
)
from optax_lowbit.kernels.pallas_gpu.slices import mapped, step_in_slices
from optax_lowbit.kernels.pallas_gpu.tiles import Tiling, column_tiling, flat_tiling
from optax_lowbit.quant import QuantizedArray

# Programs that look for maxima: enough to fill a device, few enough that the column maxima which
# each of them leaves behind take half a MiB.
MAXIMA_PROGRAMS = 1024


def adam(
    grad: jax.Array,
    mu: QuantizedArray,
    nu: Any,
    c: Coefficients,
    *,
    nu_scales: Any = None,
    descent: Any = None,
    interpret: bool = False,
) -> tuple[jax.Array, QuantizedArray, Any]:
    """A step of Adam on one leaf, in place.

    Args:
      grad: float32 or bfloat16, ``(..., n)``.
      mu: The first moment, block-scaled.
      nu: The second moment: block-scaled; or rank-1 scaled along two axes; or, factored, the pair
        of float32 arrays ``(..., n, 1)`` and ``(..., 1, m)`` whose product it is.
      c: What the step multiplies and adds.
      nu_scales: For a rank-1 second moment its new scales, from :func:`adam_rank1_maxima`.
      descent: None, or parameters, learning rate and weight decay in attributes of these names.
      interpret: Whether to interpret the kernel, on any platform.

    Returns:
      ``(result, mu, nu)``. The result is the update, in the gradient's dtype and written over the
      gradient; or, with ``descent``, the new parameters, written over the old ones. Codes and block
      scales are written over the old ones; factors are returned as given.
    """

    def step(grad, moments, nu_scales, descent):
        mu, nu = moments
        result, mu, nu = _adam_at_once(grad, mu, nu, c, nu_scales, descent, interpret)
        return result, (mu, nu)

    result, (mu, nu) = step_in_slices(step, grad, (mu, nu), nu_scales, descent)
    return result, mu, nu


def _adam_at_once(grad, mu, nu, c, nu_scales, descent, interpret):
    first = BlockScaled(Codec("mu", mu.spec, interpret))
    second = None
    inputs = {"grad": grad, **first.operands(mu)}
    moments = {"mu_codes": mu.codes, "mu_scales": mu.scales}
    if not isinstance(nu, QuantizedArray):
        row_shares, columns = nu
        tiling = column_tiling(grad.shape, mu.spec.block_size)
        inputs |= {"nu_rows": row_shares, "nu_columns": columns}
    elif isinstance(nu.scales, tuple):
        second = Rank1Scaled(Codec("nu", nu.spec, interpret))
        tiling = column_tiling(grad.shape, mu.spec.block_size)
        inputs |= second.operands(nu, nu_scales)
        moments |= {"nu_codes": nu.codes}
    else:
        second = BlockScaled(Codec("nu", nu.spec, interpret))
        tiling = flat_tiling(grad.shape, mu.spec.block_size)
        inputs |= second.operands(nu)
        moments |= {"nu_codes": nu.codes, "nu_scales": nu.scales}
    kernel = functools.partial(_adam_kernel, tiling=tiling, first=first, second=second)
    new = launch_step(kernel, tiling, c, inputs, moments, descent, interpret=interpret)
    mu = dataclasses.replace(mu, codes=new["mu_codes"], scales=new["mu_scales"])
    if isinstance(nu, QuantizedArray):
        scales = nu_scales if isinstance(nu.scales, tuple) else new["nu_scales"]
        nu = dataclasses.replace(nu, codes=new["nu_codes"], scales=scales)
    return new["result"], mu, nu


def adam_rank1_maxima(
    grad: jax.Array, nu: QuantizedArray, c: Coefficients, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The scales of the second moment that a step makes, rank-1 along two axes.

    The first of two passes, so that a moment is never in memory in float32. A program follows one
    group of columns through many rows; what programs find is put together outside of the kernel.

    Args:
      grad: float32 or bfloat16, ``(..., n, m)``.
      nu: The second moment.
      c: What the step multiplies and adds.
      interpret: Whether to interpret the kernel, on any platform.

    Returns:
      The largest values of rows ``(..., n, 1)`` and of columns ``(..., 1, m)``, float32.
    """
    find = functools.partial(_maxima_at_once, c=c, interpret=interpret)
    return mapped(find, grad.shape, grad, nu)


def _maxima_at_once(grad, nu, *, c, interpret):
    moment = Rank1Scaled(Codec("nu", nu.spec, interpret))
    tiling = column_tiling(grad.shape, nu.spec.block_size)
    tiles_in_all = tiling.groups * tiling.row_tiles * tiling.batch
    tiling = dataclasses.replace(tiling, turns=-(-tiles_in_all // MAXIMA_PROGRAMS))
    groups, programs, batch = tiling.grid
    outputs = {
        "rows": jax.ShapeDtypeStruct((groups, batch * tiling.rows), jnp.int32),
        "columns": jax.ShapeDtypeStruct((programs, batch * tiling.n), jnp.int32),
    }
    inputs = {"grad": grad, "scalars": jnp.stack(c), **moment.operands(nu)}
    kernel = functools.partial(_maxima_kernel, tiling=tiling, moment=moment)
    found = launch(kernel, tiling, inputs, outputs, {}, interpret=interpret)
    rows, columns = (from_bits(jnp.max(found[name], axis=0)) for name in ("rows", "columns"))
    return rows.reshape(nu.scales[0].shape), columns.reshape(nu.scales[1].shape)


def _adam_kernel(
    refs: Refs,
    out: Refs,
    *,
    tiling: Tiling,
    first: BlockScaled,
    second: BlockScaled | Rank1Scaled | None,
):
    """``second`` is None for a factored second moment."""
    tile = tiling.tile(tiling.program())
    c = _coefficients(refs)
    grads = [half.astype(jnp.float32) for half in tile.load(refs["grad"])]
    mu = first.load(refs, tile)
    if second is None:
        row, columns = load_factors(refs["nu_rows"], refs["nu_columns"], tile)
        mu = [c.one_minus_b1 * g + c.b1 * m for g, m in zip(grads, mu)]
        updates = [adam_direction(g, m, row * v, c) for g, m, v in zip(grads, mu, columns)]
    else:
        old = zip(grads, mu, second.load(refs, tile))
        updates, mu, nu = zip(*(adam_step(g, m, v, c) for g, m, v in old))
        second.store(refs, out, tile, nu)
    store_result(refs, out, tile, (updates[0], updates[1]))
    first.store(refs, out, tile, (mu[0], mu[1]))


def _maxima_kernel(refs: Refs, out: Refs, *, tiling: Tiling, moment: Rank1Scaled):
    """Writes :func:`magnitude_bits` of the maxima that each program has found."""
    c = _coefficients(refs)
    program = tiling.program()
    group, row_program, _ = program

    def turn(i, found):
        tile = tiling.tile(program, i)
        grads = [half.astype(jnp.float32) for half in tile.load(refs["grad"])]
        # Of the step only the second moment is used; the compiler drops the rest.
        steps = [adam_step(g, g, v, c) for g, v in zip(grads, moment.load(refs, tile))]
        low, high = (
            magnitude_bits(nu, mask) for (_, _, nu), mask in zip(steps, tile.element_masks)
        )
        row = jnp.max(jnp.maximum(low, high), axis=1, keepdims=True)
        index = group * (tiling.batch * tiling.rows) + tile.rows
        tiles.store(out["rows"], index, row, tile.row_mask)
        return jnp.maximum(found[0], low), jnp.maximum(found[1], high)

    none = jnp.zeros((tiling.tile_rows, tiling.lanes), jnp.int32)
    found = jax.lax.fori_loop(0, tiling.turns, turn, (none, none))
    tile = tiling.tile(program)
    for bits, index, mask in zip(found, tile.columns, tile.lane_masks):
        index = row_program * (tiling.batch * tiling.n) + index
        tiles.store(out["columns"], index, jnp.max(bits, axis=0, keepdims=True), mask)


def _coefficients(refs: Refs) -> Coefficients:
    return Coefficients(*(refs["scalars"][i] for i in range(len(Coefficients._fields))))
