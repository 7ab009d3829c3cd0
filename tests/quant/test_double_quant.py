"""Block scales in 8 bits: their values, their bytes, and what becomes of moments under them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import QuantSpec, codebook, dequantize, quantize
from optax_lowbit.quant.array import abstract_quantized
from optax_lowbit.quant.double_quant import CodedScales, code_scales, float_scales

SPEC = QuantSpec(codebook="linear", bits=4, signed=False, scaling="block", double_quant=True)
PLAIN = dataclasses.replace(SPEC, double_quant=False)
SHAPES = [(300, 256), (2, 300, 200), (256, 128), (1, 1000), (40000,), (100,), (3, 1), (0, 128)]


def nearest(normalized, signed):
    """By a search of the whole table, in float64; a tie goes to the lower value."""
    table = np.asarray(codebook("dynamic_exponent", 8, signed), np.float64)
    return table[np.abs(normalized[..., None] - table).argmin(-1)]


def scales_by_hand(scales, signed):
    """Groups of 256 down the last axis but one, written as loops."""
    scales = np.asarray(scales)
    columns = scales.reshape(-1, 1) if scales.ndim == 1 else scales
    result = np.zeros_like(columns)
    for *lead, column in np.ndindex(*columns.shape[:-2], columns.shape[-1]):
        for start in range(0, columns.shape[-2], 256):
            group = (*lead, slice(start, start + 256), column)
            largest = np.abs(columns[group]).max(initial=0)
            if largest > 0:
                result[group] = nearest(columns[group] / largest, signed) * largest
    return result.reshape(scales.shape)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("shape", [(300, 3), (2, 5, 4), (700,), (1, 1)])
def test_scales_are_the_nearest_of_the_table(shape, signed, rng):
    scales = rng.uniform(0.05, 1.0, size=shape).astype(np.float32)
    if signed:
        scales *= rng.choice([-1.0, 1.0], size=shape).astype(np.float32)
    coded = code_scales(jnp.asarray(scales), signed)
    assert coded.codes.dtype == jnp.uint8 and coded.codes.shape == shape
    expected = scales_by_hand(scales, signed)
    np.testing.assert_allclose(float_scales(coded, signed), expected, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_those_under_exact_scales(shape, rng):
    x = rng.uniform(size=shape).astype(np.float32)
    q, plain = quantize(x, SPEC), quantize(x, PLAIN)
    np.testing.assert_array_equal(q.codes, plain.codes)
    scales = float_scales(q.scales, signed=False)
    np.testing.assert_array_equal(
        dequantize(q), dequantize(dataclasses.replace(plain, scales=scales))
    )
    assert q.shape == shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_abstract_array_is_what_quantize_gives(shape):
    like = abstract_quantized(shape, np.dtype("float32"), SPEC)
    q = jax.eval_shape(lambda: quantize(jnp.ones(shape), SPEC))
    assert jax.tree.structure(q) == jax.tree.structure(like)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(q)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(like)
    ]


def test_a_scalar_has_its_scale_in_float32():
    q = quantize(jnp.float32(3.0), SPEC)
    assert q.scales.dtype == jnp.float32 and float(dequantize(q)) == 3.0


def test_bytes_of_a_large_matrix():
    q = abstract_quantized((4096, 4096), np.dtype("float32"), SPEC)
    assert q.nbytes == 4096 * 4096 // 2 + 4096 * 32 + 16 * 32 * 4


def test_no_scale_is_rounded_to_zero():
    scales = jnp.asarray([[1.0], [1e-20], [0.0]])
    back = float_scales(code_scales(scales, signed=False), signed=False)
    assert back[1, 0] > 0 and back[2, 0] == 0
    back = float_scales(code_scales(-scales, signed=True), signed=True)
    assert back[1, 0] < 0 and back[2, 0] == 0


def test_a_scale_that_is_not_finite_stays_in_its_group():
    scales = jnp.ones((512, 2)).at[3, 0].set(jnp.nan)
    back = float_scales(code_scales(scales, signed=False), signed=False)
    assert jnp.isnan(back[:256, 0]).all()
    np.testing.assert_array_equal(back[256:], jnp.ones((256, 2)))
    np.testing.assert_array_equal(back[:, 1], jnp.ones(512))


def test_stochastic_rounding_keeps_the_mean():
    scales = jnp.full((256, 64), 0.2345).at[0].set(1.0)
    spread = [
        float_scales(code_scales(scales, False, (jnp.uint32(seed), jnp.uint32(0))), False)[1:]
        for seed in range(4)
    ]
    table = np.asarray(codebook("dynamic_exponent", 8, False))
    gap = np.diff(table)[np.searchsorted(table, 0.2345) - 1]
    # The mean of n draws over a gap has a standard deviation of at most gap / 2 / sqrt(n).
    bound = 5 * gap / 2 / np.sqrt(4 * 255 * 64)
    assert abs(np.mean(spread) - 0.2345) < bound
    assert abs(float(float_scales(code_scales(scales, False), False)[1, 0]) - 0.2345) > bound


def test_under_vmap():
    x = jnp.ones((3, 300, 256)) * jnp.arange(1.0, 4.0)[:, None, None]
    each = jax.vmap(lambda x: dequantize(quantize(x, SPEC)))(x)
    np.testing.assert_array_equal(each, dequantize(quantize(x, SPEC)))
    assert isinstance(quantize(x, SPEC).scales, CodedScales)


@pytest.mark.parametrize("scaling", ["tensor", "row", "column", "rank1"])
def test_needs_blocks(scaling):
    with pytest.raises(ValueError, match=f"needs scaling='block', got scaling='{scaling}'"):
        dataclasses.replace(SPEC, scaling=scaling)
    with pytest.raises(TypeError, match="double_quant must be a bool or 'offset', got 1"):
        dataclasses.replace(SPEC, double_quant=1)
