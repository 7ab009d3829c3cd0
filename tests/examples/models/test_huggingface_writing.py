"""Models written as Hugging Face's folders, against those that transformers saves."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks.models.recorded import Recorded
from examples.llm.errors import UsageError
from examples.llm.models.gguf_files import GGUFModel
from examples.llm.models.huggingface_files import HuggingFaceModel
from examples.llm.models.huggingface_writing import FolderWriter
from examples.llm.models.opening import open_model
from examples.llm.models.rotary import Divided, Linear
from examples.llm.models.tokenizer import SpecialTokens
from optax_lowbit import qlora

pytest.importorskip("safetensors", reason="safetensors is missing")

RECORDED = Recorded()


def write(source, folder, stored):
    """What `stored`, of `source`, has; written to a folder."""
    parameters = stored.parameters()
    FolderWriter(source, open_model(source)).write(folder, stored.config, parameters)
    return parameters


def assert_same_bits(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


@pytest.mark.parametrize("variant", RECORDED.variants)
def test_what_transformers_saved_is_written_again(variant, tmp_path):
    """Every tensor has its name, and its bits; what is tied or left out is not written."""
    source = RECORDED.write(variant, tmp_path / "source")
    (source / "vocab.txt").write_text("as it is")
    folder, stored = tmp_path / "written", HuggingFaceModel(source)
    write(source, folder, stored)
    tensors, expected = map(qlora.read_bitsandbytes, (folder, source))
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == np.float32
        np.testing.assert_array_equal(tensors[name], tensor)
    assert HuggingFaceModel(folder).config == stored.config
    fields, theirs = (json.loads((path / "config.json").read_text()) for path in (folder, source))
    fields.pop("problem_type", None)
    assert fields.pop("torch_dtype") == theirs.pop("dtype") and fields == theirs
    assert (folder / "vocab.txt").read_text() == "as it is"


def test_parameters_in_16_bits_stay_so(tmp_path):
    source = RECORDED.write("opt", tmp_path / "source", dtype=np.float16)
    stored = HuggingFaceModel(source)
    parameters = jax.tree.map(lambda x: x.astype(jnp.bfloat16), stored.parameters())
    FolderWriter(source, stored).write(tmp_path / "written", stored.config, parameters)
    tensors = qlora.read_bitsandbytes(tmp_path / "written")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
    assert tensors.config["torch_dtype"] == "bfloat16"
    assert_same_bits(HuggingFaceModel(tmp_path / "written").parameters(), parameters)


@pytest.mark.parametrize("family", ["Roberta", "Bert"])
def test_an_encoder_with_a_new_head(family, tmp_path):
    source = RECORDED.write(f"{family.lower()} mlm", tmp_path / "source")
    folder, stored = tmp_path / "written", HuggingFaceModel(source).with_classes(4)
    parameters = write(source, folder, stored)
    names = {*qlora.read_bitsandbytes(folder)}
    assert names == {*RECORDED.shapes(f"{family.lower()} classes")}  # as of three classes
    found = HuggingFaceModel(folder)
    assert found.config == stored.config
    assert_same_bits(found.parameters(), parameters)
    fields = json.loads((folder / "config.json").read_text())
    assert fields["architectures"] == [f"{family}ForSequenceClassification"]
    assert fields["id2label"] == {str(n): f"LABEL_{n}" for n in range(4)}


def test_a_new_head_for_other_classes_has_other_labels(tmp_path):
    source = RECORDED.write("bert classes", tmp_path / "source")
    write(source, tmp_path / "written", HuggingFaceModel(source).with_classes(2))
    assert HuggingFaceModel(tmp_path / "written").config.num_classes == 2


def test_a_gguf_file_becomes_a_folder(tiny_gguf, tmp_path, monkeypatch):
    special = SpecialTokens(3, 5, 7)
    config = dataclasses.replace(GGUFModel(tiny_gguf).config, rotary_scaling=Linear(2.5))
    monkeypatch.setattr(GGUFModel, "special_tokens", lambda _: special)
    monkeypatch.setattr(GGUFModel, "config", config)
    folder, stored = tmp_path / "written", GGUFModel(tiny_gguf)
    parameters = write(tiny_gguf, folder, stored)
    found = HuggingFaceModel(folder)
    assert (found.config, found.special_tokens()) == (config, special)
    assert_same_bits(found.parameters(), parameters)
    text = "naïve: 日本 <|special2|>!\n"
    ids = stored.tokenizer().encode(text).ids
    assert found.tokenizer().encode(text, add_special_tokens=False).ids == ids
    # As transformers reads it, which knows nothing else of what is in front.
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids == [3, *ids]


def test_a_file_of_llama2c_becomes_a_folder(shared_dir, tmp_path):
    source = shared_dir / "data" / "stories260K" / "stories260K.bin"
    stored = open_model(source)
    parameters = write(source, tmp_path / "written", stored)
    found = HuggingFaceModel(tmp_path / "written")
    assert found.config == stored.config
    assert found.special_tokens() == stored.special_tokens()
    assert_same_bits(found.parameters(), parameters)
    text = '  "Übermut", said the 日本 cat'
    ids = stored.tokenizer().encode(text).ids
    assert found.tokenizer().encode(text, add_special_tokens=False).ids == ids


def test_frequencies_that_no_field_is_for(tiny_gguf, monkeypatch):
    divided = dataclasses.replace(
        GGUFModel(tiny_gguf).config, rotary_scaling=Divided((1.0, 2.0) * 4)
    )
    monkeypatch.setattr(GGUFModel, "config", divided)
    with pytest.raises(UsageError, match="--save-model: the model divides each rotary frequency"):
        FolderWriter(tiny_gguf, GGUFModel(tiny_gguf))
