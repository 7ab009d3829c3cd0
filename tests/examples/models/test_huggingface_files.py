import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.llm.errors import UsageError
from examples.llm.models.building import abstract_model, build_model
from examples.llm.models.huggingface_files import HuggingFaceModel
from examples.llm.models.huggingface_names import module_names
from examples.llm.models.tokenizer import SpecialTokens
from optax_lowbit import qlora

pytest.importorskip("safetensors", reason="safetensors is missing")

CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 8,
    "intermediate_size": 12,
    "max_position_embeddings": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": True,
    "vocab_size": 16,
}
BERT = {"model_type": "bert", "hidden_act": "gelu"}


@pytest.fixture(scope="module")
def models(shared_dir):
    return shared_dir / "golden" / "models"


@nnx.jit
def forward(decoder, tokens):
    return decoder(tokens)


def assert_logits(decoder, recorded, name):
    """Of the row that is not padded."""
    tokens, mask = recorded[f"{name}/input_ids"], recorded[f"{name}/attention_mask"]
    assert mask[0].all()
    logits = forward(decoder, jnp.asarray(tokens[:1]))
    np.testing.assert_allclose(logits[0], recorded[f"{name}/logits"][0], rtol=1e-4, atol=2e-5)


def test_logits_of_4_bits_are_those_recorded(models):
    stored = HuggingFaceModel(models / "llama_bnb_nf4_dq")
    decoder = build_model(abstract_model(stored.config)[0], stored.parameters())
    decoder = qlora.quantize_model(decoder, targets="^$")  # those that are in 4 bits already
    down = decoder.layers.feed_forward.down
    assert isinstance(down.kernel.get_value(), qlora.QuantizedMatrix)
    assert down.kernel.get_value().shape == (2, 172, 64)
    assert_logits(decoder, np.load(models / "io_bnb.npz"), "llama_bnb_nf4_dq")


def test_a_checkpoint_quantized_on_the_way(models):
    folder = models / "llama"
    spec = dataclasses.replace(qlora.NF4, double_quant=False)
    tensors = qlora.quantize_checkpoint(folder, spec, targets=r"_proj\.weight$")
    layers = HuggingFaceModel(folder, tensors).parameters()["layers"]
    shapes = {("attention", "key"): (2, 64, 32), ("feed_forward", "up"): (2, 64, 172)}
    for (block, name), shape in shapes.items():
        kernel = layers[block][name]["kernel"]
        assert isinstance(kernel, qlora.QuantizedMatrix)
        assert (kernel.shape, kernel.spec) == (shape, spec)


@pytest.mark.parametrize("name", ["lora_qv", "lora_all_linear", "rslora_qv", "dora_all_linear"])
def test_logits_with_adapters_are_those_recorded(models, name):
    stored, recorded = HuggingFaceModel(models / "llama"), np.load(models / "io_peft.npz")
    parameters, adapter = stored.parameters(), qlora.read_adapter(models / name)
    lora, leaves = qlora.from_peft(adapter, module_names(stored.config))
    assert len(jax.tree.leaves(leaves)) == (21 if lora.use_dora else 2 * len(leaves))
    graph, _ = abstract_model(stored.config)
    beside = lora.wrap(build_model(graph, parameters), key=0)
    lora.update(beside, leaves)
    assert_logits(beside, recorded, name)
    merged = lora.merge(parameters, leaves)
    assert_logits(build_model(graph, merged), recorded, name)
    if f"{name}/merged_q_proj_layer0" in recorded:
        query = merged["layers"]["attention"]["query"]["kernel"][0]
        expected = recorded[f"{name}/merged_q_proj_layer0"]
        np.testing.assert_allclose(query.T, expected, rtol=1e-5, atol=1e-6)


def write_model(folder, change_tensors=lambda tensors: None, **fields):
    tensors = {
        "model.embed_tokens.weight": np.ones((16, 8), np.float32),
        "model.norm.weight": np.ones(8, np.float16),
    }
    shapes = {
        "self_attn.q_proj": (8, 8),
        "self_attn.k_proj": (4, 8),
        "self_attn.v_proj": (4, 8),
        "self_attn.o_proj": (8, 8),
        "mlp.gate_proj": (12, 8),
        "mlp.up_proj": (12, 8),
        "mlp.down_proj": (8, 12),
        "input_layernorm": (8,),
        "post_attention_layernorm": (8,),
    }
    for layer in range(2):
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(shape, jnp.bfloat16)
    change_tensors(tensors)
    qlora.write_bitsandbytes(folder, tensors, config={**CONFIG, **fields})
    return folder


def test_older_fields_and_tied_embeddings(tmp_path):
    model = HuggingFaceModel(write_model(tmp_path))
    assert model.config.rotary_base == 500.0
    assert model.config.head_size == 4
    assert "head" not in model.parameters()
    assert module_names(model.config)["layers/attention/query/kernel"] == (
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    )


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"model_type": "mamba"}, 'model_type must be one of llama, .*, is "mamba"'),
        ({"model_type": None}, "model_type must be one of .*, is null"),
        ({"model_type": "opt", "activation_function": "gelu"}, "activation_function must be"),
        ({"model_type": "opt", "layer_norm_elementwise_affine": False}, "must be true, is false"),
        ({"model_type": "opt", "num_attention_heads": 3}, "num_attention_heads must be a divisor"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be an int of at"),
        ({"model_type": "mistral", "layer_types": ["full_attention"]}, "layer_types must be null"),
        ({"model_type": "mistral", "num_key_value_heads": None}, "num_key_value_heads must be"),
        ({**BERT, "position_embedding_type": "relative_key"}, 'must be "absolute"'),
        ({**BERT, "is_decoder": True}, "is_decoder must be false"),
        ({**BERT, "add_cross_attention": True}, "add_cross_attention must be false"),
        ({**BERT, "hidden_act": "gelu_new"}, 'hidden_act must be "gelu"'),
        ({**BERT, "tie_word_embeddings": False}, "tie_word_embeddings must be true"),
        (
            {**BERT, "model_type": "roberta", "max_position_embeddings": 2},
            "context_length must be at le",
        ),
        (
            {"model_type": "roberta", "architectures": ["RobertaForTokenClassification"]},
            "architectures must be one of RobertaModel, .* in a list",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures must be one of L"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be one of LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, 'hidden_act must be "silu"'),
        ({"attention_bias": 1}, "attention_bias must be true or false, is 1"),
        ({"attention_bias": True}, r"has no tensor model\.layers\.0\.self_attn\.\w_proj\.bias"),
        ({"mlp_bias": True}, r"has no tensor model\.layers\.0\.mlp\.\w+_proj\.bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0, is 0.5"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling.rope_type must be one of default"),
        ({"rope_scaling": {"type": "yarn"}}, r"rope_scaling\.type must be .*, is \"yarn\""),
        ({"rope_parameters": {"rope_type": "llama3"}}, r"rope_parameters\.factor must be a posi"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, r"factor must be a positive"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor must be 1"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            r"rope_scaling\.high_freq_factor must be above low_freq_factor, 4.0, is 4",
        ),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        ({"rope_theta": "x"}, "rope_theta must be a positive number"),
        ({"hidden_size": -1}, "hidden_size must be an int of at least 1, is -1"),
        ({"hidden_size": None}, "hidden_size must be an int of at least 1, is null"),
        ({"hidden_size": 2**40}, "hidden_size must be an int of at least 1, is 1099511627776"),
        ({"head_dim": 5}, "head_size must be even, got 5"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers must be at most 20"),
        ({"num_hidden_layers": 3}, r"has no tensor model\.layers\.2\.self_attn\.k_proj\.weight"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_heads must be a multiple"),
        ({"intermediate_size": 2**30}, r"down_proj\.weight must be for \(1073741824, 8\)"),
        ({"tie_word_embeddings": False}, "has no tensor lm_head.weight"),
    ],
)
def test_fields_that_no_model_has(tmp_path, fields, complaint):
    write_model(tmp_path, **fields)
    with pytest.raises(UsageError, match=complaint) as error:
        HuggingFaceModel(tmp_path).parameters()
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda t: t.update({"model.norm.weight": np.ones(9)}),
            r"model\.norm\.weight must be for \(8,\)",
        ),
        (
            lambda t: t.update(
                {"model.layers.1.self_attn.q_proj.weight": qlora.quantize_matrix(jnp.ones((8, 8)))}
            ),
            r"self_attn\.q_proj\.weight must be stored in the same way in all layers",
        ),
        (
            lambda t: t.update(
                {"model.embed_tokens.weight": qlora.quantize_matrix(jnp.ones((8, 16)))}
            ),
            r"model\.embed_tokens\.weight must be in floats",
        ),
        (  # as LLM.int8 has them
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.ones((12, 8), np.int8)}),
            r"mlp\.up_proj\.weight must be in floats",
        ),
    ],
)
def test_tensors_that_the_decoder_has_not(tmp_path, change, complaint):
    write_model(tmp_path, change)
    with pytest.raises(UsageError, match=complaint):
        HuggingFaceModel(tmp_path).parameters()


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(UsageError, match="--model: cannot read"):
        HuggingFaceModel(tmp_path)
    write_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(UsageError, match="must be a JSON object"):
        HuggingFaceModel(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UsageError, match=r"has no config\.json"):
        HuggingFaceModel(tmp_path)


def test_a_file_that_ends_early(tmp_path):
    path = write_model(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match=f"--model: cannot read {tmp_path}: {path}: .*incomplete"):
        HuggingFaceModel(tmp_path)


BYTE_PAIRS = {"a": 0, "b": 1, "ab": 2, "</s>": 3, "<pad>": 4, "<mask>": 5}


def test_the_tokenizer_of_an_opt_of_two_files(tmp_path):
    """Which alone do not say that a text has a token in front."""
    write_model(tmp_path, bos_token_id=3, eos_token_id=[3, 4])
    (tmp_path / "vocab.json").write_text(json.dumps(BYTE_PAIRS))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    model = HuggingFaceModel(tmp_path)
    assert model.tokenizer().encode("abba</s>").ids == [2, 1, 0, 3]
    assert model.special_tokens() == SpecialTokens(None, 3, pad=4, mask=5)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    assert model.special_tokens() == SpecialTokens(3, 3, pad=4, mask=5)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "has no tokenizer.json, nor vocab.txt, nor vocab.json and merges.txt"),
        ({"vocab.json": '{"a": 0}'}, "has no tokenizer.json, nor vocab.txt, nor"),
        ({"tokenizer.json": "{"}, "cannot read .*tokenizer.json: "),
        ({"vocab.txt": "a\nb"}, "cannot read .*vocab.txt: sep_token not found"),
        (
            {"vocab.json": "{}", "merges.txt": "a b"},
            "cannot read .*vocab.json: .*out of vocabulary",
        ),
        ({"vocab.txt": "a", "tokenizer_config.json": "[1]"}, r"g\.json must hold an object"),
        (
            {"vocab.txt": "a", "tokenizer_config.json": "[" * 100_000},
            r"cannot read .*tokenizer_config\.json: maximum recursion",
        ),
        (
            {"vocab.txt": "a", "tokenizer_config.json": " " * (2**24 + 1)},
            r"tokenizer_config\.json must have at most 16777216 bytes",
        ),
        ({"vocab.txt": "a", "tokenizer_config.json": "{"}, r"cannot read .*tokenizer_config\.json"),
    ],
)
def test_folders_without_a_tokenizer(tmp_path, files, complaint):
    write_model(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=f"^--model: .*{complaint}"):
        HuggingFaceModel(tmp_path).tokenizer()
