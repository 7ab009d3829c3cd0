"""Adapters in Flax NNX models: every layer and option, against the tree's adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from optax_lowbit import adapters
from optax_lowbit.adapters.nnx_layers import LoRAEmbed, LoRALinear
from optax_lowbit.kernels.quantized_matrix import QuantizedMatrix, quantize_matrix

TOKENS = jnp.asarray([[1, 4, 0], [2, 2, 10]])


class Model(nnx.Module):
    """An embedding that is also the output layer, attention over heads, a linear layer."""

    def __init__(self, rngs):
        self.embedding = nnx.Embed(11, 6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.up = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        return self.embedding.attend(self.norm(x + self.up(self.attention(x))))


class FewBits(nnx.Linear):
    """What a layer with a kernel in few bits is to adapters."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, rngs=nnx.Rngs(0))
        self.kernel = nnx.Variable(quantize_matrix(layer.kernel.get_value()))
        self.bias = nnx.Variable(layer.bias.get_value())

    def __call__(self, x):
        return x @ self.kernel.get_value() + self.bias.get_value()[None]

    def dequantized(self):
        layer = nnx.Linear(self.in_features, self.out_features, rngs=nnx.Rngs(0))
        layer.kernel.set_value(self.kernel.get_value().dequantize())
        layer.bias.set_value(self.bias.get_value())
        return layer


@pytest.fixture(scope="module")
def model():
    return Model(nnx.Rngs(0))


@pytest.fixture(scope="module")
def before(model):
    return np.asarray(model(TOKENS))


def move(lora, model, seed=3, size=0.1):
    """The model with no adapter where it was."""
    generator = np.random.default_rng(seed)
    lora.update(
        model,
        jax.tree.map(
            lambda x: x + jnp.asarray(generator.normal(size=x.shape) * size, x.dtype),
            lora.extract(model),
        ),
    )
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_dora": True},
        {"dropout": 0.5},
        {"bias": "all", "modules_to_save": "norm/scale"},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_every_layer_starts_as_it_was_and_merges_to_what_it_is(fields, model, before):
    lora = adapters.LoRA(rank=2, alpha=3.0, targets="kernel|embedding", **fields)
    wrapped = lora.wrap(model, key=0)
    assert isinstance(wrapped.embedding, LoRAEmbed)
    assert isinstance(wrapped.attention.out, LoRALinear)
    if "init_lora_weights" in fields:
        np.testing.assert_allclose(wrapped(TOKENS), before, atol=1e-5)
    else:
        np.testing.assert_array_equal(wrapped(TOKENS), before)
    after = move(lora, wrapped)(TOKENS)
    assert np.abs(after - before).max() > 0.01
    plain = lora.unwrap(wrapped)
    np.testing.assert_allclose(plain(TOKENS), after, rtol=1e-4, atol=1e-5)
    assert str(nnx.graphdef(plain)) == str(nnx.graphdef(model))
    np.testing.assert_array_equal(model(TOKENS), before)


def test_unmerged_model_is_the_base_within_its_rounding(model):
    """Float32 sums and differences of numbers below 8: a few units of 2^-21."""
    lora = adapters.LoRA(rank=2, alpha=3.0, targets="kernel|embedding")
    wrapped = move(lora, lora.wrap(model, key=0))
    merged = lora.unwrap(wrapped)
    base = lora.unmerged(merged, lora.extract(wrapped))
    assert str(nnx.graphdef(base)) == str(nnx.graphdef(model))
    moved_by = jax.tree.map(
        lambda x, y: float(jnp.abs(x - y).max()), *map(nnx.state, (merged, model))
    )
    left = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), *map(nnx.state, (base, model)))
    assert max(jax.tree.leaves(moved_by)) > 0.01
    assert max(jax.tree.leaves(left)) < 4 * 2.0**-21


def test_a_mixture_is_taken_out_of_what_it_was_merged_into(model):
    lora = adapters.LoRA(rank=2, targets="kernel|embedding")
    wrapped = move(lora, lora.wrap(model, key=0))
    pairs = lora.extract(wrapped)
    lora.update(wrapped, adapters.mix({"one": pairs, "two": pairs}, {"one": 1.0, "two": -0.5}))
    base = lora.unmerged(lora.unwrap(wrapped), lora.extract(wrapped))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=4 * 2.0**-21),
        *map(nnx.state, (base, model)),
    )


def test_what_was_written_over_or_is_of_no_layer_cannot_be_unmerged(model):
    lora = adapters.LoRA(rank=2, targets="up/kernel", bias="lora_only")
    wrapped = lora.wrap(model, key=0)
    with pytest.raises(ValueError, match=r"'up/bias'\] has a value, which merging wrote over"):
        lora.unmerged(lora.unwrap(wrapped), lora.extract(wrapped))
    pair = lora.extract(wrapped)["up/kernel"]
    with pytest.raises(ValueError, match=r"the model, which has no \['down/kernel'\]"):
        lora.unmerged(model, {"down/kernel": pair})
    with pytest.raises(ValueError, match=r"adapters\['up/kernel'\] must have shapes"):
        lora.unmerged(model, {"up/kernel": {"a": pair["a"], "b": pair["b"][:1]}})
    few_bits = nnx.recursive_map(
        lambda path, node: FewBits(node) if path == ("up",) else node, model
    )
    with pytest.raises(ValueError, match="params must be merged, and 'up/kernel' is in few bits"):
        lora.unmerged(few_bits, {"up/kernel": pair})


def test_all_linear_takes_no_table_and_exclude_takes_away(model):
    lora = adapters.LoRA(rank=2, targets="all-linear", exclude="attention/(query|key)")
    assert lora.extract(lora.wrap(model, key=0)).keys() == {
        "attention/out/kernel",
        "attention/value/kernel",
        "up/kernel",
    }


def test_what_is_extracted_is_what_a_tree_has(model):
    lora = adapters.LoRA(
        rank=2,
        targets="up|out|embedding",
        exclude="bias",
        bias="lora_only",
        use_dora=True,
        kernel_axes={"out/kernel": (2, 1)},
    )
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    expected, result = lora.init(params, key=4), lora.extract(lora.wrap(model, key=4))
    assert result.keys() == expected.keys() > {"up/bias", "attention/out/bias"}
    assert "norm/bias" not in result
    assert result["attention/out/kernel"]["a"].shape == (2, 6)
    for path, entry in expected.items():
        assert result[path].keys() == entry.keys()
        for name in entry:
            np.testing.assert_allclose(result[path][name], entry[name], rtol=1e-6)


def test_only_what_trains_is_a_lora_param(model):
    lora = adapters.LoRA(rank=2, targets="up/kernel", bias="lora_only", modules_to_save="norm")
    wrapped = lora.wrap(model, key=0)

    def loss(model):
        return jnp.mean(jnp.square(model(TOKENS)))

    gradients = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(wrapped)
    assert nnx.to_pure_dict(jax.tree.map(jnp.shape, gradients)) == {
        "norm": {"bias": (6,), "scale": (6,)},
        "up": {"base": {"bias": (6,)}, "lora_a": (2, 6), "lora_b": (2, 6)},
    }
    assert isinstance(model.up.bias, nnx.Param) and not isinstance(model.up.bias, nnx.LoRAParam)
    move(lora, wrapped)
    np.testing.assert_array_equal(model.up.bias[...], np.zeros(6))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_biases_train_in_float32_where_the_layer_computes_in_its_own_dtype(dtype):
    base = nnx.Linear(4, 3, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=jnp.bfloat16)
    lora = adapters.LoRA(rank=2, targets="kernel", bias="all")
    layer = lora.wrap(base, key=0)
    assert layer.base.bias.dtype == (jnp.bfloat16 if dtype is None else jnp.float32)
    assert lora.extract(layer)["bias"]["value"].dtype == jnp.float32
    assert layer(jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.bfloat16
    assert lora.unwrap(layer).bias.dtype == jnp.bfloat16


def test_dropout_is_off_until_training_and_differs_between_calls_and_layers():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.split_rngs(splits=2)(
                nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs))
            )(rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
            def run(x, layer):
                return x, layer(x)

            return run(x, self.layers)[1]

    lora = adapters.LoRA(rank=8, alpha=8.0, targets="kernel", dropout=0.25)
    model = lora.wrap(Stack(nnx.Rngs(0)), key=0)
    # What is added is x, dropped out.
    eye = jnp.broadcast_to(jnp.eye(8), (2, 8, 8))
    lora.update(model, {"layers/kernel": {"a": eye, "b": eye}})
    x = jnp.ones((300, 8))
    run = nnx.jit(lambda model: model(x))
    base = model(x) - 1
    model.train()
    first, second = (np.asarray(run(model) - base) for _ in range(2))
    model.eval()
    np.testing.assert_allclose(model(x) - base, 1, atol=1e-6)
    for masks in (first, second):
        assert np.all(np.isclose(masks, 0, atol=1e-5) | np.isclose(masks, 1 / 0.75, atol=1e-5))
        # A binomial count of 2400 of chance 1/4 has a deviation of 21.
        assert np.all(np.abs(np.sum(masks < 0.5, axis=(1, 2)) - 600) < 100)
        assert np.any(masks[0] != masks[1])
    assert np.any(first != second)


def test_base_in_few_bits_merges_to_floats_or_to_few_bits(rng):
    plain = nnx.Linear(64, 5, rngs=nnx.Rngs(0))
    base, x = FewBits(plain), jnp.asarray(rng.normal(size=(3, 64)), jnp.float32)
    lora = adapters.LoRA(rank=2, targets="all-linear", use_dora=True)
    wrapped = move(lora, lora.wrap(base, key=0))
    merged = lora.unwrap(wrapped)
    assert type(merged) is nnx.Linear
    np.testing.assert_allclose(merged(x), wrapped(x), rtol=1e-4, atol=1e-4)
    again, errors = lora.requantized(wrapped)
    assert type(again) is FewBits and isinstance(again.kernel.get_value(), QuantizedMatrix)
    kernel = merged.kernel[...]
    lost = jnp.linalg.norm(again.kernel.get_value().dequantize() - kernel)
    np.testing.assert_allclose(errors["kernel"], lost / jnp.linalg.norm(kernel), rtol=1e-5)
    np.testing.assert_array_equal(
        wrapped.base.kernel.get_value().rows.codes, base.kernel.get_value().rows.codes
    )


def test_loftq_of_a_model_is_that_of_its_tree():
    plain = nnx.Linear(64, 5, rngs=nnx.Rngs(0))
    base = FewBits(plain)
    lora = adapters.LoRA(rank=2, targets="all-linear", init_lora_weights="loftq", loftq_iter=2)
    wrapped = lora.wrap(base, key=0, weights=plain)
    frozen, pairs = lora.start(
        {"kernel": base.kernel.get_value()}, key=0, weights={"kernel": plain.kernel[...]}
    )
    np.testing.assert_array_equal(
        wrapped.base.kernel.get_value().rows.codes, frozen["kernel"].rows.codes
    )
    np.testing.assert_array_equal(wrapped.lora_a[...], pairs["kernel"]["a"])
    assert base.kernel.get_value() is not wrapped.base.kernel.get_value()
    with pytest.raises(ValueError, match="'loftq' needs 'kernel' in few bits"):
        lora.wrap(plain, key=0)


def test_adapters_of_other_tasks_and_mixtures_go_into_a_model(model, before):
    lora = adapters.LoRA(rank=2, targets="up/kernel")
    wrapped = lora.wrap(model, key=0)
    tasks = {name: lora.extract(move(lora, wrapped, seed)) for seed, name in enumerate("ab")}
    outputs = {}
    for name in tasks:
        lora.update(wrapped, tasks[name])
        outputs[name] = np.asarray(wrapped(TOKENS))
    assert np.abs(outputs["a"] - outputs["b"]).max() > 1e-3
    for weights, expected in (({"a": 1.0}, outputs["a"]), ({"b": 1.0}, outputs["b"]), ({}, before)):
        lora.update(wrapped, adapters.mix(tasks, weights))
        np.testing.assert_allclose(wrapped(TOKENS), expected, atol=1e-6)
    lora.update(wrapped, adapters.mix(tasks, {"a": 1.0}))
    lora.update(wrapped, lora.extract(wrapped))
    np.testing.assert_allclose(wrapped(TOKENS), outputs["a"], atol=1e-6)
    lora.update(wrapped, tasks["b"])
    np.testing.assert_allclose(wrapped(TOKENS), outputs["b"], atol=1e-6)


def test_impossible_adapters_of_a_model_are_refused(model):
    lora = adapters.LoRA(rank=2, targets="up/kernel", modules_to_save="norm/scale")
    wrapped = lora.wrap(model, key=0)
    given = lora.extract(wrapped)
    with pytest.raises(ValueError, match=r"adapters must be of \['norm/scale', 'up/kernel'\]"):
        lora.update(wrapped, {"up/kernel": given["up/kernel"]})
    with pytest.raises(ValueError, match=r"must have shapes .* the rank is 2"):
        lora.update(wrapped, given | {"up/kernel": {"a": jnp.ones((3, 6)), "b": jnp.ones((3, 6))}})
    with pytest.raises(ValueError, match=r"must have a value of shape \(6,\), got .*\(7,\)"):
        lora.update(wrapped, given | {"norm/scale": {"value": jnp.ones(7)}})
