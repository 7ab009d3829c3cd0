"""A tiny LLaMA model file, so that the whole fine-tuning program runs in seconds."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from examples.llm.models.building import abstract_model
from examples.llm.models.config import EncoderConfig
from examples.llm.models.families import BERT
from examples.llm.models.huggingface_names import names_of
from examples.llm.models.parameters import tensor_name
from examples.llm.models.tiny import write_tiny_gguf

TINY_BERT = EncoderConfig(
    vocabulary_size=32, hidden_size=32, feed_forward_size=64, num_layers=2, num_heads=2,
    num_key_value_heads=2, head_size=16, context_length=32, norm_epsilon=1e-5, family=BERT,
    num_token_types=2,
)  # fmt: skip


@pytest.fixture
def standard_promotion():
    """Optax's own optimizers raise a float to an integer power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """A folder of Hugging Face's, of an encoder with no head and a few words."""
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is missing")
    folder, random = tmp_path_factory.mktemp("bert"), np.random.default_rng(0)
    fields = {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 32, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 32, "type_vocab_size": 2, "layer_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "win", "now", "number"]
    (folder / "vocab.txt").write_text("\n".join([*words, *map(str, range(32 - len(words)))]))
    tensors, names = {}, names_of(TINY_BERT)
    for path, like in flatten_dict(abstract_model(TINY_BERT)[1], sep="/").items():
        shape = like.shape[1:] if path.startswith("layers/") else like.shape
        for layer in range(TINY_BERT.num_layers):  # the same name again but for layers
            drawn = random.normal(0, 0.1, shape).astype(np.float32)
            is_kernel, is_scale = path.endswith("/kernel"), path.endswith("/scale")
            drawn = np.ones_like(drawn) if is_scale else drawn
            tensors[tensor_name(names, path).format(layer)] = (
                np.ascontiguousarray(drawn.T) if is_kernel else drawn
            )
    safetensors.save_file(tensors, folder / "model.safetensors")
    return folder
