import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.llm.errors import UsageError
from examples.llm.models.building import abstract_model, build_model, new_model
from examples.llm.models.config import EncoderConfig
from examples.llm.models.encoder import sentence_embeddings
from examples.llm.models.huggingface_files import HuggingFaceModel
from examples.llm.models.opening import named_model
from examples.llm.models.tokenizer import SpecialTokens

SMALL = EncoderConfig(
    vocabulary_size=30,
    hidden_size=16,
    feed_forward_size=24,
    num_layers=3,
    num_heads=4,
    num_key_value_heads=4,
    head_size=4,
    context_length=12,
    position_offset=2,
    norm_epsilon=1e-5,
    head="masked-lm",
)
TOKENS = jnp.array([[5, 9, 2, 7, 1, 8], [3, 6, 4, 0, 0, 0]], jnp.int32)


@pytest.fixture(scope="module")
def model():
    return new_model(SMALL, rngs=nnx.Rngs(0))


@nnx.jit
def features(model, tokens, mask=None, **virtual):
    return model.features(tokens, mask, **virtual)


def test_every_token_sees_every_other_and_no_padding(model):
    mask = jnp.array([[1] * 6, [1, 1, 1, 0, 0, 0]], jnp.int32)
    seen = features(model, TOKENS, mask)
    first = features(model, TOKENS.at[0, -1].set(20), mask)
    padded = features(model, TOKENS.at[1, -1].set(20), mask)
    assert np.abs(first[0, 0] - seen[0, 0]).max() > 1e-3
    np.testing.assert_array_equal(padded[1, :3], seen[1, :3])
    alone = features(model, TOKENS[1:, :3])
    np.testing.assert_allclose(seen[1:, :3], alone, rtol=1e-5, atol=1e-6)


def test_texts_in_a_row_are_as_if_alone(model):
    segments = jnp.array([[1, 1, 1, 2, 2, 0]], jnp.int32)
    packed = features(model, TOKENS[:1], segments)[0]
    for part in (slice(0, 3), slice(3, 5)):
        alone = features(model, TOKENS[:1, part])[0]
        np.testing.assert_allclose(packed[part], alone, rtol=1e-5, atol=1e-6)


def test_a_prefix_is_seen_by_all_and_a_prompt_is_a_beginning(model):
    front = jnp.array([11, 20], jnp.int32)
    prompt = model.embedding(front)
    in_front = jnp.concatenate([jnp.tile(front, (2, 1)), TOKENS], axis=1)
    expected = features(model, in_front)[:, 2:]
    np.testing.assert_allclose(
        features(model, TOKENS, prompt=prompt), expected, rtol=1e-5, atol=1e-5
    )
    prefix = model.keys_and_values(front)
    assert prefix["keys"].shape == (3, 2, 4, 4)
    moved = features(model, TOKENS, prefix=prefix)
    assert np.abs(moved - features(model, TOKENS)).max() > 1e-3


def test_there_are_as_many_positions_as_the_model_has(model):
    with pytest.raises(ValueError, match="positions for at most 12 tokens, got 13"):
        model.features(jnp.zeros((1, 13), jnp.int32))


@pytest.mark.parametrize("field", ["num_token_types", "num_classes", "num_heads"])
def test_impossible_shapes_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        dataclasses.replace(SMALL, **{field: 0})


@pytest.fixture(scope="module")
def minilm():
    try:
        return HuggingFaceModel(named_model("minilm", data=None))
    except UsageError as error:
        pytest.skip(str(error))


def padded_batch(tokenizer, sentences, pad):
    rows = [tokenizer.encode(sentence).ids for sentence in sentences]
    tokens = np.full((len(rows), max(map(len, rows))), pad, np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens, (np.arange(tokens.shape[1]) < np.array([*map(len, rows)])[:, None]).astype(int)


@pytest.mark.slow
def test_a_real_encoder_of_sentences(minilm, golden):
    """Against transformers, and against what is known of it: the likest mean the same."""
    recorded, special = golden("minilm"), minilm.special_tokens()
    assert special == SpecialTokens(begin=101, end=102, pad=0, mask=103)
    tokens, mask = padded_batch(minilm.tokenizer(), recorded["sentences"].tolist(), special.pad)
    np.testing.assert_array_equal(tokens, recorded["input_ids"])
    np.testing.assert_array_equal(mask, recorded["attention_mask"])

    parameters = minilm.parameters()
    model = build_model(abstract_model(minilm.config)[0], parameters)
    embeddings = nnx.jit(sentence_embeddings)(model, tokens, mask)
    np.testing.assert_allclose(embeddings[:, :64], recorded["embeddings"], rtol=0, atol=2e-6)
    cosines = np.asarray(embeddings @ embeddings.T)
    np.testing.assert_allclose(cosines, recorded["cosines"], rtol=0, atol=2e-6)
    nearest = np.argmax(cosines - 2 * np.eye(len(cosines)), axis=1)
    assert nearest[:4].tolist() == [1, 0, 3, 2]
    # With the pooler, which the classifier's head starts from, all of its 22.7 million weights.
    with_head = minilm.with_classes(2).parameters()
    assert sum(x.size for x in jax.tree.leaves(with_head)) == 22_713_216 + 2 * 385
    np.testing.assert_array_equal(
        with_head["head"]["dense"]["kernel"].T, minilm._tensors["pooler.dense.weight"]
    )


def test_the_vocabulary_of_a_real_encoder_alone_makes_its_tokenizer(minilm, tmp_path):
    folder = named_model("minilm", data=None)
    for name in ("config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(folder / name)
    own, model = minilm.tokenizer(), HuggingFaceModel(tmp_path)
    text = "Übrigens: naïve Cafés cost $3.50 — 日本, unbelievably!  [MASK] it."
    assert model.tokenizer().encode(text).ids == own.encode(text).ids
    assert model.special_tokens() == minilm.special_tokens()
