"""Scales less their mean in 8 bits: bitsandbytes' own, bit by bit."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import QuantSpec, adamw4bit, dequantize, quantize
from optax_lowbit.moments.policy import Policy
from optax_lowbit.quant.array import abstract_quantized
from optax_lowbit.quant.offset_scales import float_scales, mean_as_bitsandbytes, offset_scales

SPEC = QuantSpec(codebook="nf4", bits=4, signed=True, scaling="block", double_quant="offset")


def test_all_that_bitsandbytes_keeps_is_equal(golden):
    vectors = golden("bnb_quant") | golden("bnb_nested")
    cases = [key.removesuffix("nested_offset") for key in vectors if key.endswith("nested_offset")]
    assert len(cases) == 18
    for case in cases:
        coded = jax.jit(offset_scales)(jnp.asarray(vectors[case + "absmax"]))
        for ours, theirs in (
            (coded.offset, "offset"),
            (coded.absmax, "absmax"),
            (coded.codes, "absmax_codes"),
            (float_scales(coded), "restored_absmax"),
        ):
            expected = vectors[f"{case}nested_{theirs}"]
            np.testing.assert_array_equal(np.ravel(ours), np.ravel(expected), err_msg=case)


def sum_in_order(values):
    """What PyTorch's `sum` does with a vector on an x86 CPU, as loops over scalars."""
    zero = np.float32(0)
    lanes, rows, levels = 8, 4, 4

    def cascade(column):
        power = max(4, int(np.ceil(np.log2(len(column)))) // levels) if len(column) else 4
        sums = [zero] * levels
        for count, value in enumerate(column, 1):
            sums[0] += value
            for level in range(1, levels):
                if count % 2 ** (power * level):
                    break
                sums[level] += sums[level - 1]
                sums[level - 1] = zero
        return list(itertools.accumulate(sums))[-1]

    def lane_sum(lane):
        full = len(lane) // rows * rows
        sums = [cascade(lane[row:full:rows]) for row in range(rows)]
        for value in lane[full:]:
            sums[0] += value
        return list(itertools.accumulate(sums))[-1]

    if len(values) < lanes:
        return lane_sum(values)
    full = len(values) // lanes * lanes
    total = zero
    for value in [*values[full:], *(lane_sum(values[lane:full:lanes]) for lane in range(lanes))]:
        total += value
    return total


@pytest.mark.parametrize("size", [1, 7, 8, 33, 94, 1000, 4096, 20011])
def test_the_mean_is_added_up_in_the_same_order(size, rng):
    x = rng.gamma(2.0, 0.03, size).astype(np.float32)
    expected = sum_in_order(x) / np.float32(size)
    assert np.asarray(jax.jit(mean_as_bitsandbytes)(jnp.asarray(x))) == expected


def test_an_array_of_zeros():
    q = quantize(jnp.zeros((4, 256)), SPEC)
    np.testing.assert_array_equal(dequantize(q), np.zeros((4, 256)))


@pytest.mark.parametrize("shape", [(300, 256), (1, 130), (7, 3), (1000,)])
def test_values_are_near_and_shapes_are_known_before(shape, rng):
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    q = quantize(x, SPEC)
    plain = quantize(x, dataclasses.replace(SPEC, double_quant=False))
    np.testing.assert_array_equal(q.codes, plain.codes)
    # The table's steps near 1 are 1/64 of the largest distance of a scale from the mean.
    spread = np.abs(plain.scales - np.mean(plain.scales)).max()
    assert np.abs(float_scales(q.scales) - plain.scales).max() <= spread / 64
    like = abstract_quantized(shape, x.dtype, SPEC)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), q) == jax.tree.map(
        lambda a: (a.shape, a.dtype), like
    )


def test_stacked_arrays_have_their_own_means(rng):
    x = jnp.asarray(rng.normal(size=(3, 40, 128)) * [[[1]], [[10]], [[0]]], jnp.float32)
    stack = jax.vmap(lambda layer: quantize(layer, SPEC))(x)
    assert stack.scales.offset.shape == (3,)
    for layer, whole in zip(x, dequantize(stack), strict=True):
        np.testing.assert_array_equal(dequantize(quantize(layer, SPEC)), whole)


def test_what_it_is_not_for():
    with pytest.raises(TypeError, match="double_quant must be a bool or 'offset', got 'mean'"):
        dataclasses.replace(SPEC, double_quant="mean")
    with pytest.raises(ValueError, match="needs scaling='block', got scaling='row'"):
        dataclasses.replace(SPEC, scaling="row")
    with pytest.raises(ValueError, match="needs signed_scale=False"):
        dataclasses.replace(SPEC, signed_scale=True)
    with pytest.raises(ValueError, match="double_quant='offset' is for weights"):
        adamw4bit(1e-3, policy=Policy(rules=((".*", SPEC),)))
