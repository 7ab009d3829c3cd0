"""A matrix in few bits: its values, its product, and the product's derivatives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import QuantSpec, qlora

PLAIN = QuantSpec(codebook="nf4", bits=4, signed=True, scaling="block", block_size=64)
INT4 = dataclasses.replace(PLAIN, codebook="integer", block_size=32)


def normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


# Positive values of E2M1 over their largest; the other halves of these tables are their negatives.
E2M1 = (0.0, 0.5 / 6, 1 / 6, 1.5 / 6, 2 / 6, 3 / 6, 4 / 6, 1.0)
# The table of the paper's appendix E.
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def test_errors_of_normal_weights_are_in_the_order_of_the_paper(rng):
    x = rng.normal(size=(256, 1024)).astype(np.float32)
    both = tuple(sorted({*E2M1, *(-value for value in E2M1)}))
    specs = {
        "nf4": (PLAIN, NF4_TABLE, 0.0920),
        "e2m1": (dataclasses.replace(PLAIN, codebook=both), both, 0.1057),
        "int4": (dataclasses.replace(INT4, block_size=64), np.arange(-7, 8) / 7, 0.1077),
    }
    errors = {}
    for name, (spec, table, published) in specs.items():
        values = np.asarray(qlora.quantize_matrix(jnp.asarray(x.T), spec).dequantize()).T
        errors[name] = np.linalg.norm(values - x) / np.linalg.norm(x)
        blocks = x.reshape(-1, 64, 1)
        absmax = np.abs(blocks).max(1, keepdims=True)
        nearest = np.abs(blocks / absmax - np.asarray(table)).min(-1, keepdims=True) * absmax
        assert errors[name] == pytest.approx(np.linalg.norm(nearest) / np.linalg.norm(x), rel=1e-5)
        assert errors[name] == pytest.approx(published, rel=0.005)
    assert errors["nf4"] < errors["e2m1"] < errors["int4"]
    coded = np.asarray(qlora.quantize_matrix(jnp.asarray(x.T)).dequantize()).T
    # What double quantization adds: 2.6e-4 of it.
    more = np.linalg.norm(coded - x) / np.linalg.norm(x) / errors["nf4"] - 1
    assert 1e-4 < more < 5e-4


def test_values_are_those_of_bitsandbytes(golden):
    vectors = golden("bnb_quant") | golden("bnb_nested")
    dtypes = {"fp16_in": jnp.float16}
    checked = 0
    for key in vectors:
        case, _, what = key.partition("/")
        if what.removesuffix("_sample") not in ("dequant", "nested_dequant") or case[:4] == "8bit":
            continue
        name, table, block = case.split("|")
        x = vectors["input/" + name]
        rows = jnp.asarray(x.reshape(x.shape if x.ndim == 2 else (1, -1)), jnp.float32)
        nested = "offset" if what.startswith("nested") else False
        spec = dataclasses.replace(
            PLAIN, codebook=table, block_size=int(block[2:]), double_quant=nested
        )
        w = qlora.quantize_matrix(rows.T.astype(dtypes.get(name, jnp.float32)), spec)
        values = np.asarray(w.dequantize().T.astype(jnp.float32)).reshape(-1)
        step = 31 if what.endswith("_sample") else 1
        np.testing.assert_array_equal(values[::step], vectors[key].reshape(-1), err_msg=key)
        checked += 1
    assert checked == 21


def test_bits_of_a_parameter_are_counted_from_buffers(rng):
    w = normal(rng, 1024, 1024)
    assert qlora.quantize_matrix(w, PLAIN).bits_per_parameter == 4.5
    nested = qlora.quantize_matrix(w)
    assert abs(nested.bits_per_parameter - (4 + 8 / 64 + 32 / (64 * 256))) < 1e-4
    assert nested.nbytes == sum(x.nbytes for x in jax.tree.leaves(nested))


@pytest.mark.parametrize("spec", [qlora.NF4, PLAIN, INT4], ids=["nested", "plain", "int4"])
@pytest.mark.parametrize("shape", [(128, 24), (100, 7), (1, 1), (33, 64)])
def test_a_product_is_that_of_the_dequantized_matrix(spec, shape, rng):
    w = qlora.quantize_matrix(normal(rng, *shape), spec)
    assert w.shape == w.dequantize().shape == shape
    x = normal(rng, 2, 3, shape[0])
    exact = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)
    # Each of the sums of n products is off by n units of float32 at most.
    bound = np.abs(x).astype(np.float64) @ np.abs(w.dequantize()) * shape[0] * 2**-24
    assert (np.abs(x @ w - exact) <= bound).all()
    assert (x[0, 0] @ w).shape == shape[1:]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_product_has_the_dtype_of_its_left_factor(dtype, rng):
    w = qlora.quantize_matrix(normal(rng, 64, 8, dtype=jnp.bfloat16))
    y = normal(rng, 4, 64, dtype=dtype) @ w
    assert y.dtype == dtype
    assert w.dequantize().dtype == jnp.bfloat16


def test_derivatives_are_those_of_the_dequantized_matrix(rng):
    w, v = qlora.quantize_matrix(normal(rng, 128, 16) / 8), normal(rng, 5, 128)
    x, dense = normal(rng, 5, 128), w.dequantize()

    def loss(x, w):
        return jnp.sum(jnp.tanh(x @ w) ** 2)

    def close(ours, theirs):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)

    close(jax.grad(loss)(x, w), jax.grad(loss)(x, dense))
    forward = jax.jvp(lambda x: loss(x, w), (x,), (v,))
    close(forward[1], jax.jvp(lambda x: loss(x, dense), (x,), (v,))[1])
    second = jax.jvp(lambda x: jax.grad(loss)(x, w), (x,), (v,))
    close(second[1], jax.jvp(lambda x: jax.grad(loss)(x, dense), (x,), (v,))[1])
    close(jax.vmap(jax.grad(loss), (0, None))(x, w), jax.vmap(jax.grad(loss), (0, None))(x, dense))


def test_nothing_is_differentiated_with_respect_to_the_matrix(rng):
    w, x = qlora.quantize_matrix(normal(rng, 64, 8), PLAIN), normal(rng, 2, 64)
    grads = jax.grad(lambda w: jnp.sum(x @ w), allow_int=True)(w)
    assert not np.any(grads.rows.scales)
    assert grads.rows.codes.dtype == jax.dtypes.float0


def test_a_stack_is_its_matrices_bit_for_bit(rng):
    floats = jnp.asarray(
        rng.standard_normal((3, 64, 264), np.float32)
    )  # more than a group of scales
    stack = qlora.quantize_matrix(floats)
    for number, w in enumerate(floats):
        alone = qlora.quantize_matrix(w)
        jax.tree.map(lambda x, y, i=number: np.testing.assert_array_equal(x[i], y), stack, alone)


def test_a_stack_is_sliced_by_scan_and_vmap(rng):
    floats = normal(rng, 3, 100, 100) / 10
    stack = qlora.quantize_matrix(floats)
    assert stack.shape == (3, 100, 100)
    assert qlora.abstract_matrix((3, 100, 100), jnp.float32).nbytes == stack.nbytes
    alone = [qlora.quantize_matrix(layer) for layer in floats]
    np.testing.assert_array_equal(stack.dequantize(), [w.dequantize() for w in alone])
    x = normal(rng, 2, 100)
    each = jax.vmap(lambda w: x @ w)(stack)
    np.testing.assert_allclose(each, [x @ w for w in alone], rtol=1e-6)
    last = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]
    expected = x
    for w in alone:
        expected = jnp.tanh(expected @ w)
    np.testing.assert_allclose(last, expected, rtol=1e-5)
    pairs = jax.vmap(jax.grad(lambda x, w: jnp.sum(jnp.sin(x @ w))))(jnp.stack([x] * 3), stack)
    np.testing.assert_allclose(
        pairs[1], jax.grad(lambda x: jnp.sum(jnp.sin(x @ alone[1])))(x), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(TypeError, match=r"w is a stack \(3, 100, 100\)"):
        x @ stack


@pytest.mark.parametrize(
    ("w", "spec", "error", "message"),
    [
        (jnp.ones(4), PLAIN, ValueError, r"two axes or more, and elements, got shape \(4,\)"),
        (jnp.ones((0, 4)), PLAIN, ValueError, "elements"),
        (jnp.ones((4, 4), jnp.int32), PLAIN, TypeError, "float dtype, got int32"),
        (jnp.ones((4, 4)), "nf4", TypeError, "spec must be a QuantSpec, got str"),
        (
            jnp.ones((4, 4)),
            QuantSpec(codebook="linear", bits=8, signed=False, scaling="row"),
            ValueError,
            "must have bits=4, signed=True, scaling='block'",
        ),
    ],
)
def test_what_cannot_be_kept_so(w, spec, error, message):
    with pytest.raises(error, match=message):
        qlora.quantize_matrix(w, spec)


def test_what_cannot_be_multiplied(rng):
    w = qlora.quantize_matrix(normal(rng, 64, 8))
    with pytest.raises(ValueError, match=r"last axis of 64 for a matrix \(64, 8\), got \(2, 8\)"):
        jnp.ones((2, 8)) @ w
    with pytest.raises(TypeError, match="16 bits or more, got int32"):
        jnp.ones((2, 64), jnp.int32) @ w
    with pytest.raises(TypeError, match="16 bits or more, got float8_e4m3fn"):
        jnp.ones((2, 64), jnp.float8_e4m3fn) @ w
    with pytest.raises(TypeError, match="is no array: use dequantize"):
        np.asarray(w)
    with pytest.raises(TypeError):
        w + 1
