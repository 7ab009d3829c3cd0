"""Adam in one kernel: moments decoded, stepped and encoded in registers, all written in place."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_lowbit.kernels.adam import Coefficients, adam_direction, adam_step
from optax_lowbit.kernels.pallas_tpu import chunks, geometry, leaves, operands
from optax_lowbit.quant import QuantizedArray, is_quantized


def adam(
    grad: jax.Array,
    mu: QuantizedArray,
    nu: QuantizedArray | tuple[jax.Array, jax.Array],
    c: Coefficients,
    *,
    nu_scales: tuple[jax.Array, jax.Array] | None = None,
    descent: Any = None,
    interpret: bool = False,
) -> tuple[jax.Array, QuantizedArray, Any]:
    """A step of Adam on one leaf that :func:`why_not` has nothing against.

    Args:
      grad: float32 or bfloat16 ``(..., n)``; written over by the update unless there is a descent.
      mu: The first moment, block-scaled; written in place.
      nu: The second moment, block-scaled or with two rank-1 scales, written in place; or the
        factored one, float32 ``(..., rows, 1)`` and ``(..., 1, n)``, whose product it is.
      c: The step's coefficients.
      nu_scales: For rank-1 scales: those of the new second moment, see :func:`adam_rank1_maxima`.
      descent: None, or something with ``params``, ``learning_rate`` and ``weight_decay``.
      interpret: Run it on any platform, slowly.

    Returns:
      The update, in the gradient's dtype, or under a descent the new parameters in theirs; the new
      first moment; the new second moment, or ``nu`` itself where that is factored.

    Raises:
      ValueError: If ``nu_scales`` is missing.
    """
    block_size = max(_block_sizes(mu, nu))
    return leaves.on_matrices(
        lambda *args: _adam(*args, interpret=interpret),
        block_size,
        grad, mu, nu, c, nu_scales, leaves.descent_arrays(descent),
    )  # fmt: skip


def adam_rank1_maxima(
    grad: jax.Array, nu: QuantizedArray, c: Coefficients, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The rank-1 scales of the new second moment: the first of two passes.

    Args:
      grad: float32 or bfloat16 ``(..., rows, n)``.
      nu: The old second moment, with two rank-1 scales.
      c: The step's coefficients.
      interpret: Run it on any platform, slowly.

    Returns:
      Float32 ``(..., rows, 1)`` and ``(..., 1, n)``, of what ``grad`` holds: of a shard's rows and
      columns if it is a shard.
    """
    grid = _grid(grad, nu)
    rows, columns = chunks.over_chunks(
        "adam_rank1_maxima",
        grid,
        [
            operands.scalars(c),
            operands.elements(grid, grad.reshape(grid.shape)),
            leaves.rank1_scaled(grid, nu),
            operands.maxima(grid),
        ],
        _maxima_body,
        independent=False,
        interpret=interpret,
    )
    old_rows, old_columns = nu.scales
    return rows.reshape(old_rows.shape), columns.reshape(old_columns.shape)


def _adam(grad, mu, nu, c, nu_scales, descent, *, interpret):
    grid = _grid(grad, mu, nu)
    seen = [
        operands.scalars(c),
        leaves.gradient(grid, grad, descent),
        leaves.block_scaled(grid, mu),
        _second_moment(grid, nu, nu_scales),
    ]
    body = _body if is_quantized(nu) else _factored_body
    result, mu_codes, mu_scales, *rest = chunks.over_chunks(
        "adam", grid, seen, body, interpret=interpret
    )
    if is_quantized(nu):
        nu_codes, *block_scales = rest
        nu = leaves.restored(nu, nu_codes, *(block_scales or (nu_scales,)))
    return result.reshape(grad.shape), leaves.restored(mu, mu_codes, mu_scales), nu


def _grid(grad: jax.Array, *moments: Any) -> geometry.Grid:
    is_block_scaled = all(is_quantized(m) and not isinstance(m.scales, tuple) for m in moments)
    return geometry.plan(grad.shape, _block_sizes(*moments), batched=not is_block_scaled)


def _block_sizes(*moments: Any) -> tuple[int, ...]:
    return tuple(m.spec.block_size for m in moments if is_quantized(m))


def _second_moment(grid, nu, nu_scales) -> chunks.Operand:
    if not is_quantized(nu):
        return operands.outer(grid, jnp.multiply, leaves.factors(grid, nu))
    if isinstance(nu.scales, tuple):
        if nu_scales is None:
            raise ValueError("nu_scales must be given for rank-1 scales, got None")
        return leaves.rank1_scaled(grid, nu, nu_scales)
    return leaves.block_scaled(grid, nu)


def _body(chunk, scalars, grad, mu, nu):
    update, new_mu, new_nu = adam_step(
        grad.read(chunk), mu.read(chunk), nu.read(chunk), Coefficients(*scalars.read())
    )
    grad.write(chunk, update)
    mu.write(chunk, new_mu)
    nu.write(chunk, new_nu)


def _factored_body(chunk, scalars, grad, mu, nu):
    c = Coefficients(*scalars.read())
    g = grad.read(chunk)
    new_mu = c.one_minus_b1 * g + c.b1 * mu.read(chunk)
    grad.write(chunk, adam_direction(g, new_mu, nu.read(chunk), c))
    mu.write(chunk, new_mu)


def _maxima_body(chunk, scalars, grad, nu, maxima):
    # The second moment does not depend on the first, which would have to be read for nothing.
    g, no_mu = grad.read(chunk), jnp.zeros((), jnp.float32)
    _, _, new_nu = adam_step(g, no_mu, nu.read(chunk), Coefficients(*scalars.read()))
    maxima.write(chunk, new_nu)
