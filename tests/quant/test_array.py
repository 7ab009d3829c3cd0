"""Invariants of the low-bit array: layout, transformations, odd shapes, zeros, NaN and infinity."""

import dataclasses
import functools

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_lowbit import QuantSpec, dequantize, is_quantized, quantize
from optax_lowbit.quant import packing, random_bits, rounding
from optax_lowbit.quant.array import abstract_quantized
from optax_lowbit.quant.random_bits import element_indices

SIGNED = QuantSpec(codebook="dynamic_exponent", bits=4, signed=True, scaling="block")
UNSIGNED = QuantSpec(codebook="linear", bits=4, signed=False, scaling="rank1")
SCALINGS = ["tensor", "row", "column", "block", "rank1"]
SHAPES = [(), (1,), (0,), (3, 0), (127,), (128,), (300,), (3, 257), (2, 3, 4, 5, 130)]


def replace(**changes):
    return dataclasses.replace(SIGNED, **changes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9, 63, 64, 65, 128, 300])
def test_packing_round_trip_takes_no_spare_byte(bits, n, rng):
    codes = jnp.asarray(rng.integers(0, 2**bits, size=(3, n)), jnp.uint8)
    group = packing.group_size(bits, 64)
    packed = packing.pack(codes, bits, group)
    assert packed.shape == (3, -(-n * bits // 8)) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(packing.unpack(packed, bits, group, n), codes)


def test_packing_is_by_half_blocks():
    codes = jnp.arange(16, dtype=jnp.uint8)
    packed = packing.pack(codes, 4, 8)
    np.testing.assert_array_equal(packed[:4], [0 | 4 << 4, 1 | 5 << 4, 2 | 6 << 4, 3 | 7 << 4])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_layout_keeps_shape_and_rank(scaling, shape, rng):
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    q = quantize(x, replace(scaling=scaling))
    assert q.shape == shape and q.ndim == x.ndim and q.size == x.size and q.dtype == x.dtype
    assert dequantize(q).shape == shape
    for leaf in jax.tree.leaves(q):
        assert leaf.ndim == x.ndim
    if shape:
        assert q.codes.shape == (*shape[:-1], -(-shape[-1] // 2))
    expected = jax.tree.map(jnp.shape, q)
    assert jax.tree.map(jnp.shape, abstract_quantized(shape, x.dtype, q.spec)) == expected
    assert jax.tree.map(jnp.shape, jax.eval_shape(lambda x: quantize(x, q.spec), x)) == expected


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block_size", [1, 7, 128])
def test_error_is_at_most_half_a_gap(bits, block_size, rng):
    spec = replace(codebook="integer", bits=bits, block_size=block_size)
    x = rng.normal(size=(5, 200)).astype(np.float32)
    error = np.abs(dequantize(quantize(jnp.asarray(x), spec)) - x)
    scale = np.repeat(np.asarray(quantize(jnp.asarray(x), spec).scales), block_size, -1)[:, :200]
    assert (error <= 0.5 / (2 ** (bits - 1) - 1) * scale * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_float_dtypes(dtype, rng):
    x = jnp.asarray(rng.normal(size=(4, 256)), dtype)
    q = quantize(x, SIGNED)
    assert q.dtype == dtype and dequantize(q).dtype == dtype and q.scales.dtype == jnp.float32


def test_float64_beyond_the_range_of_float32_stays_finite():
    with jax.enable_x64():
        x = jnp.asarray([1e300, -1e300, 1.0], jnp.float64)
        assert np.isfinite(dequantize(quantize(x, SIGNED))).all()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_zeros_stay_zero_and_finite_stays_finite(scaling, rng):
    x = rng.normal(size=(8, 256)).astype(np.float32)
    x[2] = 0
    x[:, 128:] = 0
    x[0, 0] = np.finfo(np.float32).max
    x[1, 1] = 1e-45
    result = np.asarray(dequantize(quantize(jnp.asarray(x), replace(scaling=scaling))))
    assert np.isfinite(result).all()
    assert (result[x == 0] == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_stay_within_what_shares_their_scale(bad, rng):
    x = rng.normal(size=(4, 256)).astype(np.float32)
    clean = np.asarray(dequantize(quantize(jnp.asarray(x), SIGNED)))
    x[1, 130] = bad
    dirty = np.asarray(dequantize(quantize(jnp.asarray(x), SIGNED)))
    assert not np.isfinite(dirty[1, 130])
    touched = np.zeros_like(x, bool)
    touched[1, 128:] = True
    np.testing.assert_array_equal(dirty[~touched], clean[~touched])
    x_row = replace(scaling="rank1")
    dirty = np.asarray(dequantize(quantize(jnp.asarray(x), x_row)))
    others = np.delete(np.delete(dirty, 1, 0), 130, 1)
    assert np.isfinite(others).all()


def test_rank1_scale_is_the_least_of_row_and_column_maxima(rng):
    x = np.abs(rng.normal(size=(256, 384))).astype(np.float32)
    rows, columns = quantize(jnp.asarray(x), UNSIGNED).scales
    np.testing.assert_array_equal(rows, x.max(1, keepdims=True))
    np.testing.assert_array_equal(columns, x.max(0, keepdims=True))


def test_stacked_matrices_share_no_scales_but_small_kernels_do():
    stacked = quantize(jnp.ones((4, 256, 256)), UNSIGNED)
    assert [s.shape for s in stacked.scales] == [(4, 256, 1), (4, 1, 256)]
    kernel = quantize(jnp.ones((3, 3, 16, 32)), UNSIGNED)
    assert [s.shape for s in kernel.scales] == [
        (3, 1, 1, 1), (1, 3, 1, 1), (1, 1, 16, 1), (1, 1, 1, 32),
    ]  # fmt: skip


def test_vector_under_rank1_uses_the_spec_s_own_block():
    assert quantize(jnp.ones(512), dataclasses.replace(UNSIGNED, block_size=64)).scales.shape == (
        8,
    )


def test_signed_scale_makes_the_largest_element_exact(rng):
    x = rng.normal(size=(6, 128)).astype(np.float32)
    where = np.abs(x).argmax(-1)
    x[np.arange(6), where] = -np.abs(x[np.arange(6), where])  # every block's maximum is negative
    largest = x[np.arange(6), where]
    exact = np.asarray(dequantize(quantize(jnp.asarray(x), replace(signed_scale=True))))
    np.testing.assert_array_equal(exact[np.arange(6), where], largest)
    shrunk = np.asarray(dequantize(quantize(jnp.asarray(x), SIGNED)))
    np.testing.assert_allclose(shrunk[np.arange(6), where], largest * 0.8875, rtol=1e-6)


def test_ties_go_to_the_lower_value():
    spec = QuantSpec(codebook=(0.0, 0.5, 1.0), bits=2, signed=False, scaling="tensor")
    x = jnp.asarray([0.25, 0.75, np.nextafter(np.float32(0.25), np.float32(1)), 1.0])
    np.testing.assert_array_equal(dequantize(quantize(x, spec)), [0.0, 0.5, 0.5, 1.0])


@pytest.mark.parametrize("table", [(1.0, -0.5, 0.25, -1.0), (0.0, 0.125, 0.5)], ids=str)
def test_tables_of_the_user(table):
    spec = QuantSpec(codebook=table, bits=2, signed=min(table) < 0, scaling="tensor")
    x = jnp.asarray([*table, 1.0])
    np.testing.assert_array_equal(dequantize(quantize(x, spec)), [*table, max(table)])


@pytest.mark.parametrize("bits", [4, 8])
def test_search_by_comparisons_and_by_bisection_agree(bits, rng):
    spec = replace(bits=bits)
    table = np.sort(np.asarray(spec.values, np.float32))
    boundaries = (table[:-1] + table[1:]) * np.float32(0.5)
    x = np.concatenate([rng.uniform(-1.2, 1.2, 4000), boundaries, np.nextafter(boundaries, 2)])
    x = x.astype(np.float32)
    expected = (x[:, None] > boundaries).sum(-1)
    np.testing.assert_array_equal(rounding.nearest_codes(jnp.asarray(x), spec.values), expected)


def test_stochastic_rounding_is_unbiased_and_reproducible(rng):
    spec = replace(rounding="stochastic", scaling="tensor")
    x = np.concatenate([[1.0], rng.uniform(-0.88, 1.0, 63)]).astype(np.float32)
    many = jax.vmap(lambda key: dequantize(quantize(jnp.asarray(x), spec, key=key)))
    draws = np.asarray(many(jax.random.split(jax.random.key(1), 20_000)))
    standard_error = draws.std(0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(0) - x) <= 5 * standard_error + 1e-6).all()
    assert np.unique(draws[:, 5]).size == 2
    again = dequantize(quantize(jnp.asarray(x), spec, key=7))
    np.testing.assert_array_equal(again, dequantize(quantize(jnp.asarray(x), spec, key=7)))


def test_noise_is_the_threefry_cipher_of_row_and_column():
    key = jax.random.key(3)
    row, column = element_indices((5, 7))
    ours = random_bits.threefry2x32(random_bits.key_words(key), row, column)
    counts = jnp.concatenate([row.reshape(-1), column.reshape(-1)])
    theirs = jax.extend.random.threefry_2x32(jax.random.key_data(key), counts)
    np.testing.assert_array_equal(jnp.concatenate([x.reshape(-1) for x in ours]), theirs)


@pytest.mark.parametrize("scaling", ["block", "rank1"])
def test_vmap_equals_a_loop_and_decodes_outside(scaling, rng):
    x = jnp.asarray(rng.normal(size=(3, 4, 200)), jnp.float32)
    spec = replace(scaling=scaling)
    together = jax.vmap(lambda x: quantize(x, spec))(x)
    for i in range(3):
        one = quantize(x[i], spec)
        inner = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        jax.tree.map(np.testing.assert_array_equal, inner, one)
    expected = jnp.stack([dequantize(quantize(x[i], spec)) for i in range(3)])
    np.testing.assert_array_equal(jax.vmap(dequantize)(together), expected)
    np.testing.assert_array_equal(dequantize(together), expected)


def test_vmap_over_scalars_decodes_outside():
    together = jax.vmap(lambda x: quantize(x, SIGNED))(jnp.asarray([1.0, -2.0, 0.0]))
    assert together.shape == (3,)
    np.testing.assert_allclose(dequantize(together), [1.0, -2.0 * 0.8875, 0.0], rtol=1e-6)


def test_scan_and_jit_keep_the_static_part(rng):
    x = jnp.asarray(rng.normal(size=(4, 300)), jnp.float32)

    def body(q, _):
        return quantize(dequantize(q), SIGNED), None

    q, _ = jax.lax.scan(body, quantize(x, SIGNED), length=3)
    assert is_quantized(q) and q.shape == (4, 300)
    np.testing.assert_array_equal(jax.jit(dequantize)(q), dequantize(q))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [("x", None), (None, "x")], ids=str)
@pytest.mark.parametrize("scaling", ["block", "rank1"])
def test_sharded_quantization_has_the_same_bits(scaling, spec, axis_type, rng):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    x = jnp.asarray(rng.normal(size=(64, 1024)), jnp.float32)
    expected = quantize(x, replace(scaling=scaling))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        q = jax.jit(functools.partial(quantize, spec=replace(scaling=scaling)))(sharded)
        back = jax.jit(dequantize)(q)
    jax.tree.map(np.testing.assert_array_equal, q, expected)
    np.testing.assert_array_equal(back, dequantize(expected))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits must be one of"),
        ({"bits": 4.0}, "bits must be one of"),
        ({"codebook": "nf5"}, "codebook must be one of"),
        ({"codebook": "nf4", "bits": 8}, "'nf4' has 4 bits"),
        ({"codebook": (0.0, 2.0)}, r"numbers in \[-1, 1\]"),
        ({"codebook": (0.0,)}, "2 to 16 values, got 1"),
        ({"scaling": "blocks"}, "scaling must be one of"),
        ({"block_size": 0}, "block_size must be a positive int"),
        ({"block_size": True}, "block_size must be a positive int"),
        ({"rounding": "up"}, "rounding must be one of"),
        ({"signed_scale": True, "signed": False}, "signed_scale=True needs signed=True"),
    ],
    ids=str,
)
def test_impossible_specs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(**changes)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="codebook must be a name or a tuple"):
        replace(codebook=[0.0, 1.0])
    with pytest.raises(TypeError, match="float dtype, got int32"):
        quantize(jnp.arange(3), SIGNED)
    with pytest.raises(ValueError, match="key must be given"):
        quantize(jnp.ones(3), replace(rounding="stochastic"))
    with pytest.raises(ValueError, match="threefry2x32"):
        quantize(jnp.ones(3), replace(rounding="stochastic"), key=jax.random.key(0, impl="rbg"))
    with pytest.raises(TypeError, match="q must be a QuantizedArray"):
        dequantize(jnp.ones(3))


def test_repr_of_a_tree_of_something_else():
    q = quantize(jnp.ones(128), QuantSpec(codebook="linear", bits=4, signed=True, scaling="block"))
    assert "uint8" in repr(jax.tree.map(lambda x: x.dtype, q))
