"""From the fields of a `config.json` to the shape of a model.

Every field that changes the numbers is read, or refused where it asks for something else.
"""

from collections.abc import Callable, Mapping
from typing import Any

from examples.llm.errors import UsageError
from examples.llm.models.config import DecoderConfig, EncoderConfig
from examples.llm.models.config_fields import ConfigFields
from examples.llm.models.families import BERT, LLAMA, MISTRAL, OPT, ROBERTA
from examples.llm.models.rotary import UNSCALED, DynamicNTK, Linear, Llama3, RotaryScaling

_ROTARY = ("default", "linear", "dynamic", "llama3")
# The classes that models are saved from, and what an encoder is asked for by each, by `model_type`.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"LlamaForCausalLM": None},
    "mistral": {"MistralForCausalLM": None},
    "opt": {"OPTForCausalLM": None},
    "roberta": {
        "RobertaModel": None,
        "RobertaForMaskedLM": "masked-lm",
        "RobertaForSequenceClassification": "classes",
    },
    "bert": {
        "BertModel": None,
        "BertForMaskedLM": "masked-lm",
        "BertForPreTraining": "masked-lm",
        "BertForSequenceClassification": "classes",
    },
}
_OPT_OFFSET = 2  # rows of OPT's table of positions that are in front of the first


def read_config(fields: ConfigFields) -> DecoderConfig | EncoderConfig:
    """Return the shape of a model.

    Raises:
      UsageError: it is of no family that is read, or a field asks for what no model here has.
    """
    read = _READERS[fields.one_of("model_type", _READERS)]
    try:
        return read(fields)
    except ValueError as error:
        # A UsageError, which names the field, is a ValueError, too.
        raise error if isinstance(error, UsageError) else fields.impossible(error) from error


def _sizes(fields: ConfigFields, context_length: int) -> dict[str, Any]:
    """What all families call the same; they differ in the context of a file without that field."""
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    return {
        "vocabulary_size": fields.integer("vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": fields.integer("num_hidden_layers"),
        "num_heads": num_heads,
        "num_key_value_heads": num_heads,
        "head_size": hidden_size // num_heads,
        "context_length": fields.integer("max_position_embeddings", context_length),
    }


def _llama(fields: ConfigFields) -> DecoderConfig:
    _head(fields, "llama")
    return DecoderConfig(
        **_llama_sizes(fields, 2048),
        family=LLAMA,
        attention_bias=fields.flag("attention_bias", False),
        feed_forward_bias=fields.flag("mlp_bias", False),
    )


def _mistral(fields: ConfigFields) -> DecoderConfig:
    _head(fields, "mistral")
    fields.only("layer_types", None)  # layers that differ in what they see
    fields.integer("num_key_value_heads")  # other than in a LLaMA, not num_attention_heads
    # Null is no window, and a file without the field means transformers' default.
    window = None if fields.is_null("sliding_window") else fields.integer("sliding_window", 4096)
    return DecoderConfig(**_llama_sizes(fields, 131072), family=MISTRAL, sliding_window=window)


def _llama_sizes(fields: ConfigFields, context_length: int) -> dict[str, Any]:
    fields.only("hidden_act", "silu")
    fields.only("partial_rotary_factor", 1.0)
    sizes = _sizes(fields, context_length)
    base, scaling = _rotary(fields, sizes["context_length"])
    return {
        **sizes,
        "feed_forward_size": fields.integer("intermediate_size"),
        "num_key_value_heads": fields.integer("num_key_value_heads", sizes["num_heads"]),
        "head_size": fields.integer("head_dim", sizes["head_size"]),
        "norm_epsilon": fields.number("rms_norm_eps", 1e-6),
        "tied_embeddings": fields.flag("tie_word_embeddings", False),
        "rotary_base": base,
        "rotary_scaling": scaling,
    }


def _rotary(fields: ConfigFields, context_length: int) -> tuple[float, RotaryScaling]:
    """Base and variant; older files have the base beside what is now in `rope_parameters`."""
    base = fields.number("rope_theta", 10000.0)
    name = next((name for name in ("rope_scaling", "rope_parameters") if name in fields), None)
    if name is None:
        return base, UNSCALED
    rope = fields.part(name)
    rope.only("partial_rotary_factor", 1.0)
    base = rope.number("rope_theta", base)
    key = "type" if "type" in rope and "rope_type" not in rope else "rope_type"
    kind = rope.one_of(key, _ROTARY, "default" if name == "rope_parameters" else None)
    if kind == "default":
        return base, UNSCALED
    factor = rope.number("factor")
    if kind == "linear":
        return base, Linear(factor)
    if kind == "dynamic":
        return base, DynamicNTK(factor, context_length)
    return base, _llama3(fields, rope, factor, context_length)


def _llama3(fields: ConfigFields, rope: ConfigFields, factor: float, length: int) -> Llama3:
    where = fields if "original_max_position_embeddings" in fields else rope
    original = where.integer("original_max_position_embeddings", length)
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.wrong("high_freq_factor", f"above low_freq_factor, {low}")
    return Llama3(factor, low, high, original)


def _opt(fields: ConfigFields) -> DecoderConfig:
    _head(fields, "opt")
    fields.only("activation_function", "relu")
    fields.only("layer_norm_elementwise_affine", True)
    sizes, has_bias = _sizes(fields, 2048), fields.flag("enable_bias", True)
    _check_heads(fields, sizes)
    norm_first = fields.flag("do_layer_norm_before", True)
    return DecoderConfig(
        **sizes,
        family=OPT,
        feed_forward_size=fields.integer("ffn_dim"),
        position_offset=_OPT_OFFSET,
        norm_epsilon=1e-5,
        norm_first=norm_first,
        final_norm=norm_first and not fields.flag("_remove_final_layer_norm", False),
        attention_bias=has_bias,
        feed_forward_bias=has_bias,
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        embedding_size=fields.integer("word_embed_proj_dim", sizes["hidden_size"]),
    )


def _roberta(fields: ConfigFields) -> EncoderConfig:
    offset, head = fields.integer("pad_token_id", 1, least=0) + 1, _head(fields, "roberta")
    return _encoder(fields, family=ROBERTA, position_offset=offset, head=head)


def _bert(fields: ConfigFields) -> EncoderConfig:
    return _encoder(fields, family=BERT, position_offset=0, head=_head(fields, "bert"))


def _encoder(fields: ConfigFields, *, position_offset: int, **others: Any) -> EncoderConfig:
    fields.only("hidden_act", "gelu")
    fields.only("position_embedding_type", "absolute")
    fields.only("is_decoder", False)
    fields.only("add_cross_attention", False)
    fields.only("tie_word_embeddings", True)
    sizes = _sizes(fields, 512)
    _check_heads(fields, sizes)
    sizes["context_length"] -= position_offset
    return EncoderConfig(
        **sizes,
        **others,
        position_offset=position_offset,
        feed_forward_size=fields.integer("intermediate_size"),
        norm_epsilon=fields.number("layer_norm_eps", 1e-12),
        num_token_types=fields.integer("type_vocab_size", 2),
        num_classes=_num_classes(fields),
    )


def _num_classes(fields: ConfigFields) -> int:
    labels = fields.get("id2label")
    if isinstance(labels, Mapping) and labels:
        return len(labels)
    return fields.integer("num_labels", 2)


def _check_heads(fields: ConfigFields, sizes: Mapping[str, Any]) -> None:
    if sizes["hidden_size"] % sizes["num_heads"]:
        raise fields.wrong("num_attention_heads", f"a divisor of {sizes['hidden_size']}")


def _head(fields: ConfigFields, family: str) -> Any:
    """What a model is asked for, by the class that it was saved from."""
    heads = ARCHITECTURES[family]
    classes = fields.get("architectures", [next(iter(heads))])
    if not isinstance(classes, list) or len(classes) != 1 or classes[0] not in heads:
        raise fields.wrong("architectures", f"one of {', '.join(heads)} in a list")
    return heads[classes[0]]


_READERS: dict[str, Callable[[ConfigFields], DecoderConfig | EncoderConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "opt": _opt,
    "roberta": _roberta,
    "bert": _bert,
}
