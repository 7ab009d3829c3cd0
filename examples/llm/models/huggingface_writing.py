"""Models written as Hugging Face's folders, which this program and transformers open."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from examples.llm.errors import UsageError
from examples.llm.models.config import DecoderConfig, EncoderConfig, ModelConfig
from examples.llm.models.gguf_files import GGUFModel
from examples.llm.models.huggingface_config import ARCHITECTURES
from examples.llm.models.huggingface_files import HuggingFaceModel
from examples.llm.models.huggingface_names import names_of
from examples.llm.models.json_files import read_object
from examples.llm.models.llama2c_files import Llama2cModel
from examples.llm.models.parameters import tensors_of
from examples.llm.models.rotary import UNSCALED, Linear
from examples.llm.models.tokenizer import SpecialTokens
from optax_lowbit import qlora

_CONFIG = "config.json"
# What else a folder may have beside weights: all of its tokenizer, and how text is written.
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


class FolderWriter:
    """Writes models that were trained of the one in a file or folder."""

    def __init__(self, source: Path, stored: GGUFModel | HuggingFaceModel | Llama2cModel):
        """Reads, of the file or folder, whatever is not weights.

        Args:
          source: the file or folder.
          stored: the model in it, as it was before training.

        Raises:
          UsageError: it can't be read, or no `config.json` could describe the model.
        """
        self._config: ModelConfig = stored.config
        if source.is_dir():
            self._fields = read_object(source / _CONFIG)
            found = (source / name for name in _COPIED)
            self._files = {path.name: path.read_bytes() for path in found if path.is_file()}
        else:
            special = stored.special_tokens()
            self._fields = _llama_fields(stored.config, special)
            self._files = _tokenizer_files(stored.tokenizer(), special)

    def write(self, folder: Path, config: ModelConfig, parameters: Any) -> None:
        """Write `config.json`, safetensors and the tokenizer's files.

        Args:
          folder: is created.
          config: the shape of the model, which is its source's but for an encoder's head.
          parameters: in the nested dict that the model takes; they keep their dtypes.
        """
        tensors = tensors_of(names_of(config), parameters)
        fields = self._fields_of(config, str(parameters["embedding"]["embedding"].dtype))
        # It writes plain files where no matrix is in 4 bits.
        qlora.write_bitsandbytes(folder, tensors, config=fields)
        for name, content in self._files.items():
            (folder / name).write_bytes(content)

    def _fields_of(self, config: ModelConfig, dtype: str) -> dict[str, Any]:
        """Those of the source, but for what training has changed."""
        head = config.head if isinstance(config, EncoderConfig) else None
        classes = ARCHITECTURES[config.family.name]
        fields = {
            **self._fields,
            "architectures": [next(name for name in classes if classes[name] == head)],
            "torch_dtype": dtype,  # the name that every transformers reads
        }
        fields.pop("dtype", None)
        if isinstance(config, EncoderConfig) and head == "classes":
            fields["problem_type"] = "single_label_classification"
            if config != self._config:
                labels = [f"LABEL_{number}" for number in range(config.num_classes)]
                fields["id2label"] = {str(number): label for number, label in enumerate(labels)}
                fields["label2id"] = {label: number for number, label in enumerate(labels)}
                fields.pop("num_labels", None)
        return fields


def _llama_fields(config: DecoderConfig, special: SpecialTokens) -> dict[str, Any]:
    """The `config.json` of a LLaMA that comes from a file of another kind."""
    scaling = config.rotary_scaling
    if isinstance(scaling, Linear):
        linear = {"rope_type": "linear", "factor": scaling.factor}
    elif scaling == UNSCALED:
        linear = None
    else:
        raise UsageError(
            "--save-model: the model divides each rotary frequency by a number of its own, for "
            "which config.json has no field"
        )
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.feed_forward_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary_base,
        "rope_scaling": linear,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.feed_forward_bias,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": special.begin,
        "eos_token_id": special.end,
        "pad_token_id": special.pad,
    }


def _tokenizer_files(tokenizer: Tokenizer, special: SpecialTokens) -> dict[str, bytes]:
    """A tokenizer that puts the first special token in front of a text itself."""
    settings: dict[str, str | None] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, token in (("bos", special.begin), ("eos", special.end), ("pad", special.pad)):
        if token is not None:
            settings[f"{name}_token"] = tokenizer.id_to_token(token)
    if special.begin is not None:
        begin = settings["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[begin, "$A"],
            pair=[begin, "$A", begin, "$B:1"],
            special_tokens=[(begin, special.begin)],
        )
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
    }
