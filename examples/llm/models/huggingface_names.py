"""What Hugging Face calls the modules of each family, by their paths in our parameters.

Names are those of the PyTorch modules, as files and PEFT have them; `{}` is the number of a layer.
"""

from collections.abc import Mapping

from flax.traverse_util import flatten_dict

from examples.llm.models.building import abstract_model
from examples.llm.models.config import EncoderConfig, ModelConfig

# In front of the names of all modules but the heads. Files of a model without a head leave it out.
PREFIXES = {
    "llama": "model.",
    "mistral": "model.",
    "opt": "model.",
    "roberta": "roberta.",
    "bert": "bert.",
}

_LLAMA = {
    "embedding": "model.embed_tokens",
    "layers/attention_norm": "model.layers.{}.input_layernorm",
    "layers/attention/query": "model.layers.{}.self_attn.q_proj",
    "layers/attention/key": "model.layers.{}.self_attn.k_proj",
    "layers/attention/value": "model.layers.{}.self_attn.v_proj",
    "layers/attention/output": "model.layers.{}.self_attn.o_proj",
    "layers/feed_forward_norm": "model.layers.{}.post_attention_layernorm",
    "layers/feed_forward/gate": "model.layers.{}.mlp.gate_proj",
    "layers/feed_forward/up": "model.layers.{}.mlp.up_proj",
    "layers/feed_forward/down": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
_OPT = {
    "embedding": "model.decoder.embed_tokens",
    "positions/table": "model.decoder.embed_positions",
    "project_in": "model.decoder.project_in",
    "layers/attention_norm": "model.decoder.layers.{}.self_attn_layer_norm",
    "layers/attention/query": "model.decoder.layers.{}.self_attn.q_proj",
    "layers/attention/key": "model.decoder.layers.{}.self_attn.k_proj",
    "layers/attention/value": "model.decoder.layers.{}.self_attn.v_proj",
    "layers/attention/output": "model.decoder.layers.{}.self_attn.out_proj",
    "layers/feed_forward_norm": "model.decoder.layers.{}.final_layer_norm",
    "layers/feed_forward/up": "model.decoder.layers.{}.fc1",
    "layers/feed_forward/down": "model.decoder.layers.{}.fc2",
    "final_norm": "model.decoder.final_layer_norm",
    "project_out": "model.decoder.project_out",
    "head": "lm_head",
}
_ENCODER = {
    "embedding": "embeddings.word_embeddings",
    "positions/table": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "layers/attention/query": "encoder.layer.{}.attention.self.query",
    "layers/attention/key": "encoder.layer.{}.attention.self.key",
    "layers/attention/value": "encoder.layer.{}.attention.self.value",
    "layers/attention/output": "encoder.layer.{}.attention.output.dense",
    "layers/attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "layers/feed_forward/up": "encoder.layer.{}.intermediate.dense",
    "layers/feed_forward/down": "encoder.layer.{}.output.dense",
    "layers/feed_forward_norm": "encoder.layer.{}.output.LayerNorm",
}
_HEADS = {
    ("roberta", "masked-lm"): {
        "head": "lm_head",
        "head/dense": "lm_head.dense",
        "head/norm": "lm_head.layer_norm",
    },
    ("bert", "masked-lm"): {
        "head": "cls.predictions",
        "head/dense": "cls.predictions.transform.dense",
        "head/norm": "cls.predictions.transform.LayerNorm",
    },
    ("roberta", "classes"): {
        "head/dense": "classifier.dense",
        "head/output": "classifier.out_proj",
    },
    ("bert", "classes"): {"head/dense": "bert.pooler.dense", "head/output": "classifier"},
}
# PyTorch's modules that the layers on top of an encoder are in, for classes.
CLASS_MODULES = {"roberta": ("classifier",), "bert": ("pooler", "classifier")}
_DECODERS = {"llama": _LLAMA, "mistral": _LLAMA, "opt": _OPT}


def names_of(config: ModelConfig) -> Mapping[str, str]:
    """Return the names of a model's modules, by their paths."""
    family = config.family.name
    if not isinstance(config, EncoderConfig):
        return _DECODERS[family]
    body = {path: PREFIXES[family] + name for path, name in _ENCODER.items()}
    return {**body, **_HEADS.get((family, config.head or ""), {})}


def module_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Return PEFT's names: the PyTorch modules of each stack of matrices, by its path."""
    names, layers = names_of(config), abstract_model(config)[1]["layers"]
    paths = ["/".join(("layers", *path)) for path in flatten_dict(layers) if path[-1] == "kernel"]
    return {
        path: tuple(
            names[path.removesuffix("/kernel")].format(layer) for layer in range(config.num_layers)
        )
        for path in paths
    }
