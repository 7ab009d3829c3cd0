import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.llm.models.building import abstract_model
from examples.llm.models.config import DecoderConfig
from examples.llm.models.decoder import Decoder
from examples.llm.models.families import OPT
from examples.llm.models.rotary import UNSCALED, Divided, DynamicNTK, Linear, Llama3

SMALL = DecoderConfig(
    vocabulary_size=50,
    hidden_size=16,
    feed_forward_size=24,
    num_layers=3,
    num_heads=4,
    num_key_value_heads=2,
    head_size=4,
    context_length=32,
    rotary_base=10000.0,
    norm_epsilon=1e-5,
    tied_embeddings=True,
)
LEARNED = dataclasses.replace(SMALL, family=OPT, feed_forward_bias=True, position_offset=2)


def test_layer_parameters_are_stacked():
    _, parameters = abstract_model(SMALL)
    assert parameters["layers"]["attention"]["key"]["kernel"].shape == (3, 16, 8)
    assert parameters["layers"]["feed_forward_norm"]["scale"].shape == (3, 16)
    assert "head" not in parameters
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {jnp.dtype("float32")}


def test_stacked_layers_start_different():
    kernel = Decoder(SMALL, rngs=nnx.Rngs(0)).layers.attention.query.kernel[...]
    assert not np.array_equal(kernel[0], kernel[1])


def test_later_tokens_do_not_change_earlier_logits():
    model = Decoder(SMALL, rngs=nnx.Rngs(0))
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    changed = tokens.at[0, -1].set(40)
    np.testing.assert_array_equal(model(tokens)[0, :-1], model(changed)[0, :-1])


def test_another_family_brings_its_own_parts():
    model = Decoder(LEARNED, rngs=nnx.Rngs(0))
    tokens = jnp.array([[1, 2, 3]], jnp.int32)
    gradients = nnx.grad(lambda model: jnp.sum(jnp.square(model(tokens))))(model)
    assert model.layers.feed_forward.up.kernel[...].shape == (3, 16, 24)
    for path, gradient in nnx.to_flat_state(gradients):
        assert np.any(np.asarray(gradient[...])), path


def test_rotary_positions_make_the_order_matter():
    model = Decoder(SMALL, rngs=nnx.Rngs(0))
    one = model(jnp.array([[1, 2, 3]], jnp.int32))[0, -1]
    other = model(jnp.array([[2, 1, 3]], jnp.int32))[0, -1]
    assert not np.allclose(one, other)


def test_longer_contexts_turn_slower():
    """The first pair turns once in 2 pi tokens, the last once in 2 pi 1000."""
    base, size, length = 1000.0, 8, jnp.int32(64)
    plain = np.asarray(UNSCALED.frequencies(base, size, length))
    np.testing.assert_allclose(plain, 1000.0 ** (-np.arange(4) / 4), rtol=1e-5)
    np.testing.assert_allclose(Linear(4.0).frequencies(base, size, length), plain / 4, rtol=1e-6)
    divided = Divided((1.0, 2.0, 3.0, 4.0)).frequencies(base, size, length)
    np.testing.assert_allclose(divided, plain / [1, 2, 3, 4], rtol=1e-6)
    # In 100 tokens there are 15.9, 2.830, 0.5 and 0.09 turns.
    expected = plain / [1, 1 / (0.61007 + (1 - 0.61007) / 8), 8, 8]
    llama3 = Llama3(8.0, low=1.0, high=4.0, original_length=100).frequencies(base, size, length)
    np.testing.assert_allclose(llama3, expected, rtol=1e-3)
    dynamic = DynamicNTK(2.0, limit=64)
    np.testing.assert_allclose(dynamic.frequencies(base, size, length), plain, rtol=1e-6)
    longer = np.asarray(dynamic.frequencies(base, size, jnp.int32(128)))
    np.testing.assert_allclose(longer, plain * 3.0 ** (-np.arange(4) / 3), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads, got 4 and 3"),
        ({"head_size": 5}, "head_size must be even, got 5"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)
