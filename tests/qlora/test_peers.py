"""What we write is read by transformers, PEFT and bitsandbytes themselves."""

import importlib.util
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.models.recorded import Recorded
from examples.llm.models.building import abstract_model
from examples.llm.models.huggingface_files import HuggingFaceModel
from examples.llm.models.huggingface_names import module_names
from examples.llm.training.tuning import save_adapter, tuned
from optax_lowbit import QuantSpec, adapters, qlora

TOKENS = [3, 7, 4, 8, 5, 9, 2, 6]  # none of them stands for padding
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "float32",
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    # Of rows that are no whole blocks, bitsandbytes' kernel for CPUs takes wrong scales.
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 32,
}
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
    "input_layernorm": (64,),
    "post_attention_layernorm": (64,),
}


pytestmark = pytest.mark.slow


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"{', '.join(missing)}: see benchmarks/requirements-peers.txt"
    )


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)

    def normal(shape):
        return 0.15 * rng.standard_normal(shape).astype(np.float32)

    tensors = {"model.embed_tokens.weight": normal((32, 64)), "lm_head.weight": normal((32, 64))}
    tensors["model.norm.weight"] = 1 + normal((64,))
    for layer in range(2):
        for name, shape in SHAPES.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = normal(shape) + (len(shape) == 1)
    return tensors


def theirs(tmp_path, folder, adapter="-"):
    script = pathlib.Path(__file__).with_name("logits_by_transformers.py")
    out = tmp_path / "logits.npy"
    arguments = [folder, adapter, out, *TOKENS]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(out)


def ours(folder, change=lambda parameters: parameters):
    model = HuggingFaceModel(folder)
    graph, _ = abstract_model(model.config)
    decoder = nnx.merge(graph, nnx.State(change(model.parameters())))
    return decoder(jnp.asarray([TOKENS]))[0]


def in_floats(parameters):
    def visit(x):
        return x.dequantize() if isinstance(x, qlora.QuantizedMatrix) else x

    return jax.tree.map(visit, parameters, is_leaf=lambda x: isinstance(x, qlora.QuantizedMatrix))


@needs("peft", "transformers", "torch")
@pytest.mark.parametrize("use_rslora", [False, True])
def test_adapters_are_loaded_by_peft(tmp_path, weights, use_rslora):
    qlora.write_bitsandbytes(tmp_path / "model", weights, config=CONFIG, max_shard_bytes=100_000)
    model = HuggingFaceModel(tmp_path / "model")
    names = module_names(model.config)
    lora = adapters.LoRA(rank=4, alpha=8, targets="attention/(query|output)|down")
    leaves = lora.init(model.parameters(), key=0)
    leaves = {
        path: {"a": x["a"], "b": jax.random.normal(jax.random.key(1), x["b"].shape)}
        for path, x in leaves.items()
    }
    alpha = 4 if use_rslora else 8  # 4 / sqrt(4) = 8 / 4
    config = qlora.AdapterConfig(r=4, lora_alpha=alpha, use_rslora=use_rslora)
    adapter = qlora.Adapter(config=config, matrices=qlora.adapter_matrices(leaves, names))
    qlora.write_adapter(tmp_path / "adapter", adapter)

    expected = ours(tmp_path / "model", lambda parameters: lora.merge(parameters, leaves))
    plain = theirs(tmp_path, tmp_path / "model")
    np.testing.assert_allclose(plain, ours(tmp_path / "model"), rtol=1e-4, atol=2e-5)
    logits = theirs(tmp_path, tmp_path / "model", tmp_path / "adapter")
    assert np.abs(logits - plain).max() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=2e-5)


@needs("peft", "transformers", "torch")
def test_magnitudes_and_whole_modules_are_loaded_by_peft(tmp_path, weights, rng):
    qlora.write_bitsandbytes(tmp_path / "model", weights, config=CONFIG)
    module, w = "model.layers.1.mlp.up_proj", weights["model.layers.1.mlp.up_proj.weight"]
    arrays = {
        "a": rng.standard_normal((2, 64), np.float32),
        "b": rng.standard_normal((2, 128), np.float32),
        "magnitude": rng.random(128, np.float32) + 1,
    }
    head = rng.standard_normal((32, 64), np.float32)
    config = qlora.AdapterConfig(
        r=8, lora_alpha=6, rank_pattern={"up_proj": 2}, use_dora=True, modules_to_save=("lm_head",)
    )
    qlora.write_adapter(
        tmp_path / "adapter",
        qlora.Adapter(config=config, matrices={module: arrays}, others={"lm_head.weight": head}),
    )

    moved = w + config.scaling(module) * arrays["b"].T @ arrays["a"]
    moved *= (arrays["magnitude"] / np.linalg.norm(moved, axis=1))[:, None]
    merged = {**weights, f"{module}.weight": moved, "lm_head.weight": head}
    qlora.write_bitsandbytes(tmp_path / "merged", merged, config=CONFIG)
    logits = theirs(tmp_path, tmp_path / "model", tmp_path / "adapter")
    np.testing.assert_allclose(logits, ours(tmp_path / "merged"), rtol=1e-4, atol=5e-5)


@needs("peft", "transformers", "torch")
@pytest.mark.parametrize("variant", ["mistral", "opt post-norm", "roberta classes", "bert classes"])
def test_what_is_tuned_of_all_families_is_loaded_by_peft(tmp_path, variant):
    folder = Recorded().write(variant, tmp_path / "model")
    stored = HuggingFaceModel(folder)
    graph, _ = abstract_model(stored.config)
    tuning = tuned("lora", graph, stored.parameters(), 0)
    rng = np.random.default_rng(0)
    trained = jax.tree.map(
        lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), tuning.trainable
    )
    save_adapter(tmp_path / "adapter", tuning, trained)
    model, tokens = tuning.model(trained, tuning.frozen), jnp.asarray([TOKENS])
    is_classifier = hasattr(model, "class_logits")
    expected = model.class_logits(tokens) if is_classifier else model(tokens)

    plain, logits = (theirs(tmp_path, folder, x) for x in ("-", tmp_path / "adapter"))
    assert np.abs(logits - plain).max() > 0.1
    np.testing.assert_allclose(logits, expected[0], rtol=1e-4, atol=2e-5)


@needs("bitsandbytes", "transformers", "torch")
@pytest.mark.parametrize(
    ("quant_type", "nested", "storage", "block"),
    [("nf4", True, "uint8", 64), ("fp4", False, "uint8", 32), ("nf4", False, "bfloat16", 64)],
)
def test_models_in_4_bits_are_loaded_by_bitsandbytes(
    tmp_path, weights, quant_type, nested, storage, block
):
    spec = QuantSpec(
        codebook=quant_type,
        bits=4,
        signed=True,
        scaling="block",
        block_size=block,
        double_quant="offset" if nested else False,
    )
    qlora.write_bitsandbytes(tmp_path / "floats", weights, config=CONFIG)
    quantized = qlora.quantize_checkpoint(
        tmp_path / "floats", spec, targets=r"_proj\.weight$", exclude="k_proj|head"
    )
    config = {**CONFIG, "quantization_config": {"bnb_4bit_quant_storage": storage}}
    qlora.write_bitsandbytes(tmp_path / "model", quantized, config=config)
    expected = ours(tmp_path / "model", in_floats)
    logits = theirs(tmp_path, tmp_path / "model")
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=5e-5)
