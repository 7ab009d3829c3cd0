"""Numbers of parameters, as published, and models read from a `config.json`."""

import json

import jax
import pytest

from optax_lowbit.memory import abstract_params
from optax_lowbit.memory.architectures import ARCHITECTURES, architecture

# Of the published weights.
PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "roberta-large": 355_359_744,  # with the pooler, without a head
}

LLAMA = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
    "tie_word_embeddings": True, "attention_bias": False,
}  # fmt: skip
CONFIGS = {
    "smollm2-135m": LLAMA,
    "mistral-7b": {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12,
        "n_positions": 1024,
    },
    "opt-350m": {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": 1024, "num_hidden_layers": 24,
        "num_attention_heads": 16, "ffn_dim": 4096, "max_position_embeddings": 2048,
        "do_layer_norm_before": False, "word_embed_proj_dim": 512,
    },
    "roberta-large": {
        "model_type": "roberta", "vocab_size": 50265, "hidden_size": 1024,
        "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
        "max_position_embeddings": 514, "type_vocab_size": 1,
    },
}  # fmt: skip
QWEN = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864,
    "tie_word_embeddings": True,
}  # fmt: skip


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_every_model_has_a_published_number():
    assert PUBLISHED.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("model", PUBLISHED)
def test_number_of_parameters_is_the_published_one(model):
    assert count(abstract_params(model)) == PUBLISHED[model]


@pytest.mark.parametrize("model", CONFIGS)
def test_a_config_gives_the_same_model(model, tmp_path):
    assert architecture(CONFIGS[model]) == ARCHITECTURES[model] or model == "mistral-7b"
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS[model]))
    assert abstract_params(path) == abstract_params(model)


def test_qwen_has_biases_of_queries_keys_and_values():
    assert count(abstract_params(QWEN)) == 494_032_768  # Qwen2-0.5B


def test_heads_of_another_size():
    params = abstract_params({**LLAMA, "head_dim": 128})
    assert params["layers"]["query"].shape == (30, 576, 9 * 128)
    assert params["layers"]["key"].shape == (30, 576, 3 * 128)
    assert params["layers"]["output"].shape == (30, 9 * 128, 576)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5"}, r"model_type .* one of llama, mistral, .*; got 't5'"),
        ({}, r"model_type .*; got None"),
        ({"model_type": "gpt2", "n_embd": 8}, "lacks vocab_size, n_layer, n_head, n_positions"),
        ({**LLAMA, "attention_bias": True}, "attention_bias must be False .*got True"),
        ({**CONFIGS["roberta-large"], "type_vocab_size": 2}, "type_vocab_size must be 1 .*got 2"),
        ({"model_type": ["llama"]}, r"model_type .*; got \['llama'\]"),
        ({**LLAMA, "hidden_size": None}, "hidden_size must be a positive int .*got None"),
        ({**LLAMA, "num_attention_heads": 0}, "num_attention_heads must be a positive int"),
        ({**CONFIGS["gpt2"], "tie_word_embeddings": False}, "tie_word_embeddings must be True"),
        (
            {k: x for k, x in LLAMA.items() if k != "num_key_value_heads"}
            | {"model_type": "mistral"},
            "'mistral' lacks num_key_value_heads",
        ),
    ],
)
def test_impossible_configs(config, message):
    with pytest.raises(ValueError, match=message):
        abstract_params(config)


@pytest.mark.parametrize(("text", "message"), [("[1]", "must have an object"), ("{", "Expecting")])
def test_broken_files_are_named(text, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        abstract_params(path)


def test_unknown_model():
    with pytest.raises(ValueError, match=r"one of llama-7b, .*roberta-large; got 'llama-8b'"):
        abstract_params("llama-8b")
