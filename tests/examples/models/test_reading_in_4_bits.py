"""Under "qlora" a model's matrices are in 4 bits as they are read, whatever files it is in."""

import json
import sys

import jax
import numpy as np
import pytest

from examples.llm.models.opening import open_model
from examples.llm.training.tuning import base_parameters, kept_as
from optax_lowbit import qlora
from tests.examples.models.test_llama2c_files import write_model
from tests.resident_memory import peak_of

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is missing")

LOAD = """
from pathlib import Path
from examples.llm.training.methods import Hyperparameters
from examples.llm.training.trainer import Recipe, Trainer
from optax_lowbit import adapters

def load(path, tuning):
    lora = adapters.LoRA(rank=2, targets=r"attention/query/kernel$")
    hyperparameters = Hyperparameters(1.0, 1e-3, 1, tuning=tuning)
    trainer = Trainer(Path(path), Recipe("adamw4bit", hyperparameters, lora, DTYPE), None)
    return trainer.parameters(0), trainer.tuning.frozen
"""


def write_llama(folder, layers=6, size=512, inner=1408, dtype=np.float16):
    """A LLaMA in Hugging Face's files, with random matrices."""
    rng = np.random.default_rng(0)
    shapes = {
        **{f"self_attn.{name}_proj": (size, size) for name in "qkvo"},
        **{f"mlp.{name}_proj": (inner, size) for name in ("gate", "up")},
        "mlp.down_proj": (size, inner),
        **{name: (size,) for name in ("input_layernorm", "post_attention_layernorm")},
    }
    tensors = {"model.embed_tokens": (64, size), "model.norm": (size,)}
    for layer in range(layers):
        tensors |= {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
    arrays = {
        f"{name}.weight": rng.standard_normal(shape, np.float32).astype(dtype)
        for name, shape in tensors.items()
    }
    config = {
        "model_type": "llama", "hidden_act": "silu", "hidden_size": size, "vocab_size": 64,
        "intermediate_size": inner, "max_position_embeddings": 64, "num_attention_heads": 8,
        "num_hidden_layers": layers, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    safetensors_numpy.save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def written(kind, tiny_gguf, folder):
    if kind == "gguf":
        return tiny_gguf
    if kind == "llama2.c":
        return write_model(folder / "a.bin", (64, 72, 2, 2, 1, -10, 16))
    return write_llama(folder, layers=2, size=64, inner=72)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("gguf", "bfloat16"), ("hugging face", "float32"), ("llama2.c", "bfloat16")],
)
def test_codes_are_those_of_the_whole_model(kind, dtype, tiny_gguf, tmp_path):
    stored = open_model(written(kind, tiny_gguf, tmp_path))
    whole = stored.parameters()
    expected = qlora.quantize_params(jax.tree.map(lambda x: x.astype(dtype), whole))
    for found in (
        stored.parameters(kept_as("qlora", dtype)),
        base_parameters(whole, "qlora", dtype),
    ):
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
@pytest.mark.parametrize(("tuning", "dtype"), [("qlora", "float32"), ("lora", "bfloat16")])
def test_a_model_is_read_tensor_by_tensor(tuning, dtype, tmp_path):
    setup, load = LOAD.replace("DTYPE", repr(dtype)), f"load(path, {tuning!r})"
    peak, size = peak_of(setup, load, write_llama(tmp_path / "llama"))
    tensor = 4 * 512 * 1408
    elements = 6 * (4 * 512**2 + 3 * 512 * 1408)
    assert size < elements * (4.2 / 8 if tuning == "qlora" else 2) + 2**18
    # One tensor in float32 and what it takes to quantize it; and the stack it is put into.
    stack = 6 * tensor // (8 if tuning == "qlora" else 2)
    assert size < peak < size + stack + 4 * tensor
