import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_lowbit
from examples.llm.models.decoder import Decoder
from examples.llm.models.families import OPT
from examples.llm.models.generation import generate
from examples.llm.models.tiny import TINY
from examples.llm.training.tuning import SCHEMES, tuned
from optax_lowbit import adapters, qlora, zo

TOKENS = jnp.array([[5, 9, 2, 7, 1, 8], [3, 3, 6, 0, 4, 250]], jnp.int32)
FRONT = jnp.array([11, 200, 45], jnp.int32)


@pytest.fixture(scope="module")
def graph_and_parameters():
    graph, state = nnx.split(Decoder(TINY, rngs=nnx.Rngs(0)))
    return graph, nnx.to_pure_dict(state)


@pytest.fixture(scope="module")
def tunings(graph_and_parameters):
    lengths = {
        "prefix": adapters.Prefix(num_tokens=4),
        "prompt": adapters.Prompt(num_tokens=6),
    }
    return {scheme: tuned(scheme, *graph_and_parameters, 0, **lengths) for scheme in SCHEMES}


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_virtual_tokens_made_of_tokens_are_these_tokens_in_front(positions):
    learned = dataclasses.replace(TINY, family=OPT, tied_embeddings=False, embedding_size=16)
    config = TINY if positions == "rotary" else learned

    @nnx.jit
    def logits(decoder):
        in_front = jnp.concatenate([jnp.tile(FRONT, (len(TOKENS), 1)), TOKENS], axis=1)
        prefix, prompt = decoder.keys_and_values(FRONT[:2]), decoder.embedding(FRONT[2:])
        return {
            "expected": decoder(in_front)[:, len(FRONT) :],
            "alone": decoder(TOKENS),
            "prefix": decoder(TOKENS, prefix=decoder.keys_and_values(FRONT)),
            "prompt": decoder(TOKENS, prompt=decoder.embedding(FRONT)),
            "prefix, then prompt": decoder(TOKENS, prefix=prefix, prompt=prompt),
        }

    given = logits(Decoder(config, rngs=nnx.Rngs(0)))
    expected = given.pop("expected")
    assert np.abs(expected - given.pop("alone")).max() > 1e-2  # the tokens do matter
    for name, result in given.items():
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_real_tokens(scheme, tunings):
    tuning = tunings[scheme]
    logits = jax.eval_shape(tuning.logits, tuning.trainable, tuning.frozen, TOKENS)
    assert logits.shape == (2, 6, TINY.vocabulary_size) and logits.dtype == jnp.float32


@pytest.mark.parametrize("scheme", SCHEMES)
def test_cached_continuations_are_the_uncached_ones(scheme, tunings):
    tuning = tunings[scheme]

    @jax.jit
    def both(trainable, frozen):
        model = tuning.model(trainable, frozen)
        lengths = jnp.array([6, 3])
        cached = generate(model, TOKENS, lengths, count=4, end=None)
        rows = jnp.pad(TOKENS, ((0, 0), (0, 4)))
        for step in range(4):
            at = (jnp.arange(2), lengths + step - 1)
            token = jnp.argmax(model.logits(model.features(rows)[at]), axis=-1)
            rows = rows.at[at[0], at[1] + 1].set(token.astype(jnp.int32))
        written = lengths[:, None] + jnp.arange(4)[None]
        return cached, jnp.take_along_axis(rows, written, axis=1)

    cached, uncached = both(tuning.trainable, tuning.frozen)
    np.testing.assert_array_equal(cached, uncached)


def test_lora_starts_from_the_decoder_bit_for_bit(tunings, graph_and_parameters):
    full, lora = (
        jax.jit(tunings[scheme].logits)(tunings[scheme].trainable, tunings[scheme].frozen, TOKENS)
        for scheme in ("full", "lora")
    )
    assert np.asarray(lora).tobytes() == np.asarray(full).tobytes()


def test_prompt_starts_from_rows_of_the_embedding(tunings, graph_and_parameters):
    _, parameters = graph_and_parameters
    rows = {row.tobytes() for row in np.asarray(parameters["embedding"]["embedding"])}
    assert {row.tobytes() for row in np.asarray(tunings["prompt"].trainable["prompt"])} <= rows


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trees_hold_every_parameter_once(scheme, tunings, graph_and_parameters):
    tuning, (_, parameters) = tunings[scheme], graph_and_parameters
    small = {
        "full": sum(leaf.size for leaf in jax.tree.leaves(parameters)),
        "lora": 2 * 8 * (64 + 64 + 64 + 32),
        "qlora": 2 * 64 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + TINY.feed_forward_size)),
        "prefix": 2 * 2 * 4 * 32,
        "prompt": 6 * 64,
    }
    assert sum(leaf.size for leaf in jax.tree.leaves(tuning.trainable)) == small[scheme]
    held = tuning.trainable if scheme == "full" else tuning.frozen
    if scheme == "qlora":
        kernels = jax.tree.leaves(held["layers"], is_leaf=is_matrix)
        assert sum(map(is_matrix, kernels)) == 7
        held, parameters = held | {"layers": {}}, parameters | {"layers": {}}
    assert pointers(held) == pointers(parameters)


def is_matrix(x):
    return isinstance(x, qlora.QuantizedMatrix)


def pointers(tree):
    return sorted(leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree))


def likelihood_loss(tuning):
    def loss(trainable, frozen, tokens):
        logits = tuning.logits(trainable, frozen, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss


@pytest.mark.parametrize(
    ("scheme", "factory"),
    [
        ("lora", optax_lowbit.adamw4bit),
        ("qlora", optax_lowbit.adamw4bit),
        ("prefix", optax.adam),
        ("prompt", optax.adam),
    ],
)
def test_optax_trains_the_small_tree(scheme, factory, tunings):
    tuning, tx = tunings[scheme], factory(0.03)
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
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("scheme", ["lora", "qlora", "prefix", "prompt"])
def test_zeroth_order_steps_train_the_small_tree(scheme, tunings):
    tuning = tunings[scheme]
    opt, loss = zo.zo_sgd(1e-2), likelihood_loss(tuning)
    step = jax.jit(opt.step, static_argnums=0)
    trainable, state, losses = tuning.trainable, opt.init(tuning.trainable, 0), []
    for _ in range(30):
        trainable, state, info = step(loss, trainable, state, tuning.frozen, TOKENS)
        losses.append(float(info.loss))
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    for old, new in zip(jax.tree.leaves(tuning.trainable), jax.tree.leaves(trainable)):
        assert not np.array_equal(old, new)


def test_unknown_scheme_is_refused(graph_and_parameters):
    with pytest.raises(ValueError, match="one of full, lora, qlora, prefix, prompt, got 'bitfit'"):
        tuned("bitfit", *graph_and_parameters, 0)


def test_lora_can_be_another(graph_and_parameters):
    every = adapters.LoRA(rank=2, targets="layers/")
    trainable = tuned("lora", *graph_and_parameters, 0, lora=every).trainable
    assert len(jax.tree.leaves(trainable)) == 2 * 7
