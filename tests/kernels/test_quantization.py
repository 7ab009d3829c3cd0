"""Quantizing by whatever kernel takes an array: the reference's codes, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_lowbit
from optax_lowbit import QuantSpec
from optax_lowbit.kernels import quantization
from optax_lowbit.kernels.cpu import library

SPECS = {
    "nf4": QuantSpec(codebook="nf4", bits=4, signed=True, scaling="block", block_size=128),
    "8 bits": QuantSpec(codebook="dynamic_exponent", bits=8, signed=True, scaling="block"),
    "rank-1": QuantSpec(codebook="linear", bits=4, signed=False, scaling="rank1"),
}
BACKENDS = ["auto", "reference", "cpu", "interpret"]


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def needs_library(backend):
    if backend == "cpu" and library.library() is None:
        pytest.skip("the native kernels were not built: no C++ compiler")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["nf4", "8 bits"])
def test_every_backend_equals_the_reference(name, backend):
    needs_library(backend)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(65, 300)), jnp.float32)
    expected = optax_lowbit.quantize(x, SPECS[name])
    q = jax.jit(quantization.quantize, static_argnums=(1, 2))(x, SPECS[name], backend)
    assert_equal(q, expected)
    back = jax.jit(quantization.dequantize, static_argnums=1)(q, backend)
    np.testing.assert_array_equal(back, optax_lowbit.dequantize(expected))


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_shards_are_quantized_where_they_are(axes):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(64, 1024)), jnp.bfloat16)
    expected = optax_lowbit.quantize(x, SPECS["nf4"])
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axes,) * 2)

    def there_and_back(x):
        q = quantization.quantize(x, SPECS["nf4"])
        return q, quantization.dequantize(q)

    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, PartitionSpec("x", "y"))
        spread = jax.device_put(x, place)
        q, back = jax.jit(there_and_back)(spread)
        text = jax.jit(there_and_back).lower(spread).compile().as_text()
    assert_equal(jax.tree.map(np.asarray, q), jax.tree.map(np.asarray, expected))
    np.testing.assert_array_equal(np.asarray(back), optax_lowbit.dequantize(expected))
    assert q.codes.sharding.is_equivalent_to(place, 2)
    assert back.sharding.is_equivalent_to(place, 2)
    assert "all-gather" not in text
    if library.library() is not None:
        assert "optax_lowbit_quantize" in text


def test_a_row_that_ends_within_a_byte_is_not_spread():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 255)), jnp.float32)
    expected = optax_lowbit.quantize(x, SPECS["nf4"])
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, PartitionSpec(None, "x"))
        q = jax.tree.map(lambda array: jax.device_put(array, place), expected)
        back = jax.jit(quantization.dequantize)(q)
    np.testing.assert_array_equal(np.asarray(back), optax_lowbit.dequantize(expected))


def test_what_no_kernel_takes_goes_to_the_reference_unless_one_is_named():
    x = jnp.abs(jnp.asarray(np.random.default_rng(2).normal(size=(64, 256)), jnp.float32))
    assert_equal(
        quantization.quantize(x, SPECS["rank-1"]), optax_lowbit.quantize(x, SPECS["rank-1"])
    )
    with pytest.raises(ValueError, match="backend='interpret' cannot quantize this array"):
        quantization.quantize(x, SPECS["rank-1"], "interpret")
    with pytest.raises(ValueError, match="backend must be one of"):
        quantization.quantize(x, SPECS["nf4"], "gpu")
