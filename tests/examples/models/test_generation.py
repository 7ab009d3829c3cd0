import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.llm.models.decoder import Decoder
from examples.llm.models.families import MISTRAL, OPT
from examples.llm.models.generation import continue_text, generate, next_tokens
from examples.llm.models.gguf_files import GGUFModel
from examples.llm.models.rotary import DynamicNTK, Linear
from examples.llm.models.tiny import TINY
from examples.llm.models.tokenizer import NO_SPECIAL_TOKENS, SpecialTokens

FAMILIES = {
    "llama": TINY,
    "mistral": dataclasses.replace(
        TINY, family=MISTRAL, sliding_window=4, rotary_scaling=Linear(3.0), tied_embeddings=False
    ),
    "opt": dataclasses.replace(
        TINY, family=OPT, position_offset=2, attention_bias=True, feed_forward_bias=True
    ),
    "post-norm opt": dataclasses.replace(
        TINY, family=OPT, norm_first=False, final_norm=False, embedding_size=32
    ),
}


@pytest.fixture(scope="module")
def tiny_decoder():
    return Decoder(TINY, rngs=nnx.Rngs(0))


PROMPTS = jnp.array([[5, 9, 2, 7, 1, 8, 30], [3, 6, 0, 0, 0, 0, 0], [4, 4, 4, 1, 2, 0, 0]])
LENGTHS, COUNT = (7, 2, 5), 6


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def model(request):
    return Decoder(request.param, rngs=nnx.Rngs(0))


@nnx.jit
def likeliest(model, tokens, place):
    return jnp.argmax(model(tokens)[0, place], axis=-1)


def test_a_batch_with_a_cache_writes_what_each_text_does_alone_without(model):
    run = jax.jit(partial(generate, count=COUNT, end=None))
    written = run(model, PROMPTS, jnp.array(LENGTHS))
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS)):
        # What is after a place doesn't matter, and one shape compiles once.
        tokens = jnp.zeros((1, max(LENGTHS) + COUNT), jnp.int32).at[0, : len(prompt)].set(prompt)
        for place in range(length, length + COUNT):
            tokens = tokens.at[0, place].set(likeliest(model, tokens, place - 1))
        expected = tokens[0, length : length + COUNT]
        np.testing.assert_array_equal(written[row], expected, err_msg=str(row))


def test_one_token_needs_no_room(tiny_decoder):
    written = jax.jit(partial(generate, count=1, end=None))(
        tiny_decoder, PROMPTS, jnp.array(LENGTHS)
    )
    assert written.shape == (3, 1) and written[0, 0] == likeliest(tiny_decoder, PROMPTS[:1], 6)


class Alphabet:
    """After a token comes the next one."""

    def logits(self, features):
        return jax.nn.one_hot(features[..., 0] + 1, 264)

    def remember(self, tokens, segments, *, room):
        return tokens[:, :, None], jnp.zeros(())

    def extend(self, tokens, cache):
        return tokens[:, :, None], cache + 1


def test_after_the_end_there_is_nothing_else():
    prompts, lengths = jnp.array([[2, 3], [7, 0], [8, 9]]), jnp.array([2, 1, 2])
    written = jax.jit(lambda *args: generate(Alphabet(), *args, count=4, end=9))(prompts, lengths)
    assert written.tolist() == [[4, 5, 6, 7], [8, 9, 9, 9], [10, 11, 12, 13]]


def test_a_continued_text_stops_at_the_end_token(tiny_gguf):
    tokenizer = GGUFModel(tiny_gguf).tokenizer()
    first, *_, end = tokenizer.encode("abcdef").ids
    assert tokenizer.encode("abcdef").ids == list(range(first, end + 1))
    for count, written in ((10, "bcde"), (3, "bcd")):
        run = partial(generate, Alphabet(), count=count, end=end)
        assert continue_text(run, tokenizer, "a", SpecialTokens(None, end)) == written
    with pytest.raises(ValueError, match="at least one token"):
        continue_text(run, tokenizer, "", NO_SPECIAL_TOKENS)


def test_a_key_tells_what_is_drawn(tiny_decoder):
    options = dict(count=3, end=None, temperature=0.7, top_p=0.9)
    run = jax.jit(partial(generate, **options))
    one, same, other = (
        run(tiny_decoder, PROMPTS, jnp.array(LENGTHS), key=jax.random.key(seed))
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (0.5, 1.0, np.square([0.5, 0.3, 0.15, 0.05]) / 0.365),
        (1.0, 0.7, [0.625, 0.375, 0, 0]),
        (1.0, 0.9, np.array([0.5, 0.3, 0.15, 0]) / 0.95),
        (1.0, 0.4, [1, 0, 0, 0]),
        # The temperature is first: 0.25, 0.09, 0.0225, 0.0025 of 0.365, of which 0.93 are two.
        (0.5, 0.9, [0.25 / 0.34, 0.09 / 0.34, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(temperature, top_p, expected):
    order = np.array([2, 0, 3, 1])
    logits = jnp.zeros(4).at[order].set(jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))) + 7
    count = 20_000
    drawn = next_tokens(jnp.tile(logits, (count, 1)), temperature, top_p, jax.random.key(0))
    frequencies = np.bincount(drawn, minlength=4)[order] / count
    deviation = np.sqrt(np.array(expected) * (1 - np.array(expected)) / count)
    assert (np.abs(frequencies - expected) <= 4 * deviation).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be a number of at least 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be a number of at least 0, got nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"temperature": 1.0}, "a temperature of 1.0 needs a key"),
    ],
)
def test_impossible_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        generate(Alphabet(), PROMPTS, jnp.array(LENGTHS), **{"count": 3, "end": None, **options})


@pytest.mark.parametrize(
    "change",
    [{"family": OPT}, {"rotary_scaling": DynamicNTK(2.0, limit=9)}],
    ids=["learned", "dynamic"],
)
def test_there_are_as_many_positions_as_the_model_has(change):
    config = dataclasses.replace(TINY, context_length=9, **change)

    def shape(count):
        model = Decoder(config, rngs=nnx.Rngs(0))
        return generate(model, PROMPTS, jnp.array(LENGTHS), count=count, end=None)

    assert jax.eval_shape(partial(shape, 3)).shape == (3, 3)
    with pytest.raises(ValueError, match="positions for at most 9 tokens, got 10"):
        jax.eval_shape(partial(shape, 4))
