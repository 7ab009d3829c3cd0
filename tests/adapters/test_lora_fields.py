"""Which leaves have adapters, of which rank and scale; dropout; embeddings; impossible fields."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import adapters
from optax_lowbit.kernels.quantized_matrix import quantize_matrix

PARAMS = {
    "layers": {
        "query": {"kernel": jnp.ones((2, 4, 3)), "bias": jnp.ones((2, 3), jnp.bfloat16)},
        "norm": {"scale": jnp.ones((2, 4)), "bias": jnp.zeros((2, 4))},
    },
    "few_bits": quantize_matrix(jnp.ones((4, 4))),
    "embedding": {"embedding": jnp.ones((9, 4))},
    "head": {"kernel": jnp.ones((4, 9))},
    "count": jnp.int32(3),
    "nothing": None,
}


def paths(**fields):
    return set(adapters.LoRA(rank=2, **fields).init(PARAMS, key=0))


def test_all_linear_is_kernels_and_matrices_in_few_bits_but_for_the_head():
    layers = {"layers/query/kernel", "few_bits"}
    assert paths(targets="all-linear") == layers
    # What is excluded is what is said, then, and no more.
    assert paths(targets="all-linear", exclude="few") == {"layers/query/kernel", "head/kernel"}
    assert paths(targets="all-linear", exclude="^$") == layers | {"head/kernel"}
    assert paths(targets="kernel") == {"layers/query/kernel", "head/kernel"}


@pytest.mark.parametrize("name", ["head", "lm_head"])
def test_a_model_that_is_an_output_layer_alone_is_said_to_have_no_target(name):
    params = {name: {"kernel": jnp.ones((4, 9))}, "ahead": {"bias": jnp.ones(4)}}
    with pytest.raises(ValueError, match=r"but not exclude=.*\(lm_\)\?head.* there are"):
        adapters.LoRA(targets="all-linear").init(params, key=0)
    ahead = {"ahead": {"kernel": jnp.ones((4, 9))}}
    assert adapters.LoRA(targets="all-linear").init(ahead, key=0).keys() == {"ahead/kernel"}


def test_biases_and_whole_modules_train_themselves():
    adapted = {"layers/query/kernel"}
    fields = {"targets": "query/kernel"}
    assert paths(**fields, bias="lora_only") == adapted | {"layers/query/bias"}
    both = adapted | {"layers/query/bias", "layers/norm/bias"}
    assert paths(**fields, bias="all") == both
    assert paths(**fields, bias="all", modules_to_save="norm") == both | {"layers/norm/scale"}
    # What trains itself needs no adapters.
    lora = adapters.LoRA(rank=2, targets="kernel", modules_to_save="head")
    pairs = lora.init(PARAMS, key=0)
    assert pairs["head/kernel"].keys() == {"value"}


def test_values_are_float32_and_take_the_place_of_leaves_in_their_dtype():
    lora = adapters.LoRA(rank=2, targets="query/kernel", bias="lora_only")
    pairs = lora.init(PARAMS, key=0)
    assert pairs["layers/query/bias"]["value"].dtype == jnp.float32
    pairs["layers/query/bias"] = {"value": jnp.full((2, 3), 1 + 2**-20)}
    for tree in (lora.attach(PARAMS, pairs), lora.merge(PARAMS, pairs)):
        bias = tree["layers"]["query"]["bias"]
        assert bias.dtype == jnp.bfloat16 and np.all(np.asarray(bias, np.float32) == 1)
    gradient = jax.grad(lambda v: jnp.sum(lora.attach(PARAMS, v)["layers"]["query"]["bias"]))(pairs)
    np.testing.assert_array_equal(gradient["layers/query/bias"]["value"], np.ones((2, 3)))


def test_patterns_of_ranks_and_scales():
    lora = adapters.LoRA(
        rank=4,
        alpha=8.0,
        targets="kernel",
        rank_pattern={"query": 2, "head|query": 16},
        alpha_pattern={"head": 32.0},
    )
    shapes = {path: pair["a"].shape for path, pair in lora.init(PARAMS, key=0).items()}
    assert shapes == {"layers/query/kernel": (2, 2, 4), "head/kernel": (16, 4)}
    assert lora.scale_of("layers/query/kernel") == 4 and lora.scale_of("head/kernel") == 2
    assert lora.scale_of("other") == 2 and lora.rank_of("other") == 4
    stable = adapters.LoRA(rank=4, alpha=8.0, targets="kernel", use_rslora=True)
    assert stable.scale_of("head/kernel") == 4
    tree = stable.attach(PARAMS, stable.init(PARAMS, key=0))
    assert tree["head"]["kernel"].scale == 4


def test_mappings_become_hashable():
    lora = adapters.LoRA(targets="w", rank_pattern={"a": 2}, kernel_axes={"b": (1, 2)})
    assert hash(lora) == hash(
        adapters.LoRA(targets="w", rank_pattern=(("a", 2),), kernel_axes=(("b", (1, 2)),))
    )


def test_kernels_of_several_axes(rng):
    params = {"out": jnp.asarray(rng.normal(size=(2, 3, 5, 4)), jnp.float32)}
    lora = adapters.LoRA(rank=2, alpha=2.0, targets="out", kernel_axes={"out": (2, 1)})
    pairs = lora.init(params, key=0)
    assert pairs["out"]["a"].shape == (2, 2, 15) and pairs["out"]["b"].shape == (2, 2, 4)
    pairs["out"]["b"] = jnp.asarray(rng.normal(size=(2, 2, 4)), jnp.float32)
    merged = lora.merge(params, pairs)["out"]
    added = np.swapaxes(pairs["out"]["a"], 1, 2) @ np.asarray(pairs["out"]["b"])
    expected = np.asarray(params["out"]) + added.reshape(2, 3, 5, 4)
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-5)
    x = jnp.asarray(rng.normal(size=(6, 15)), jnp.float32)
    _, results = jax.lax.scan(lambda _, w: (None, x @ w), None, lora.attach(params, pairs)["out"])
    expected = np.asarray(x) @ expected.reshape(2, 15, 4)
    np.testing.assert_allclose(results, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True])
def test_tables_are_looked_up_and_multiplied_with_their_transpose(use_dora, rng):
    table = jnp.asarray(rng.normal(size=(9, 4)), jnp.float32)
    lora = adapters.LoRA(rank=2, alpha=4.0, targets="embedding", use_dora=use_dora)
    params = {"embedding": table}
    pairs = lora.init(params, key=0)
    tokens, x = jnp.asarray([[1, 8], [0, 1]]), jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    tree = lora.attach(params, pairs)["embedding"]
    np.testing.assert_array_equal(tree[tokens], table[tokens])
    np.testing.assert_array_equal(x @ tree.T, x @ table.T)
    pairs = jax.tree.map(lambda v: v + jnp.asarray(rng.normal(size=v.shape), v.dtype), pairs)
    merged = lora.merge(params, pairs)["embedding"]
    tree = lora.attach(params, pairs)["embedding"]
    np.testing.assert_allclose(tree[tokens], merged[tokens], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(x @ tree.mT, x @ merged.T, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match=r"w\[indices\] needs integers .* got float32"):
        tree[x]


def test_dropout_has_a_mask_of_its_own_for_each_key_and_layer():
    # What is added is x, dropped out.
    lora = adapters.LoRA(rank=8, alpha=8.0, targets="w", dropout=0.25)
    params = {"w": jnp.zeros((2, 8, 8)), "v": {"w": jnp.zeros((8, 8))}}
    eye = {"a": jnp.eye(8), "b": jnp.eye(8)}
    pairs = {"w": jax.tree.map(lambda x: jnp.stack([x, x]), eye), "v/w": eye}
    x = jnp.ones((300, 8))

    @jax.jit
    def run(key):
        tree = lora.attach(params, pairs, key=key)
        _, stacked = jax.lax.scan(lambda _, w: (None, x @ w), None, tree["w"])
        return jnp.concatenate([stacked, (x @ tree["v"]["w"])[None]])

    np.testing.assert_array_equal(run(None), np.ones((3, 300, 8)))
    first, again, other = (np.asarray(run(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    masks = [*first, *other]
    for mask in masks:
        assert set(np.unique(mask)) == {0.0, np.float32(1 / 0.75)}
        # A binomial count of 2400 of chance 1/4 has a deviation of 21.
        assert abs(np.sum(mask == 0) - 600) < 100
    assert all(np.any(masks[i] != masks[j]) for i in range(6) for j in range(i))


def test_a_stack_is_no_matrix():
    lora = adapters.LoRA(rank=2, targets="query/kernel")
    stack = lora.attach(PARAMS, lora.init(PARAMS, key=0))["layers"]["query"]["kernel"]
    with pytest.raises(TypeError, match=r"w is a stack \(2, 4, 3\): use jax\.lax\.scan"):
        jnp.ones((5, 4)) @ stack


@pytest.mark.parametrize(
    ("error", "fields", "message"),
    [
        (TypeError, {"exclude": 3}, "exclude must be a regular expression, got 3"),
        (ValueError, {"modules_to_save": "("}, r"modules_to_save='\(' is no regular expression"),
        (TypeError, {"embeddings": None}, "embeddings must be a regular expression"),
        (TypeError, {"use_dora": 1}, "use_dora must be a bool, got 1"),
        (TypeError, {"use_rslora": None}, "use_rslora must be a bool, got None"),
        (ValueError, {"dropout": 1.0}, r"dropout must be a number from 0 to below 1, got 1\.0"),
        (ValueError, {"dropout": "0"}, "dropout must be a number from 0 to below 1, got '0'"),
        (ValueError, {"bias": "some"}, "bias must be one of none, all, lora_only, got 'some'"),
        (ValueError, {"init_lora_weights": "eva"}, "init_lora_weights must be one of default, .*"),
        (ValueError, {"init_lora_weights": "pissa_niter_"}, "or pissa_niter_N, got 'pissa_niter"),
        (ValueError, {"loftq_iter": 0}, "loftq_iter must be an int of at least 1, got 0"),
        (TypeError, {"rank_pattern": 3}, "rank_pattern must be a mapping from regular express"),
        (ValueError, {"rank_pattern": {"a": 0}}, r"rank_pattern\['a'\] must be an int of at least"),
        (ValueError, {"alpha_pattern": {"a": -1}}, r"alpha_pattern\['a'\] must be a finite number"),
        (ValueError, {"kernel_axes": {"a": (1,)}}, r"kernel_axes\['a'\] must be two ints of at"),
        (TypeError, {"kernel_axes": {3: (1, 2)}}, "kernel_axes must be a regular expression"),
    ],
)
def test_impossible_fields_are_refused(error, fields, message):
    with pytest.raises(error, match=message):
        adapters.LoRA(targets="w", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exclude": "query"}, "must be found, but not exclude='query', in the path"),
        ({"rank_pattern": {"head": 2}}, "rank_pattern has 'head', which must be found in the path"),
        ({"alpha_pattern": {"x": 2}}, r"alpha_pattern has 'x', .* \['layers/query/kernel'\]"),
        ({"modules_to_save": "tail"}, "modules_to_save='tail' must be found in the path of a leaf"),
        ({"modules_to_save": "count"}, "'count' can't train: it must have floats"),
        ({"modules_to_save": "few"}, "'few_bits' can't train: .* is QuantizedMatrix of float32"),
        ({"kernel_axes": {"query": (2, 2)}}, r"kernel_axes must fit .*, got \(2, 2\) for .*4, 3\)"),
    ],
)
def test_fields_that_do_not_fit_the_tree_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        paths(targets="query/kernel", **fields)


def test_trees_that_do_not_fit_are_refused():
    lora = adapters.LoRA(rank=2, targets="w", bias="all")
    with pytest.raises(ValueError, match="bias='all' needs a leaf named bias"):
        lora.init({"w": jnp.ones((2, 2))}, key=0)
    params = {"w": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    pairs = lora.init(params, key=0)
    with pytest.raises(
        ValueError, match=r"adapters\['bias'\] has a value of shape \(2,\), .*\(3,\)"
    ):
        lora.attach(params | {"bias": jnp.ones(3)}, pairs)
    with pytest.raises(TypeError, match="key must be a jax"):
        lora.attach(params, pairs, key="dropout")
