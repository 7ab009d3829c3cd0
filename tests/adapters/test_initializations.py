"""What adapters start as: sums that are the matrix, or nearer to it than 4 bits are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import adapters
from optax_lowbit.adapters.initializations import normal
from optax_lowbit.kernels.quantized_matrix import QuantizedMatrix, quantize_matrix
from optax_lowbit.quant import random_bits

BASE_CHANGES = ["pissa", "pissa_niter_2", "olora"]


def lora_with(init, **changes):
    fields = {"rank": 3, "alpha": 12.0, "targets": "w"} | changes
    return adapters.LoRA(init_lora_weights=init, **fields)


def matrix(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def total(lora, frozen, trainable):
    """The adapted matrix in float64."""
    a, b = (np.asarray(trainable["w"][side], np.float64) for side in "ab")
    base = frozen["w"]
    base = base.dequantize() if isinstance(base, QuantizedMatrix) else base
    return np.asarray(base, np.float64) + lora.scale_of("w") * np.swapaxes(a, -1, -2) @ b


def test_normal_numbers_are_normal():
    x = np.asarray(normal(random_bits.key_words(0), (400, 50)))
    assert np.all(np.isfinite(x))
    # Deviations of the mean, of the second and of the fourth moment over 20000 numbers.
    np.testing.assert_allclose(x.mean(), 0, atol=4 / np.sqrt(x.size))
    np.testing.assert_allclose((x**2).mean(), 1, atol=4 * np.sqrt(2 / x.size))
    np.testing.assert_allclose((x**4).mean(), 3, atol=4 * np.sqrt(96 / x.size))


def test_gaussian_has_the_deviation_of_peft():
    pair = lora_with("gaussian", rank=5).init({"w": jnp.zeros((2000, 3))}, key=0)["w"]
    a = np.asarray(pair["a"])
    np.testing.assert_allclose(a.std(), 1 / 5, rtol=4 / np.sqrt(2 * a.size))
    assert not np.any(pair["b"])


def test_tables_start_with_zero_a_and_random_b():
    lora = adapters.LoRA(rank=3, targets="tokens|embedding", embeddings="tokens")
    pairs = lora.init({"tokens": jnp.ones((9, 5)), "embedding": jnp.ones((9, 5))}, key=0)
    assert not np.any(pairs["tokens"]["a"]) and np.all(pairs["tokens"]["b"])
    assert np.all(pairs["embedding"]["a"]) and not np.any(pairs["embedding"]["b"])


@pytest.mark.parametrize("init", BASE_CHANGES)
@pytest.mark.parametrize("shape", [(7, 5), (2, 5, 9)])
def test_what_is_frozen_and_the_adapters_add_up_to_the_matrix(init, shape, rng):
    params = {"w": matrix(rng, *shape), "other": jnp.ones(3)}
    lora = lora_with(init)
    frozen, trainable = lora.start(params, key=0)
    assert frozen["other"] is params["other"] and np.any(frozen["w"] != params["w"])
    assert trainable["w"]["a"].shape == (*shape[:-2], 3, shape[-2])
    # A product and a difference of float32 numbers of about 3, summed over three.
    np.testing.assert_allclose(total(lora, frozen, trainable), params["w"], atol=1e-5)


def test_pissa_is_the_nearest_matrix_of_its_rank(rng):
    params = {"w": matrix(rng, 8, 6)}
    frozen, _ = lora_with("pissa").start(params, key=0)
    values = np.linalg.svd(np.asarray(params["w"], np.float64), compute_uv=False)
    rest = np.linalg.svd(np.asarray(frozen["w"], np.float64), compute_uv=False)
    np.testing.assert_allclose(rest, [*values[3:], 0, 0, 0], atol=1e-5)


def test_sketch_finds_the_largest_values(rng):
    u, _, vt = np.linalg.svd(rng.normal(size=(60, 40)), full_matrices=False)
    values = 0.7 ** np.arange(40)
    params = {"w": jnp.asarray(u * values @ vt, jnp.float32)}
    frozen, trainable = lora_with("pissa_niter_4").start(params, key=0)
    np.testing.assert_allclose(
        np.linalg.svd(np.asarray(frozen["w"]), compute_uv=False)[:5], values[3:8], rtol=1e-3
    )
    # Adapters share the singular values evenly, but for the scale of 4.
    for side in "ab":
        norms = np.linalg.norm(np.asarray(trainable["w"][side]), axis=-1)
        np.testing.assert_allclose(norms, np.sqrt(values[:3] / 4), rtol=1e-3)


def test_olora_has_the_decomposition_of_peft(rng):
    w = rng.normal(size=(6, 4))
    _, trainable = lora_with("olora", rank=2).start({"w": jnp.asarray(w, jnp.float32)}, key=0)
    q, r = np.linalg.qr(w.T)
    signs = np.sign(np.diag(r))[:2] * np.sign(np.diag(np.asarray(trainable["w"]["a"])))
    np.testing.assert_allclose(trainable["w"]["a"], signs[:, None] * r[:2], atol=1e-5)
    np.testing.assert_allclose(trainable["w"]["b"], signs[:, None] * q[:, :2].T, atol=1e-5)


@pytest.mark.parametrize("init", BASE_CHANGES)
def test_what_moved_since_the_start_is_lora_of_the_original_matrix(init, rng):
    params = {"w": matrix(rng, 7, 5)}
    lora = lora_with(init)
    frozen, start = lora.start(params, key=0)
    now = jax.tree.map(lambda x: x + matrix(rng, *x.shape), start)
    moved = adapters.mix({"now": now, "start": start}, {"now": 1, "start": -1})
    result, expected = lora.merge(params, moved)["w"], lora.merge(frozen, now)["w"]
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", BASE_CHANGES)
def test_a_bfloat16_base_is_rounded_once(init, rng):
    params = {"w": matrix(rng, 9, 8, dtype=jnp.bfloat16)}
    lora = lora_with(init)
    frozen, trainable = lora.start(params, key=0)
    assert frozen["w"].dtype == jnp.bfloat16 and trainable["w"]["a"].dtype == jnp.float32
    error = total(lora, frozen, trainable) - np.asarray(params["w"], np.float64)
    # Half a unit in the last of 8 bits of what is frozen, beside float32's errors.
    bound = 2.0**-8 * np.abs(np.asarray(frozen["w"], np.float64)) + 1e-5
    assert np.any(error) and np.all(np.abs(error) <= bound)


def test_a_rank_above_the_matrix_is_filled_with_zeros(rng):
    params = {"w": matrix(rng, 4, 2)}
    for init in BASE_CHANGES:
        lora = lora_with(init)
        frozen, trainable = lora.start(params, key=0)
        assert trainable["w"]["a"].shape == (3, 4) and trainable["w"]["b"].shape == (3, 2)
        np.testing.assert_allclose(total(lora, frozen, trainable), params["w"], atol=1e-5)


@pytest.mark.parametrize(("alpha", "shape"), [(3.0, (64, 20)), (24.0, (64, 20)), (24.0, (2, 9, 7))])
def test_loftq_leaves_less_than_4_bits_alone(alpha, shape, rng):
    floats = {"w": matrix(rng, *shape)}
    quantized = {"w": quantize_matrix(floats["w"])}

    def rest(iterations):
        lora = lora_with("loftq", alpha=alpha, loftq_iter=iterations)
        frozen, trainable = lora.start(quantized, key=0, weights=floats)
        assert isinstance(frozen["w"], QuantizedMatrix)
        assert (frozen["w"] is quantized["w"]) == (iterations == 1)
        return np.linalg.norm(total(lora, frozen, trainable) - np.asarray(floats["w"]))

    plain = np.linalg.norm(np.asarray(quantized["w"].dequantize() - floats["w"]))
    once = rest(1)
    assert once < plain
    # What is left after the first turn is what is beyond the largest singular values.
    error = np.asarray(floats["w"] - quantized["w"].dequantize(), np.float64)
    values = np.linalg.svd(error, compute_uv=False)[..., 3:]
    np.testing.assert_allclose(once, np.sqrt(np.sum(values**2)), rtol=1e-4)
    assert rest(3) < plain


def test_pissa_of_a_base_in_few_bits_stays_in_few_bits(rng):
    floats = {"w": matrix(rng, 64, 16)}
    quantized = {"w": quantize_matrix(floats["w"])}
    lora = lora_with("pissa")
    frozen, trainable = lora.start(quantized, key=0, weights=floats)
    assert frozen["w"].spec == quantized["w"].spec
    error = np.linalg.norm(total(lora, frozen, trainable) - np.asarray(floats["w"]))
    # What is rounded to 4 bits has lost its largest singular values.
    assert error < np.linalg.norm(np.asarray(quantized["w"].dequantize() - floats["w"]))
    alone, _ = lora.start(quantized, key=0)
    assert np.any(alone["w"].rows.codes != frozen["w"].rows.codes)


def test_starts_under_jit_and_as_shapes(rng):
    params = {"w": matrix(rng, 2, 6, 5)}
    lora = lora_with("pissa", use_dora=True)
    given = lora.start(params, key=0)
    shapes = jax.eval_shape(lambda params: lora.start(params, key=0), params)
    assert jax.tree.map(jnp.shape, given) == jax.tree.map(lambda x: x.shape, shapes)
    compiled = jax.jit(lambda params: lora.start(params, key=0))(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), given, compiled)


def test_impossible_starts_are_refused(rng):
    floats = {"w": matrix(rng, 4, 4)}
    quantized = {"w": quantize_matrix(floats["w"])}
    with pytest.raises(ValueError, match=r"'pissa' starts on another base .*lora\.start"):
        lora_with("pissa").init(floats, key=0)
    for params, weights in ((floats, floats), (quantized, None), (quantized, {"v": floats["w"]})):
        with pytest.raises(ValueError, match="needs 'w' in few bits and, as weights, the floats"):
            lora_with("loftq").start(params, key=0, weights=weights)
    with pytest.raises(ValueError, match=r"weights must have 'w' of shape \(4, 4\), got \(4, 5\)"):
        lora_with("loftq").start(quantized, key=0, weights={"w": jnp.ones((4, 5))})
