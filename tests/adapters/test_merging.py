"""DoRA, merging, re-quantizing, unmerging, several adapters: against formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import adapters
from optax_lowbit.adapters.dora import column_norms
from optax_lowbit.kernels.quantized_matrix import QuantizedMatrix, quantize_matrix

LORA = adapters.LoRA(rank=3, alpha=6.0, targets="w")
DORA = adapters.LoRA(rank=3, alpha=6.0, targets="w", use_dora=True)


def exact(base, pair, scale=2.0):
    """The adapted matrix in float64, with DoRA if there is a magnitude."""
    base = base.dequantize() if isinstance(base, QuantizedMatrix) else base
    a, b = (np.asarray(pair[side], np.float64) for side in "ab")
    w = np.asarray(base, np.float64) + scale * np.swapaxes(a, -1, -2) @ b
    if "magnitude" in pair:
        w *= np.asarray(pair["magnitude"])[..., None, :] / np.linalg.norm(w, axis=-2)[..., None, :]
    return w


def moved(pairs, seed=1):
    leaves, treedef = jax.tree.flatten(pairs)
    generator = np.random.default_rng(seed)
    return treedef.unflatten(
        x + jnp.asarray(generator.normal(size=x.shape), x.dtype) for x in leaves
    )


@pytest.fixture
def w(rng):
    return jnp.asarray(rng.normal(size=(9, 7)), jnp.float32)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(5, 9)), jnp.float32)


@pytest.mark.parametrize("lora", [LORA, DORA])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_attached_and_merged_are_the_formula(lora, is_quantized, w, x):
    params = {"w": quantize_matrix(w) if is_quantized else w}
    pairs = moved(lora.init(params, key=0))
    merged = lora.merge(params, pairs)["w"]
    assert isinstance(merged, jax.Array) and merged.dtype == jnp.float32
    expected = exact(params["w"], pairs["w"])
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-5)
    result = x @ lora.attach(params, pairs)["w"]
    np.testing.assert_allclose(result, np.asarray(x) @ expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_quantized", [False, True])
def test_dora_starts_as_the_model_bit_for_bit(is_quantized, w, x):
    # The last column is zero, and has no direction.
    w = w.at[:, -1].set(0)
    params = {"w": quantize_matrix(w) if is_quantized else w}
    pairs = DORA.init(params, key=0)
    assert np.all(np.isfinite(pairs["w"]["magnitude"]))
    result = x @ DORA.attach(params, pairs)["w"]
    np.testing.assert_array_equal(result, x @ params["w"])


def test_norms_are_those_of_the_columns_of_the_sum(rng, w):
    pair = {"a": jnp.asarray(rng.normal(size=(3, 9)), jnp.float32)}
    pair["b"] = jnp.asarray(rng.normal(size=(3, 7)), jnp.float32)
    expected = np.linalg.norm(exact(w, pair, 0.5), axis=0)
    np.testing.assert_allclose(column_norms(w, pair["a"], pair["b"], 0.5), expected, rtol=1e-5)


def test_gradient_of_dora_takes_the_norm_as_a_constant(w, x):
    pairs = moved(DORA.init({"w": w}, key=0))
    a, b = (pairs["w"][side] for side in "ab")
    norms = jnp.linalg.norm(w + 2 * a.T @ b, axis=0)

    def reference(pairs):
        a, b, magnitude = (pairs["w"][name] for name in ("a", "b", "magnitude"))
        return jnp.sum(jnp.sin(x @ (w + 2 * a.T @ b) * (magnitude / norms)[None]))

    def ours(pairs):
        return jnp.sum(jnp.sin(x @ DORA.attach({"w": w}, pairs)["w"]))

    expected, result = (jax.jit(jax.grad(fun))(pairs) for fun in (reference, ours))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), result, expected
    )


@pytest.mark.parametrize("lora", [LORA, DORA])
def test_stack_in_few_bits_under_scan(lora, rng):
    stack = quantize_matrix(jnp.asarray(rng.normal(size=(3, 8, 8)) / 3, jnp.float32))
    pairs = moved(lora.init({"w": stack}, key=0))
    x = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)

    def layer(x, w):
        return jnp.tanh(x @ w), None

    result, _ = jax.lax.scan(layer, x, lora.attach({"w": stack}, pairs)["w"])
    expected = np.asarray(x, np.float64)
    for w in exact(stack, pairs["w"]):
        expected = np.tanh(expected @ w)
    np.testing.assert_allclose(result, expected, atol=1e-4)


def test_gradients_are_of_adapters_alone(w, x):
    params = {"w": quantize_matrix(w)}
    pairs = moved(LORA.init(params, key=0))

    def loss(pairs, params):
        return jnp.sum(jnp.square(x @ LORA.attach(params, pairs)["w"]))

    def reference(pairs):
        a, b = pairs["w"]["a"], pairs["w"]["b"]
        return jnp.sum(jnp.square(x @ (params["w"].dequantize() + 2 * a.T @ b)))

    result = jax.jit(jax.grad(loss))(pairs, params)
    assert jax.tree.structure(result) == jax.tree.structure(pairs)
    expected = jax.jit(jax.grad(reference))(pairs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3), result, expected)


def test_requantized_keeps_its_spec_and_tells_its_error(w):
    params = {"w": quantize_matrix(w), "plain": {"w": w}}
    pairs = moved(LORA.init(params, key=0))
    tree, errors = LORA.requantize(params, pairs)
    assert tree["w"].spec == params["w"].spec and errors.keys() == {"w"}
    expected = exact(params["w"], pairs["w"])
    lost = np.linalg.norm(np.asarray(tree["w"].dequantize()) - expected)
    np.testing.assert_allclose(errors["w"], lost / np.linalg.norm(expected), rtol=1e-4)
    np.testing.assert_array_equal(tree["plain"]["w"], LORA.merge(params, pairs)["plain"]["w"])


def test_requantizing_zeros_loses_nothing():
    params = {"w": quantize_matrix(jnp.zeros((4, 4)))}
    _, errors = LORA.requantize(params, LORA.init(params, key=0))
    assert float(errors["w"]) == 0


def test_unmerged_is_the_base_bit_for_bit_where_sums_are_exact(rng):
    params = {"w": jnp.asarray(rng.integers(-9, 9, size=(9, 7)), jnp.float32)}
    pairs = LORA.init(params, key=0)
    pairs = jax.tree.map(lambda x: jnp.asarray(rng.integers(-3, 3, x.shape), x.dtype), pairs)
    merged = LORA.merge(params, pairs)
    assert np.any(merged["w"] != params["w"])
    np.testing.assert_array_equal(LORA.unmerge(merged, pairs)["w"], params["w"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_unmerged_is_the_base_within_its_rounding(dtype, w):
    params = {"w": w.astype(dtype)}
    pairs = moved(LORA.init(params, key=0))
    merged = LORA.merge(params, pairs)
    result = np.asarray(LORA.unmerge(merged, pairs)["w"], np.float64)
    sizes = np.abs(np.asarray(merged["w"], np.float64)) + np.abs(result)
    # Half a unit in the last place of each, and the products' own errors in float32.
    bound = float(jnp.finfo(dtype).eps) * sizes + 1e-5
    assert np.all(np.abs(result - np.asarray(params["w"], np.float64)) <= bound)


def test_what_merging_wrote_over_cannot_be_unmerged(w):
    params = {"w": w, "bias": jnp.ones(7)}
    with pytest.raises(ValueError, match="has a magnitude, which merging wrote over"):
        DORA.unmerge(params, DORA.init(params, key=0))
    lora = adapters.LoRA(rank=3, targets="w", bias="all")
    with pytest.raises(ValueError, match=r"'bias'\] has a value, which merging wrote over"):
        lora.unmerge(params, {"bias": {"value": jnp.ones(7)}})
    params = {"w": quantize_matrix(w)}
    with pytest.raises(ValueError, match="params must be merged, and 'w' is in few bits"):
        LORA.unmerge(params, LORA.init(params, key=0))


def test_mixture_is_the_weighted_sum_without_new_programs(rng, w, x):
    params = {"w": w, "stack": {"w": jnp.asarray(rng.normal(size=(2, 9, 9)), jnp.float32)}}
    tasks = {name: moved(LORA.init(params, key=0), seed) for seed, name in enumerate("abc")}
    del tasks["c"]["stack/w"]

    traced = []

    @jax.jit
    def model(weights):
        traced.append(weights)
        tree = LORA.attach(params, adapters.mix(tasks, weights))
        y, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, tree["stack"]["w"])
        return y @ tree["w"], LORA.merge(params, adapters.mix(tasks, weights))["w"]

    for weights in ([1, 0, 0], [0, 0, 1], [0, 0, 0], [0.5, -2, 1]):
        weights = dict(zip("abc", map(float, weights), strict=True))
        result, merged = model(weights)
        sums = {}
        for path, base in (("w", w), ("stack/w", params["stack"]["w"])):
            plain = np.asarray(base, np.float64)
            sums[path] = plain + sum(
                weights[name] * (exact(base, tree[path]) - plain)
                for name, tree in tasks.items()
                if path in tree
            )
        expected = np.asarray(x) @ sums["stack/w"][0] @ sums["stack/w"][1] @ sums["w"]
        np.testing.assert_allclose(merged, sums["w"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-2)
    assert len(traced) == 1


def test_mixture_of_values_weighs_what_they_moved(w):
    lora = adapters.LoRA(rank=3, targets="w", modules_to_save="bias")
    params = {"w": w, "bias": jnp.asarray([1, 2], jnp.bfloat16)}
    start = lora.init(params, key=0)
    assert start["bias"]["value"].dtype == jnp.float32
    other = start | {"bias": {"value": jnp.float32([5, 0])}}
    tasks = {"start": start, "other": other}
    for weight, expected in ((0.0, [1, 2]), (1.0, [5, 0]), (0.5, [3, 1])):
        result = lora.attach(params, adapters.mix(tasks, {"other": weight}))["bias"]
        assert result.dtype == jnp.bfloat16
        np.testing.assert_array_equal(result.astype(jnp.float32), expected)


def test_impossible_mixtures_are_refused(w):
    pairs = LORA.init({"w": w}, key=0)
    with pytest.raises(ValueError, match="adapters must have at least one tree"):
        adapters.mix({}, {})
    with pytest.raises(ValueError, match=r"weights must be of adapters \['a'\], got \['b'\]"):
        adapters.mix({"a": pairs}, {"b": 1.0})
    larger = adapters.LoRA(rank=4, targets="w").init({"w": w}, key=0)
    with pytest.raises(ValueError, match="adapters must be of one LoRA, and at 'w' shapes are"):
        adapters.mix({"a": pairs, "b": larger}, {"a": 1.0})
    with pytest.raises(ValueError, match=r"have .*'magnitude'.*of which there is no sum"):
        adapters.mix({"a": DORA.init({"w": w}, key=0)}, {"a": 1.0})
    with pytest.raises(ValueError, match=r"must have shapes .*'weights': \(1,\).* rank is 3"):
        LORA.attach({"w": w}, adapters.mix({"b": larger}, {"b": 1.0}))
