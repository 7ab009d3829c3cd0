"""The Triton kernels, interpreted, against the reference; and lowered for CUDA without a plugin."""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit.kernels import pallas_gpu
from optax_lowbit.kernels.adam import adam_direction, adam_step, coefficients
from optax_lowbit.kernels.pallas_gpu.moments import rank_by_selects
from optax_lowbit.kernels.parameters import Descent
from optax_lowbit.kernels.reference import update_leaf
from optax_lowbit.moments.presets import (
    FIRST_MOMENT_4BIT,
    FIRST_MOMENT_8BIT,
    SECOND_MOMENT_4BIT,
    SECOND_MOMENT_8BIT,
)
from optax_lowbit.quant import (
    QuantSpec,
    codebooks,
    dequantize,
    is_quantized,
    packing,
    quantize,
    rounding,
)

# Interpreted kernels are large programs that run once. Nor does LLVM then fuse a product and a sum
# in one program and not in the other, which shows where what they add nearly cancels.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

ADAM = coefficients(0.9, 0.99, 1e-8, 0.0, jnp.int32(3), nesterov=False)
NADAM = coefficients(0.9, 0.99, 1e-8, 1e-12, jnp.int32(1), nesterov=True)


def signed(block, bits=4):
    return QuantSpec(
        codebook="dynamic_exponent", bits=bits, signed=True, scaling="block", block_size=block
    )


def unsigned(scaling, block, bits=4, codebook="linear"):
    return QuantSpec(codebook=codebook, bits=bits, signed=False, scaling=scaling, block_size=block)


def leaf(rng, shape, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape) * 10 ** rng.uniform(-4, 0, shape), dtype)


def descent_on(params):
    return Descent(params, jnp.float32(1e-2), jnp.float32(0.1))


def descended(update, descent):
    """What a kernel with a descent gives, from the update in float32."""
    if descent is None:
        return update
    params = descent.params.astype(jnp.float32)
    new = params + (-descent.learning_rate) * (update + descent.weight_decay * params)
    return new.astype(descent.params.dtype)


def ulps(found, expected):
    """Largest difference in units of the last place of the expected dtype; NaN equals NaN."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    digits = jnp.finfo(expected.dtype).nmant
    a, b = (np.asarray(x.astype(jnp.float32), np.float64) for x in (found, expected))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(b), 1e-38))) - digits)
    with np.errstate(invalid="ignore"):
        return np.max(np.where(same, 0, np.abs(a - b) / unit), initial=0)


def unpacked(q):
    group = q.spec.group_size
    return np.asarray(packing.unpack(q.codes, q.spec.bits, group, q.last_dim)).astype(int)


def assert_same_quantized(found, expected, values):
    """Equal codes, scales within a unit in the last place, of the float32 ``values``.

    Where a scale or a value differs in its last place, a code may be the neighbour, if the quotient
    is that close to the boundary between them.
    """
    assert (found.spec, found.padding, found.dtype) == (
        expected.spec,
        expected.padding,
        expected.dtype,
    )
    scales = jax.tree.leaves(found.scales), jax.tree.leaves(expected.scales)
    for scale, expected_scale in zip(*scales, strict=True):
        assert ulps(scale, expected_scale) <= 1
    a, b = unpacked(found), unpacked(expected)
    differs = a != b
    if not differs.any():
        assert (np.asarray(found.codes) == np.asarray(expected.codes)).all()
        return
    assert differs.sum() <= 1 + a.size // 10_000
    assert (np.abs(a - b)[differs] == 1).all()
    # The quotient, by way of a table that holds 1: value / scale = table value * value / decoded.
    boundaries = codebooks.decision_table(found.spec.values).boundaries
    table = np.asarray(found.spec.values, np.float64)
    decoded = np.asarray(dequantize(expected), np.float64)[differs]
    quotients = table[b[differs]] * np.asarray(values, np.float64)[differs] / decoded
    nearest = boundaries[np.minimum(a, b)[differs]]
    assert (np.abs(quotients - nearest) <= 4 * np.spacing(np.abs(nearest))).all()


def both_passes(grad, mu, nu, c, descent=None, *, interpret=False):
    nu_scales = None
    if is_quantized(nu) and isinstance(nu.scales, tuple):
        nu_scales = pallas_gpu.adam_rank1_maxima(grad, nu, c, interpret=interpret)
    return pallas_gpu.adam(
        grad, mu, nu, c, nu_scales=nu_scales, descent=descent, interpret=interpret
    )


adam_by_kernel = jit(functools.partial(both_passes, interpret=True))


@jit
def adam_by_reference(grad, mu, nu, c, descent):
    """The result, the stored moments, and the new moments in float32."""
    wide = grad.astype(jnp.float32)

    def step(g, tile, factors):
        if factors is None:
            update, new_mu, new_nu = adam_step(g, tile["mu"], tile["nu"], c)
            return update, {"mu": new_mu, "nu": new_nu}
        new_mu = c.one_minus_b1 * g + c.b1 * tile["mu"]
        return adam_direction(g, new_mu, factors[0] * factors[1], c), {"mu": new_mu}

    stored, factors = {"mu": mu, "nu": nu}, None
    floats = {"mu": dequantize(mu)}
    if isinstance(nu, tuple):
        stored, factors = {"mu": mu}, nu
    else:
        floats["nu"] = dequantize(nu)
    update, new = update_leaf(step, wide, stored, None, factors)
    result = update.astype(grad.dtype) if descent is None else descended(update, descent)
    return result, new, step(wide, floats, factors)[1]


def check_adam(rng, shape, mu_spec, nu_spec, *, dtype=jnp.float32, params=None, c=ADAM):
    """One step by the kernel and by the reference; ``nu_spec`` is None for a factored one."""
    assert pallas_gpu.why_not("adam", shape, dtype, mu_spec, nu_spec) is None
    grad, mu = leaf(rng, shape, dtype), quantize(leaf(rng, shape), mu_spec)
    if nu_spec is None:
        rows = jnp.square(leaf(rng, (*shape[:-1], 1)))
        nu = rows, jnp.square(leaf(rng, (*shape[:-2], 1, shape[-1])))
    else:
        nu = quantize(jnp.square(leaf(rng, shape)), nu_spec)
    descent = None if params is None else descent_on(leaf(rng, shape, params))
    result, new_mu, new_nu = adam_by_kernel(grad, mu, nu, c, descent)
    expected, stored, values = adam_by_reference(grad, mu, nu, c, descent)
    assert ulps(result, expected) <= (4 if result.dtype == jnp.float32 else 1)
    assert_same_quantized(new_mu, stored["mu"], values["mu"])
    if nu_spec is None:
        assert new_nu is nu or all(map(jnp.array_equal, new_nu, nu))
    else:
        assert_same_quantized(new_nu, stored["nu"], values["nu"])


@pytest.mark.parametrize(
    ("shape", "block", "options"),
    [
        ((24, 256), 128, {}),
        ((7, 200), 128, {"dtype": jnp.bfloat16, "params": jnp.bfloat16}),
        ((1001,), 24, {"params": jnp.float32, "c": NADAM}),
        ((3, 50, 5), 128, {"dtype": jnp.bfloat16}),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_adam_with_block_scales(rng, shape, block, options):
    check_adam(rng, shape, signed(block), unsigned("block", block), **options)


@pytest.mark.parametrize(
    ("shape", "block", "options"),
    [
        ((24, 256), 128, {}),
        ((300, 9), 128, {"dtype": jnp.bfloat16, "params": jnp.float32}),
        ((2, 40, 41), 16, {"params": jnp.bfloat16, "c": NADAM}),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_adam_with_rank1_scales(rng, shape, block, options):
    check_adam(rng, shape, signed(block), unsigned("rank1", block), **options)


@pytest.mark.parametrize(
    ("shape", "block", "options"),
    [
        ((24, 256), 128, {"dtype": jnp.bfloat16}),
        ((2, 13, 100), 32, {"c": NADAM, "params": jnp.float32}),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_adam_with_a_factored_second_moment(rng, shape, block, options):
    check_adam(rng, shape, signed(block), None, **options)


@pytest.mark.parametrize(
    ("shape", "mu_spec", "nu_spec"),
    [
        ((5, 301), FIRST_MOMENT_8BIT, SECOND_MOMENT_8BIT),
        ((9, 75), signed(32), unsigned("block", 32, bits=8, codebook="dynamic_exponent")),
    ],
    ids=["ragged", "first-in-4-bits"],
)
def test_adam_in_8_bits(rng, shape, mu_spec, nu_spec):
    check_adam(rng, shape, mu_spec, nu_spec)


def test_maxima_of_programs_that_take_several_tiles(rng, monkeypatch):
    module = sys.modules[pallas_gpu.adam.__module__]
    monkeypatch.setattr(module, "MAXIMA_PROGRAMS", 3)
    grad = leaf(rng, (45, 200))
    nu = quantize(jnp.square(leaf(rng, grad.shape)), SECOND_MOMENT_4BIT)
    maxima = functools.partial(pallas_gpu.adam_rank1_maxima, interpret=True)
    rows, columns = jit(maxima)(grad, nu, ADAM)
    _, _, new = adam_step(grad, grad, dequantize(nu), ADAM)
    assert ulps(rows, new.max(axis=1, keepdims=True)) <= 1
    assert ulps(columns, new.max(axis=0, keepdims=True)) <= 1


@pytest.mark.parametrize("scaling", ["block", "rank1"])
def test_not_a_number_and_infinity_stay_visible_where_they_share_a_scale(rng, scaling):
    # Not against the reference: XLA's maximum on a CPU loses NaN.
    shape = (24, 256)
    grad = leaf(rng, shape).at[3, 40].set(jnp.nan).at[5, 170].set(-jnp.inf)
    mu = quantize(leaf(rng, shape), signed(128))
    nu = quantize(jnp.square(leaf(rng, shape)), unsigned(scaling, 128))
    update, new_mu, new_nu = adam_by_kernel(grad, mu, nu, ADAM, None)
    assert (jnp.isfinite(update) == jnp.isfinite(grad)).all()
    blocks = np.zeros(shape, bool)
    blocks[3, :128] = blocks[5, 128:] = True
    assert (jnp.isfinite(dequantize(new_mu)) == ~blocks).all()
    lesser = np.zeros(shape, bool)
    lesser[3] = lesser[:, 40] = lesser[5, 170] = True
    expected = blocks if scaling == "block" else lesser
    assert (jnp.isfinite(dequantize(new_nu)) == ~expected).all()


def test_zero_gradients_and_zero_moments():
    zeros = jnp.zeros((24, 256))
    for nu_spec in unsigned("block", 128), unsigned("rank1", 128):
        mu, nu = quantize(zeros, FIRST_MOMENT_4BIT), quantize(zeros, nu_spec)
        update, new_mu, new_nu = adam_by_kernel(zeros, mu, nu, ADAM, None)
        for array in update, dequantize(new_mu), dequantize(new_nu):
            assert (array == 0).all()


@pytest.mark.parametrize(
    ("shape", "spec", "dtype", "nesterov", "params"),
    [
        ((24, 256), FIRST_MOMENT_4BIT, jnp.float32, False, None),
        ((5, 301), FIRST_MOMENT_4BIT, jnp.bfloat16, True, jnp.bfloat16),
        ((700,), FIRST_MOMENT_8BIT, jnp.float32, True, None),
    ],
    ids=["aligned", "ragged", "8-bit"],
)
def test_momentum(rng, shape, spec, dtype, nesterov, params):
    assert pallas_gpu.why_not("momentum", shape, dtype, spec) is None
    grad, trace, decay = leaf(rng, shape, dtype), quantize(leaf(rng, shape), spec), jnp.float32(0.9)
    descent = None if params is None else descent_on(leaf(rng, shape, params))

    def step(g, tile, constants):
        new = g + decay * tile["trace"]
        return g + decay * new if nesterov else new, {"trace": new}

    @jit
    def by_reference(grad, trace, descent):
        wide = grad.astype(jnp.float32)
        update, new = update_leaf(step, wide, {"trace": trace}, None)
        result = update.astype(grad.dtype) if descent is None else descended(update, descent)
        return result, new["trace"], step(wide, {"trace": dequantize(trace)}, None)[1]["trace"]

    kernel = functools.partial(pallas_gpu.momentum, nesterov=nesterov, interpret=True)
    result, new = jit(kernel)(grad, trace, decay, descent=descent)
    expected, stored, values = by_reference(grad, trace, descent)
    assert ulps(result, expected) <= (4 if result.dtype == jnp.float32 else 1)
    assert_same_quantized(new, stored, values)


QUANTIZED = [
    ((24, 256), FIRST_MOMENT_4BIT, jnp.float32),
    ((3, 7, 31), FIRST_MOMENT_4BIT, jnp.bfloat16),
    ((5, 600), FIRST_MOMENT_8BIT, jnp.bfloat16),
    ((2, 70), QuantSpec(codebook="nf4", bits=4, signed=True, scaling="block", block_size=64), None),
    (
        (4, 40),
        QuantSpec(
            codebook=(-1.0, -0.25, 0.0, 0.5, 1.0),
            bits=8,
            signed=True,
            scaling="block",
            block_size=15,
        ),
        None,
    ),
]


@pytest.mark.parametrize(("shape", "spec", "dtype"), QUANTIZED, ids=str)
def test_quantize_and_dequantize(rng, shape, spec, dtype):
    x = leaf(rng, shape, dtype or jnp.float32)
    assert pallas_gpu.why_not("quantize", shape, x.dtype, spec) is None
    assert pallas_gpu.why_not("dequantize", shape, x.dtype, spec) is None
    expected = quantize(x, spec)
    q = jit(lambda x: pallas_gpu.quantize(x, spec, interpret=True))(x)
    assert jax.tree.structure(q) == jax.tree.structure(expected)
    for found, reference in zip(jax.tree.leaves(q), jax.tree.leaves(expected)):
        assert found.dtype == reference.dtype and (found == reference).all()
    back = jit(functools.partial(pallas_gpu.dequantize, interpret=True))(expected)
    assert back.dtype == x.dtype and (back == dequantize(expected)).all()


def around(boundaries):
    """The boundaries, their neighbours, and what lies outside of every table."""
    below, above = (np.nextafter(boundaries, np.float32(to)) for to in (-np.inf, np.inf))
    return np.concatenate([boundaries, below, above, np.float32([0.0, -0.0, 1.0])])


@pytest.mark.parametrize(
    ("name", "bits", "is_signed"),
    [(n, b, s) for n, b, s in itertools.product(codebooks.NAMES, (2, 4), (True, False))
     if n not in ("nf4", "fp4", "af4") or (b == 4 and s and n != "fp4")],
)  # fmt: skip
def test_rank_on_and_beside_every_boundary(name, bits, is_signed):
    values = tuple(codebooks.codebook(name, bits, is_signed).tolist())
    boundaries = codebooks.decision_table(values).boundaries
    extremes = np.float32([np.nan, np.inf, -np.inf, 2.0, -2.0, 1e-45])
    x = jnp.asarray(np.concatenate([around(boundaries), extremes]))
    codes = rank_by_selects(x, boundaries).astype(jnp.uint8)
    assert (codes == rounding.nearest_codes(x, values)).all()


@pytest.mark.parametrize("spec", [FIRST_MOMENT_8BIT, SECOND_MOMENT_8BIT], ids=["signed", "un"])
def test_8_bit_codes_on_and_beside_every_boundary(spec):
    boundaries = codebooks.decision_table(spec.values).boundaries
    x = np.zeros((4, 256), np.float32)
    for row, values in zip(x, np.array_split(around(boundaries), 4)):
        row[: values.size] = values
    x[:, -1] = 1.0
    q = pallas_gpu.quantize(jnp.asarray(x), spec, interpret=True)
    assert (q.scales == 1).all() and (q.codes == quantize(jnp.asarray(x), spec).codes).all()


STOCHASTIC = QuantSpec(
    codebook="linear", bits=4, signed=False, scaling="block", rounding="stochastic"
)
FLOAT32 = jnp.float32


@pytest.mark.parametrize(
    ("reason", "op", "shape", "dtype", "specs"),
    [
        ("dtype float16", "quantize", (8, 128), jnp.float16, [FIRST_MOMENT_4BIT]),
        ("no axes", "momentum", (), FLOAT32, [FIRST_MOMENT_4BIT]),
        ("no elements", "momentum", (0, 128), FLOAT32, [FIRST_MOMENT_4BIT]),
        ("2**31 elements", "momentum", (2**16, 2**15), FLOAT32, [FIRST_MOMENT_4BIT]),
        ("slices of 2**31", "momentum", (2, 2**16, 2**15), FLOAT32, [FIRST_MOMENT_4BIT]),
        ("not quantized", "adam", (8, 128), FLOAT32, [None, SECOND_MOMENT_4BIT]),
        ("rank1 scales", "quantize", (8, 128), FLOAT32, [SECOND_MOMENT_4BIT]),
        ("along 3 axes", "adam", (3, 3, 64), FLOAT32, [FIRST_MOMENT_4BIT, SECOND_MOMENT_4BIT]),
        ("of two sizes", "adam", (8, 128), FLOAT32, [FIRST_MOMENT_4BIT, SECOND_MOMENT_8BIT]),
        ("of a vector", "adam", (256,), FLOAT32, [FIRST_MOMENT_4BIT, None]),
        ("stochastic", "adam", (8, 128), FLOAT32, [FIRST_MOMENT_4BIT, STOCHASTIC]),
        ("3 bits", "quantize", (8, 128), FLOAT32, [signed(128, bits=3)]),
        ("odd size", "quantize", (8, 128), FLOAT32, [signed(15)]),
        ("more than 4096", "quantize", (8, 128), FLOAT32, [signed(8192)]),
        ("column scales", "adam", (8, 9), FLOAT32, [FIRST_MOMENT_4BIT, unsigned("column", 128)]),
    ],
    ids=str,
)
def test_reason_why_not(reason, op, shape, dtype, specs):
    found = pallas_gpu.why_not(op, shape, dtype, *specs)
    assert found is not None and reason in found


def test_reason_why_not_of_tables_and_signs():
    def why_not(**fields):
        spec = QuantSpec(**{"bits": 4, "signed": True, "scaling": "block", **fields})
        return pallas_gpu.why_not("quantize", (8, 128), FLOAT32, spec)

    assert why_not(codebook="fp4") == "table that is not sorted"
    assert why_not(codebook="nf4", signed_scale=True) == "signed scales"
    assert why_not(codebook="nf4") is None


def test_unknown_op_is_an_error():
    with pytest.raises(ValueError, match="op must be"):
        pallas_gpu.why_not("adamax", (8, 128), FLOAT32, FIRST_MOMENT_4BIT)
    with pytest.raises(ValueError, match="op must be"):
        pallas_gpu.why_not("adam", (8, 128), FLOAT32, FIRST_MOMENT_4BIT)
