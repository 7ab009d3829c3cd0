"""Prompts and prefixes in NNX models: real tokens in front give the same, by definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_lowbit
from optax_lowbit import adapters, qlora
from optax_lowbit.adapters.virtual_tokens import random_tokens

TOKENS = jnp.asarray([[1, 4, 0, 9], [2, 2, 10, 3]])
PROMPT, PREFIX = adapters.Prompt(num_tokens=3), adapters.Prefix(num_tokens=3)


class Model(nnx.Module):
    """Two layers of causal attention with fewer heads of keys than of queries."""

    def __init__(self, rngs):
        self.embedding = nnx.Embed(11, 8, rngs=rngs)
        self.layers = nnx.List(
            nnx.MultiHeadAttention(4, 8, num_kv_heads=2, decode=False, rngs=rngs) for _ in range(2)
        )

    def __call__(self, tokens, **kwargs):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x, **kwargs)
        return self.embedding.attend(x)


class Stacked(nnx.Module):
    """The same with layers that are stacked and scanned."""

    def __init__(self, rngs):
        @nnx.vmap(in_axes=0, out_axes=0)
        def layers(rngs):
            return nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

        self.embedding = nnx.Embed(11, 8, rngs=rngs)
        self.layers = layers(rngs.split(2))

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, layer):
            return x + layer(x, is_causal=True)

        return through(self.embedding(tokens), self.layers)


@pytest.fixture(scope="module")
def model():
    return Model(nnx.Rngs(0))


def causal(model, tokens):
    return model(tokens, is_causal=True)


def in_front(key):
    """Each line of `TOKENS` after the random tokens that an adapter starts as."""
    rows = jnp.broadcast_to(random_tokens(3, 11, key)[None], (2, 3))
    return jnp.concatenate([rows, TOKENS], axis=1)


def test_prompt_is_tokens_in_front(model):
    prompted = PROMPT.wrap(model, key=5)
    np.testing.assert_allclose(
        causal(prompted, TOKENS), causal(model, in_front(5)), rtol=1e-6, atol=1e-6
    )
    plain = PROMPT.unwrap(prompted)
    np.testing.assert_array_equal(causal(plain, TOKENS), causal(model, TOKENS))
    assert str(nnx.graphdef(plain)) == str(nnx.graphdef(model))


@pytest.mark.parametrize("has_mask", [False, True])
def test_prefix_is_keys_and_values_of_tokens_in_front(model, has_mask):
    prefixed = PREFIX.wrap(model, 5, vocabulary_size=11, call=causal)
    mask = jnp.tri(4, dtype=bool)[None, None] if has_mask else None
    found = prefixed(TOKENS, mask=mask) if has_mask else causal(prefixed, TOKENS)
    expected = causal(model, in_front(5))[:, 3:]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    shapes = jax.tree.map(jnp.shape, PREFIX.extract(prefixed))
    assert shapes == {f"layers/{i}": {"keys": (3, 2, 2), "values": (3, 2, 2)} for i in range(2)}
    plain = PREFIX.unwrap(prefixed)
    np.testing.assert_array_equal(causal(plain, TOKENS), causal(model, TOKENS))
    assert str(nnx.graphdef(plain)) == str(nnx.graphdef(model))


def test_prefix_of_every_query_without_a_mask(model):
    """An encoder, whose real tokens do not change what stands in front of them."""
    prefixed = PREFIX.wrap(model, 5, vocabulary_size=11)
    found, swapped = prefixed(TOKENS), prefixed(TOKENS[:, ::-1])
    np.testing.assert_allclose(found, swapped[:, ::-1], rtol=1e-5, atol=1e-5)
    assert np.abs(found - model(TOKENS)).max() > 1e-3


def test_prefix_of_stacked_layers():
    model = Stacked(nnx.Rngs(1))
    prefixed = PREFIX.wrap(model, 5, vocabulary_size=11)
    shapes = jax.tree.map(jnp.shape, PREFIX.extract(prefixed))
    assert shapes == {"layers": {"keys": (2, 3, 2, 4), "values": (2, 3, 2, 4)}}
    np.testing.assert_allclose(prefixed(TOKENS), model(in_front(5))[:, 3:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_only_it_trains_and_another_takes_its_place(model, name):
    if name == "prompt":
        scheme, wrapped = PROMPT, PROMPT.wrap(model, 0)
    else:
        scheme, wrapped = PREFIX, PREFIX.wrap(model, 0, vocabulary_size=11)
    before = nnx.state(wrapped, nnx.Not(nnx.LoRAParam))
    start = scheme.extract(wrapped)
    optimizer = nnx.Optimizer(wrapped, optax_lowbit.adamw4bit(3e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = causal(model, TOKENS)[:, -3:]
            return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, gradients)
        return value

    losses = [step(wrapped, optimizer) for _ in range(20)]
    assert losses[-1] < losses[0] - 0.1
    after = nnx.state(wrapped, nnx.Not(nnx.LoRAParam))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    scheme.update(wrapped, start)
    jax.tree.map(np.testing.assert_array_equal, scheme.extract(wrapped), start)


def test_with_low_rank_adapters(model):
    lora = adapters.LoRA(rank=2, targets="kernel|embedding")
    for first, second in ((lora, PROMPT), (PROMPT, lora)):
        both = second.wrap(first.wrap(model, 5), 5)
        np.testing.assert_allclose(
            causal(both, TOKENS), causal(model, in_front(5)), rtol=1e-6, atol=1e-6
        )
        assert len(lora.extract(both)) == 9 and len(PROMPT.extract(both)) == 1
    few_bits = qlora.quantize_model(model)
    for base in (model, few_bits):
        both = PREFIX.wrap(lora.wrap(base, 0), 5, vocabulary_size=11, call=causal)
        expected = causal(base, in_front(5))[:, 3:]
        np.testing.assert_allclose(causal(both, TOKENS), expected, rtol=1e-5, atol=1e-6)


def test_prefix_beside_a_prompt(model):
    """As long as without one, and of the tokens after it; in the other order it knows of none."""
    first = PREFIX.wrap(PROMPT.wrap(model, 0), 5, vocabulary_size=11, call=causal)
    second = PROMPT.wrap(PREFIX.wrap(model, 5, vocabulary_size=11, call=causal), 0)
    shapes = jax.tree.map(jnp.shape, PREFIX.extract(second))
    assert jax.tree.map(jnp.shape, PREFIX.extract(first)) == shapes
    assert causal(first, TOKENS).shape == causal(second, TOKENS).shape == (2, 7, 11)
    first_layer = [PREFIX.extract(both)["layers/0"] for both in (first, second)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), *first_layer)


def test_impossible_targets_and_adapters_are_refused(model):
    with pytest.raises(ValueError, match=r"targets='head' must choose one nnx.Embed, got \[\]"):
        adapters.Prompt(targets="head").wrap(model, 0)
    two = nnx.List([nnx.Embed(3, 2, rngs=nnx.Rngs(0)) for _ in range(2)])
    with pytest.raises(ValueError, match=r"must choose one nnx.Embed, got \['0', '1'\]"):
        PROMPT.wrap(two, 0)
    with pytest.raises(ValueError, match=r"targets='head' must choose an nnx\.MultiHeadAttention"):
        adapters.Prefix(targets="head").wrap(model, 0, vocabulary_size=11)
    wrapped = PREFIX.wrap(model, 0, vocabulary_size=11)
    with pytest.raises(ValueError, match="model has a prefix already, at 'layers/0'"):
        PREFIX.wrap(wrapped, 0, vocabulary_size=11)
    with pytest.raises(ValueError, match=r"model has a prompt already, at \['embedding'\]"):
        PROMPT.wrap(PROMPT.wrap(model, 0), 0)
    for call in (lambda model, tokens: None, lambda model, tokens: model(tokens[:, 1:])):
        with pytest.raises(ValueError, match="call must run all tokens through 'layers/0'"):
            PREFIX.wrap(model, 0, vocabulary_size=11, call=call)
    with pytest.raises(ValueError, match="adapters must have the shapes"):
        PREFIX.update(wrapped, {"layers/0": PREFIX.extract(wrapped)["layers/0"]})
    with pytest.raises(ValueError, match="vocabulary_size must be an int of at least 1, got 0"):
        PREFIX.wrap(model, 0, vocabulary_size=0)
    with pytest.raises(ValueError, match=r"targets='\(' is no regular expression"):
        adapters.Prompt(targets="(")
