import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_lowbit
from examples.llm.decoder import Decoder, Family, rms_norm
from examples.llm.training import build_model
from examples.llm.tuning import SCHEMES, tuned
from optax_lowbit import adapters, zo
from tests.examples.conftest import TINY
from tests.examples.test_decoder import LearnedPositions, ReluMLP

TOKENS = jnp.array([[5, 9, 2, 7, 1, 8], [3, 3, 6, 0, 4, 250]], jnp.int32)
FRONT = jnp.array([11, 200, 45], jnp.int32)


@pytest.fixture(scope="module", params=["rotary", "learned", "untied"])
def decoder(request):
    learned = Family(norm=rms_norm, feed_forward=ReluMLP, positions=LearnedPositions)
    config = dataclasses.replace(TINY, tied_embeddings=request.param != "untied")
    if request.param == "learned":
        return Decoder(config, family=learned, rngs=nnx.Rngs(0))
    return Decoder(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def graph_and_parameters():
    graph, state = nnx.split(Decoder(TINY, rngs=nnx.Rngs(0)))
    return graph, nnx.to_pure_dict(state)


def in_front(tokens):
    return jnp.concatenate([jnp.tile(FRONT, (len(tokens), 1)), tokens], axis=1)


def test_prefix_of_tokens_is_these_tokens_in_front(decoder):
    expected = decoder(in_front(TOKENS))[:, len(FRONT) :]
    logits = decoder(TOKENS, prefix=decoder.keys_and_values(FRONT))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(logits - decoder(TOKENS)).max() > 1e-2  # the tokens do matter


def test_prompt_of_embeddings_is_these_tokens_in_front(decoder):
    expected = decoder(in_front(TOKENS))[:, len(FRONT) :]
    logits = decoder(TOKENS, prompt=decoder.embedding(FRONT))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_prefix_stands_before_the_prompt(decoder):
    expected = decoder(in_front(TOKENS))[:, len(FRONT) :]
    prefix = decoder.keys_and_values(FRONT[:2])
    logits = decoder(TOKENS, prefix=prefix, prompt=decoder.embedding(FRONT[2:]))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_starts_from_the_decoder(scheme, graph_and_parameters):
    graph, parameters = graph_and_parameters
    tuning = tuned(scheme, graph, parameters, 0)
    logits = tuning.logits(tuning.trainable, tuning.frozen, TOKENS)
    model = build_model(graph, parameters)
    if scheme in ("full", "lora"):
        expected = model(TOKENS)
        assert np.asarray(logits).tobytes() == np.asarray(expected).tobytes()
        return
    assert logits.shape == (2, 6, TINY.vocabulary_size) and logits.dtype == jnp.float32
    if scheme == "prompt":
        rows = {row.tobytes() for row in np.asarray(parameters["embedding"]["embedding"])}
        assert {row.tobytes() for row in np.asarray(tuning.trainable["prompt"])} <= rows
    else:
        shapes = {name: leaf.shape for name, leaf in tuning.trainable.items()}
        assert shapes == dict.fromkeys(("keys", "values"), (2, 5, 2, 16))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trees_hold_every_parameter_once(scheme, graph_and_parameters):
    graph, parameters = graph_and_parameters
    tuning = tuned(scheme, graph, parameters, 0, prefix_tokens=4, prompt_tokens=6)
    small = {
        "full": sum(leaf.size for leaf in jax.tree.leaves(parameters)),
        "lora": 2 * 8 * (64 + 64 + 64 + 32),
        "prefix": 2 * 2 * 4 * 32,
        "prompt": 6 * 64,
    }
    assert sum(leaf.size for leaf in jax.tree.leaves(tuning.trainable)) == small[scheme]
    buffers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(parameters)}
    held = tuning.trainable if scheme == "full" else tuning.frozen
    assert sorted(leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(held)) == sorted(buffers)


def likelihood_loss(tuning):
    def loss(trainable, frozen, tokens):
        logits = tuning.logits(trainable, frozen, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss


@pytest.mark.parametrize(
    ("scheme", "factory"),
    [(scheme, optax.adam) for scheme in SCHEMES[1:]] + [("lora", optax_lowbit.adamw4bit)],
)
def test_optax_trains_the_small_tree(scheme, factory, graph_and_parameters):
    graph, parameters = graph_and_parameters
    tuning, tx = tuned(scheme, graph, parameters, 0), factory(0.03)
    loss = likelihood_loss(tuning)

    @jax.jit
    def step(trainable, state, frozen, tokens):
        value, gradient = jax.value_and_grad(loss)(trainable, frozen, tokens)
        updates, state = tx.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    with jax.numpy_dtype_promotion("standard"):
        trainable, state = tuning.trainable, tx.init(tuning.trainable)
        losses = []
        for _ in range(15):
            trainable, state, value = step(trainable, state, tuning.frozen, TOKENS)
            losses.append(float(value))
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeroth_order_steps_train_every_scheme(scheme, graph_and_parameters):
    graph, parameters = graph_and_parameters
    tuning = tuned(scheme, graph, parameters, 0)
    loss, opt = likelihood_loss(tuning), zo.zo_sgd({"full": 1e-3}.get(scheme, 1e-2))
    trainable, state = tuning.trainable, opt.init(tuning.trainable, 0)
    before = float(loss(trainable, tuning.frozen, TOKENS))
    step = jax.jit(opt.step, static_argnums=0)
    for _ in range(30):
        trainable, state, _ = step(loss, trainable, state, tuning.frozen, TOKENS)
    assert float(loss(trainable, tuning.frozen, TOKENS)) < before
    for old, new in zip(jax.tree.leaves(tuning.trainable), jax.tree.leaves(trainable)):
        assert not np.array_equal(old, new)


def test_unknown_scheme_is_refused(graph_and_parameters):
    with pytest.raises(ValueError, match="one of full, lora, prefix, prompt, got 'bitfit'"):
        tuned("bitfit", *graph_and_parameters, 0)


def test_lora_can_be_another(graph_and_parameters):
    every = adapters.LoRA(rank=2, targets="layers/")
    trainable = tuned("lora", *graph_and_parameters, 0, lora=every).trainable
    assert len(jax.tree.leaves(trainable)) == 2 * 7
