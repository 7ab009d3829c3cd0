"""The kernels for TPUs, interpreted, against the reference."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit.kernels import pallas_tpu as kernels
from optax_lowbit.kernels.adam import adam_direction, adam_step, coefficients
from optax_lowbit.kernels.pallas_tpu import chunks, coding, geometry, operands
from optax_lowbit.kernels.reference import update_leaf
from optax_lowbit.moments.presets import (
    FIRST_MOMENT_4BIT,
    FIRST_MOMENT_8BIT,
    SECOND_MOMENT_4BIT,
    SECOND_MOMENT_8BIT,
)
from optax_lowbit.quant import (
    QuantizedArray,
    QuantSpec,
    codebooks,
    dequantize,
    packing,
    quantize,
    rounding,
)
from optax_lowbit.quant.array import abstract_quantized

BLOCK_NU = dataclasses.replace(SECOND_MOMENT_4BIT, scaling="block")
WIDE_MU = dataclasses.replace(FIRST_MOMENT_4BIT, block_size=256)
WIDE_NU = dataclasses.replace(BLOCK_NU, block_size=256)
RANK1 = FIRST_MOMENT_4BIT, SECOND_MOMENT_4BIT
BLOCKS = FIRST_MOMENT_4BIT, BLOCK_NU
EIGHT = FIRST_MOMENT_8BIT, SECOND_MOMENT_8BIT


# Interpreted kernels are large programs that run once. Nor does LLVM then fuse a product and a sum
# here and not there, which moves an element that lies on a boundary of its code.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Descent(NamedTuple):
    params: jax.Array
    learning_rate: jax.Array
    weight_decay: jax.Array


def normal(rng, shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape).astype(dtype))


def moment(rng, shape, spec):
    """Random codes and scales."""
    return jax.tree.map(
        lambda x: jnp.asarray(
            rng.integers(0, 256, x.shape, np.uint8)
            if x.dtype == jnp.uint8
            else rng.uniform(0.01, 1.0, x.shape).astype(np.float32)
        ),
        abstract_quantized(shape, jnp.float32, spec),
    )


def moments(rng, shape, mu_spec, nu_spec):
    if nu_spec is not None:
        return moment(rng, shape, mu_spec), moment(rng, shape, nu_spec)
    *lead, rows, columns = shape
    factors = rng.uniform(size=(*lead, rows, 1)), rng.uniform(size=(*lead, 1, columns))
    return moment(rng, shape, mu_spec), tuple(jnp.asarray(f, jnp.float32) for f in factors)


@functools.cache
def step_coefficients(nesterov=False):
    return coefficients(0.9, 0.99, 1e-8, 1e-12, jnp.asarray(3, jnp.int32), nesterov)


@compiled
def reference(grad, mu, nu, c, descent=None):
    """The reference's step, its update in float32."""

    def step(g, floats, constants):
        update, new_mu, new_nu = adam_step(g, floats["mu"], floats["nu"], c)
        return update, {"mu": new_mu, "nu": new_nu}

    def factored_step(g, floats, factors):
        _, new_mu, _ = adam_step(g, floats["mu"], jnp.zeros_like(g), c)
        return adam_direction(g, new_mu, factors[0] * factors[1], c), {"mu": new_mu}

    grad = grad.astype(jnp.float32)
    if isinstance(nu, QuantizedArray):
        update, new = update_leaf(step, grad, {"mu": mu, "nu": nu}, None)
    else:
        update, new = update_leaf(factored_step, grad, {"mu": mu}, None, nu)
        new["nu"] = nu
    if descent is not None:
        params = descent.params.astype(jnp.float32)
        update = params - descent.learning_rate * (update + descent.weight_decay * params)
    return update, new["mu"], new["nu"]


@compiled
def kernel(grad, mu, nu, c, descent=None):
    scales = None
    if isinstance(nu, QuantizedArray) and isinstance(nu.scales, tuple):
        scales = kernels.adam_rank1_maxima(grad, nu, c, interpret=True)
    return kernels.adam(grad, mu, nu, c, nu_scales=scales, descent=descent, interpret=True)


def assert_within_ulps(actual, expected, ulps):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    actual, wide = actual.astype(np.float32), expected.astype(np.float32)
    unit = np.spacing(np.abs(wide)) * (2**16 if expected.dtype == jnp.bfloat16 else 1)
    finite = np.isfinite(wide)
    assert np.all(np.abs(actual[finite] - wide[finite]) <= ulps * unit[finite])
    np.testing.assert_array_equal(actual[~finite], wide[~finite])


def assert_same_moment(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    if isinstance(actual, QuantizedArray):
        np.testing.assert_array_equal(actual.codes, expected.codes)
    for new, old in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        if new.dtype == jnp.float32:
            assert_within_ulps(new, old, 1)


def assert_equals_reference(grad, mu, nu, c, descent=None):
    result, *new = kernel(grad, mu, nu, c, descent)
    expected, *expected_new = reference(grad, mu, nu, c, descent)
    written = grad if descent is None else descent.params
    assert result.dtype == written.dtype
    # Casting to bfloat16 may turn a unit of float32 into one of its own.
    assert_within_ulps(
        result, expected.astype(written.dtype), 4 if written.dtype == jnp.float32 else 1
    )
    for actual, moment in zip(new, expected_new):
        assert_same_moment(actual, moment)


@pytest.mark.parametrize(
    ("shape", "specs", "dtype"),
    [
        pytest.param((130, 1300), BLOCKS, jnp.bfloat16, id="ragged, odd rows"),
        pytest.param((32, 1157), BLOCKS, jnp.float32, id="an odd last block"),
        pytest.param((2, 135, 256), BLOCKS, jnp.float32, id="three axes"),
        pytest.param((256, 2048), RANK1, jnp.bfloat16, id="rank-1, four tiles"),
        pytest.param((2, 259, 1029), RANK1, jnp.float32, id="rank-1, three axes, ragged"),
        pytest.param((2, 40, 300), (FIRST_MOMENT_4BIT, None), jnp.float32, id="factored"),
        pytest.param((130, 2300), EIGHT, jnp.float32, id="8 bits"),
        pytest.param((40, 2125), (WIDE_MU, WIDE_NU), jnp.float32, id="4 bits, blocks of 256"),
        pytest.param((256, 300), (FIRST_MOMENT_8BIT, SECOND_MOMENT_4BIT), jnp.float32, id="both"),
    ],
)
def test_adam_equals_the_reference(shape, specs, dtype, rng):
    grad = normal(rng, shape, dtype)
    assert kernels.why_not("adam", shape, dtype, *specs) is None
    assert_equals_reference(grad, *moments(rng, shape, *specs), step_coefficients())


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((40, 300), jnp.bfloat16), ((2117,), jnp.float32)],
    ids=["matrix", "vector"],
)
def test_descent_writes_the_parameters(shape, dtype, rng):
    specs = BLOCKS if len(shape) > 1 else RANK1
    descent = Descent(normal(rng, shape, dtype), jnp.float32(1e-2), jnp.float32(0.1))
    grad = normal(rng, shape)
    assert_equals_reference(grad, *moments(rng, shape, *specs), step_coefficients(), descent)


def test_nesterov(rng):
    # Gradients of the moments' sign: a sum that cancels has no 4 units in the last place to keep.
    shape = (32, 256)
    mu, nu = moments(rng, shape, *BLOCKS)
    grad = jnp.abs(normal(rng, shape)) * jnp.where(dequantize(mu) < 0, -1.0, 1.0)
    assert_equals_reference(grad, mu, nu, step_coefficients(nesterov=True))


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
def test_zeros_and_what_is_not_finite(rng, bad):
    shape = (160, 1280)
    mu, nu = (quantize(jnp.zeros(shape), spec) for spec in RANK1)
    grad = normal(rng, shape).at[:, 256:512].set(0.0).at[3].set(0.0)
    grad = grad.at[5, 600].set(bad)
    assert_equals_reference(grad, mu, nu, step_coefficients())


def test_maxima_see_nothing_beyond_the_leaf(rng):
    x = normal(rng, (1, 129, 1025))
    grid = geometry.plan(x.shape, (128,), batched=True)

    def body(chunk, x, maxima):
        # The interpreter has NaN beyond a leaf.
        maxima.write(chunk, x.read(chunk))

    rows, columns = compiled(
        lambda x: chunks.over_chunks(
            "maxima",
            grid,
            [operands.elements(grid, x), operands.maxima(grid)],
            body,
            independent=False,
            interpret=True,
        )
    )(x)
    np.testing.assert_array_equal(rows, np.abs(x).max(axis=2)[:, None])
    np.testing.assert_array_equal(columns, np.abs(x).max(axis=1, keepdims=True))


def test_rank1_scales_must_be_given(rng):
    mu, nu = moments(rng, (256, 256), *RANK1)
    with pytest.raises(ValueError, match="nu_scales must be given"):
        kernels.adam(normal(rng, (256, 256)), mu, nu, step_coefficients(), interpret=True)


@pytest.mark.parametrize(
    ("shape", "spec", "dtype", "nesterov"),
    [
        pytest.param((130, 1300), FIRST_MOMENT_4BIT, jnp.float32, True, id="4 bits"),
        pytest.param((3, 33, 513), FIRST_MOMENT_8BIT, jnp.bfloat16, False, id="8 bits"),
        pytest.param((700,), FIRST_MOMENT_4BIT, jnp.bfloat16, True, id="vector"),
    ],
)
def test_momentum_equals_the_reference(shape, spec, dtype, nesterov, rng):
    decay = jnp.float32(0.9)

    def step(g, floats, _):
        trace = g + decay * floats["trace"]
        return (g + decay * trace if nesterov else trace), {"trace": trace}

    trace = moment(rng, shape, spec)
    # Of the trace's sign, as sums that cancel keep no units in the last place.
    grad = (jnp.abs(normal(rng, shape)) * jnp.where(dequantize(trace) < 0, -1.0, 1.0)).astype(dtype)
    result, new = compiled(
        lambda *args: kernels.momentum(*args, nesterov=nesterov, interpret=True)
    )(grad, trace, decay)
    expected, expected_new = compiled(
        lambda grad, trace: update_leaf(step, grad, {"trace": trace}, None)
    )(grad, trace)
    assert_within_ulps(result, expected, 4 if dtype == jnp.float32 else 1)
    assert_same_moment(new, expected_new["trace"])


def test_momentum_descends(rng):
    shape = (8, 300)
    grad, params = normal(rng, shape), normal(rng, shape)
    trace = moment(rng, shape, FIRST_MOMENT_4BIT)
    descent = Descent(params, jnp.float32(0.1), jnp.float32(0.01))
    run = compiled(
        lambda *args: kernels.momentum(*args[:3], nesterov=False, descent=args[3], interpret=True)
    )
    result, _ = run(grad, trace, jnp.float32(0.9), descent)
    update = grad + 0.9 * dequantize(trace)
    np.testing.assert_allclose(
        result, params - 0.1 * (update + 0.01 * params), rtol=1e-5, atol=1e-6
    )


SPECS = {
    "signed 4 bits": FIRST_MOMENT_4BIT,
    "unsigned 4 bits": BLOCK_NU,
    "signed 8 bits": FIRST_MOMENT_8BIT,
    "15 values": QuantSpec(codebook="integer", bits=4, signed=True, scaling="block"),
    "255 values": QuantSpec(codebook="integer", bits=8, signed=True, scaling="block"),
    "blocks of 256": WIDE_MU,
}


@pytest.mark.parametrize(
    ("spec", "shape", "dtype"),
    [
        pytest.param(FIRST_MOMENT_4BIT, (33, 1301), jnp.float32, id="4 bits"),
        pytest.param(WIDE_NU, (33, 301), jnp.float32, id="blocks of 256"),
        pytest.param(FIRST_MOMENT_8BIT, (33, 2301), jnp.float32, id="8 bits"),
        pytest.param(FIRST_MOMENT_4BIT, (130, 128), jnp.float32, id="a block a row"),
        pytest.param(FIRST_MOMENT_4BIT, (2, 3, 300), jnp.bfloat16, id="three axes"),
        pytest.param(FIRST_MOMENT_8BIT, (5000,), jnp.bfloat16, id="vector"),
    ],
)
def test_quantize_and_dequantize_equal_the_reference(spec, shape, dtype, rng):
    x = normal(rng, shape, dtype)
    x = x if spec.signed else jnp.abs(x)
    actual = compiled(lambda x: kernels.quantize(x, spec, interpret=True))(x)
    expected = compiled(lambda x: quantize(x, spec))(x)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    floats = compiled(lambda q: kernels.dequantize(q, interpret=True))(actual)
    assert floats.dtype == dtype
    np.testing.assert_array_equal(floats, compiled(dequantize)(expected))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_codes_of_all_boundaries_and_their_neighbours(spec):
    boundaries = codebooks.decision_table(spec.values).boundaries
    around = [np.nextafter(boundaries, np.float32(to)) for to in (-np.inf, np.inf)]
    points = np.concatenate([boundaries, *around, np.float32([np.nan, np.inf, -np.inf, 0.0, -0.0])])
    x = jnp.asarray(np.resize(points, (32, geometry.CHUNK_COLUMNS)))
    table = jnp.asarray(coding.table(spec)) if coding.needs_table(spec) else None
    codes = coding.nearest_codes(x, spec, table)
    np.testing.assert_array_equal(codes, rounding.nearest_codes(x, spec.values))
    values = coding.values_of(codes, spec, table)
    np.testing.assert_array_equal(values, rounding.code_values(codes, spec.values))


@pytest.mark.parametrize("valid", [1, 63, 64, 127, 128, 129, 200, 255, 256])
@pytest.mark.parametrize("block_size", geometry.BLOCK_SIZES)
def test_codes_are_packed_without_what_lies_beyond_the_leaf(block_size, valid, rng):
    spec = dataclasses.replace(FIRST_MOMENT_4BIT, block_size=block_size)
    chunk = geometry.Chunk(jnp.asarray(0), 0, valid)
    # Codes of garbage, wherever there is no element.
    codes = jnp.asarray(rng.integers(0, 16, (geometry.CHUNK_ROWS, geometry.CHUNK_COLUMNS)))
    codes = codes.astype(jnp.int32)
    packed = compiled(lambda codes: coding.pack(codes, spec, chunk))(codes)
    expected = packing.pack(codes[:, :valid].astype(jnp.uint8), 4, block_size)
    np.testing.assert_array_equal(packed[:, : expected.shape[1]], expected)
    unpacked = compiled(lambda packed: coding.unpack(packed, spec, chunk))(packed)
    np.testing.assert_array_equal(unpacked[:, :valid], codes[:, :valid])


def replaced(**changes) -> Any:
    return dataclasses.replace(FIRST_MOMENT_4BIT, **changes)


@pytest.mark.parametrize(
    ("op", "shape", "dtype", "specs", "reason"),
    [
        ("momentum", (), jnp.float32, (FIRST_MOMENT_4BIT,), "no axes"),
        ("momentum", (0, 8), jnp.float32, (FIRST_MOMENT_4BIT,), "no elements"),
        ("momentum", (8, 128), jnp.float16, (FIRST_MOMENT_4BIT,), "dtype float16"),
        ("momentum", (8, 128), jnp.float32, (None,), "not quantized"),
        ("momentum", (8, 128), jnp.float32, (replaced(rounding="stochastic"),), "stochastic"),
        ("momentum", (8, 128), jnp.float32, (replaced(signed_scale=True),), "signed scales"),
        ("momentum", (8, 128), jnp.float32, (replaced(bits=3),), "3 bits"),
        ("momentum", (8, 128), jnp.float32, (replaced(block_size=64),), "blocks of 64"),
        ("momentum", (8, 128), jnp.float32, (replaced(codebook="fp4"),), "not sorted"),
        ("quantize", (8, 128), jnp.float32, (replaced(scaling="row"),), "row scales"),
        ("quantize", (256, 256), jnp.float32, (SECOND_MOMENT_4BIT,), "rank1 scales"),
        ("adam", (256, 256), jnp.float32, (SECOND_MOMENT_4BIT, None), "rank1 scales"),
        ("adam", (2, 2, 8), jnp.float32, RANK1, "rank-1 scales over 3 axes"),
        ("adam", (256, 2**20 + 1), jnp.float32, RANK1, "rank-1 scales of more than"),
        ("adam", (256,), jnp.float32, (FIRST_MOMENT_4BIT, None), "a vector"),
    ],
)
def test_why_not(op, shape, dtype, specs, reason):
    assert reason in kernels.why_not(op, shape, dtype, *specs)


def test_why_not_refuses_unknown_ops():
    with pytest.raises(ValueError, match="op must be one of"):
        kernels.why_not("lion", (8, 128), jnp.float32, FIRST_MOMENT_4BIT)
