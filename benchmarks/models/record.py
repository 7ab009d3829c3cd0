"""Writes `tests/golden/models.json` and `models.npz`: what transformers computes.

``python -m benchmarks.models.record`` needs torch and transformers; the versions of what is
stored are in `tests/golden/README.md`. A new family, or a variant of one, is an entry of
`VARIANTS`.
"""

import json
from typing import Any

import numpy as np

from benchmarks.models.recorded import GOLDEN, weight

SIZES: dict[str, Any] = dict(
    vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=32, pad_token_id=1,
)  # fmt: skip
LLAMA = dict(**SIZES, intermediate_size=20, num_key_value_heads=2)
OPT = dict(**SIZES, ffn_dim=20)
ROBERTA = dict(**SIZES, intermediate_size=20)
BERT = dict(**ROBERTA, type_vocab_size=2)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=20.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=2.0,
    original_max_position_embeddings=16,
)  # fmt: skip

# The class of a model, and the fields of its config.
VARIANTS = {
    "llama": ("LlamaForCausalLM", dict(LLAMA, rms_norm_eps=1e-5)),
    "llama biases": (
        "LlamaForCausalLM",
        dict(LLAMA, attention_bias=True, mlp_bias=True, head_dim=6, tie_word_embeddings=True),
    ),
    "llama linear": (
        "LlamaForCausalLM",
        dict(LLAMA, rope_parameters=dict(rope_type="linear", rope_theta=100.0, factor=2.5)),
    ),
    "llama llama3": (
        "LlamaForCausalLM",
        dict(LLAMA, num_attention_heads=2, num_key_value_heads=1, rope_parameters=LLAMA3),
    ),
    "llama dynamic": (
        "LlamaForCausalLM",
        dict(
            LLAMA,
            max_position_embeddings=8,
            rope_parameters=dict(rope_type="dynamic", rope_theta=100.0, factor=2.0),
        ),
    ),
    "mistral": ("MistralForCausalLM", dict(LLAMA, sliding_window=5)),
    "mistral no window": ("MistralForCausalLM", dict(LLAMA, sliding_window=None)),
    "opt": ("OPTForCausalLM", OPT),
    "opt post-norm": (
        "OPTForCausalLM",
        dict(OPT, do_layer_norm_before=False, word_embed_proj_dim=12),
    ),
    "opt no biases": (
        "OPTForCausalLM",
        dict(OPT, enable_bias=False, _remove_final_layer_norm=True, tie_word_embeddings=False),
    ),
    "roberta mlm": ("RobertaForMaskedLM", ROBERTA),
    "roberta classes": ("RobertaForSequenceClassification", dict(ROBERTA, num_labels=3)),
    "bert mlm": ("BertForMaskedLM", BERT),
    "bert classes": ("BertForSequenceClassification", dict(BERT, num_labels=3)),
}


def model_of(class_name: str, fields: dict[str, Any], dtype: str) -> tuple[Any, dict[str, Any]]:
    """A model with the weights of `recorded.weight`, and the shapes of what it would save."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**fields, architectures=[class_name])
    # Made in the dtype, as a file is loaded: what is no weight stays in float32.
    kind = {"dtype": getattr(torch, dtype), "attn_implementation": "eager"}
    model, shapes = model_class._from_config(config, **kind).eval(), {}
    with torch.no_grad():
        # Without the names that are tied to others.
        for name, parameter in model.named_parameters():
            shapes[name] = list(parameter.shape)
            parameter.copy_(torch.from_numpy(weight(name, shapes[name])))
    return model, shapes


def inputs_of(model_type: str) -> dict[str, np.ndarray]:
    """Two texts, of which the second is padded, a decoder's in front."""
    is_encoder = model_type in ("roberta", "bert")
    tokens = np.random.RandomState(0).randint(2, 24, (2, 10))
    mask, padding = np.ones_like(tokens), slice(7, 10) if is_encoder else slice(0, 3)
    mask[1, padding], tokens[1, padding] = 0, 1
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if model_type == "bert":
        inputs["token_type_ids"] = np.tile(np.arange(10) > 4, (2, 1)).astype(int)
    return inputs


def main() -> None:
    """Records all variants."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    stored, arrays = {}, {}
    for variant, (class_name, fields) in VARIANTS.items():
        for dtype in ("bfloat16", "float32"):
            model, shapes = model_of(class_name, fields, dtype)
            inputs = inputs_of(model.config.model_type)
            with torch.no_grad():
                logits = model(**{name: torch.from_numpy(x) for name, x in inputs.items()}).logits
            if dtype == "bfloat16":
                arrays[f"{variant}/logits_bfloat16"] = logits.view(torch.uint16).numpy()
            else:
                arrays[f"{variant}/logits"] = logits.numpy()
        arrays |= {f"{variant}/{name}": value.astype(np.int32) for name, value in inputs.items()}
        stored[variant] = {"config": model.config.to_diff_dict(), "shapes": shapes}
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in stored.items())
    (GOLDEN / "models.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    np.savez_compressed(GOLDEN / "models.npz", **arrays)


if __name__ == "__main__":
    main()
