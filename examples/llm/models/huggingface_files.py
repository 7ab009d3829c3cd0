"""LLaMA models in Hugging Face's folders: floats, or 4 bits of bitsandbytes."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from examples.llm.errors import UsageError
from examples.llm.models.config import DecoderConfig
from examples.llm.models.tokenizer import SpecialTokens
from optax_lowbit import qlora

# Path in the decoder's parameters -> module of a layer. Matrices are (out, in) in the file.
_LAYER_MATRICES = {
    "attention/query/kernel": "self_attn.q_proj",
    "attention/key/kernel": "self_attn.k_proj",
    "attention/value/kernel": "self_attn.v_proj",
    "attention/output/kernel": "self_attn.o_proj",
    "feed_forward/gate/kernel": "mlp.gate_proj",
    "feed_forward/up/kernel": "mlp.up_proj",
    "feed_forward/down/kernel": "mlp.down_proj",
}
_LAYER_SCALES = {
    "attention_norm/scale": "input_layernorm",
    "feed_forward_norm/scale": "post_attention_layernorm",
}
# The names by which `quantize_checkpoint` and PEFT find a layer's matrices.
LAYER_MATRICES = r"\.(self_attn|mlp)\.\w+_proj\.weight$"

# What the decoder has no other of.
_ONLY = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
}


def module_names(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """Return PEFT's names: the PyTorch modules of each stack of matrices, by its path."""
    return {
        f"layers/{path}": tuple(_layer_modules(config, name))
        for path, name in _LAYER_MATRICES.items()
    }


def _layer_modules(config: DecoderConfig, name: str) -> list[str]:
    return [f"model.layers.{layer}.{name}" for layer in range(config.num_layers)]


class HuggingFaceModel:
    """A LLaMA in a folder of `config.json` and safetensors files, in one or several.

    Weights are in float32, float16 or bfloat16, and matrices may be in 4 bits of bitsandbytes.
    The decoder's rotary positions are Hugging Face's, so rows stay in their order.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Any] | None = None):
        """Opens a folder; `tensors`, if given, are in place of those in it."""
        self._folder = folder
        try:
            files = qlora.read_bitsandbytes(folder)
        except (OSError, ValueError) as error:
            raise UsageError(f"--model: cannot read {folder}: {error}") from error
        self._tensors = files if tensors is None else tensors
        self._fields = files.config
        for field, value in _ONLY.items():
            if self._fields.get(field, value) != value or "model_type" not in self._fields:
                raise self._wrong(field, json.dumps(value))
        if self._rope.get("rope_type", "default") != "default":
            raise self._wrong("rope_parameters", "of rope_type default")

    @cached_property
    def config(self) -> DecoderConfig:
        """The shape of the model."""
        hidden_size, num_heads = self._int("hidden_size"), self._int("num_attention_heads")
        try:
            return DecoderConfig(
                vocabulary_size=self._int("vocab_size"),
                hidden_size=hidden_size,
                feed_forward_size=self._int("intermediate_size"),
                num_layers=self._num_layers(),
                num_heads=num_heads,
                num_key_value_heads=self._int("num_key_value_heads", num_heads),
                head_size=self._int("head_dim", hidden_size // max(num_heads, 1)),
                context_length=self._int("max_position_embeddings"),
                rotary_base=self._number(self._rope, "rope_theta", 10000.0),
                norm_epsilon=self._number(self._fields, "rms_norm_eps", 1e-6),
                tied_embeddings=self._fields.get("tie_word_embeddings", False) is True,
            )
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(f"--model: {self._folder / 'config.json'}: {error}") from error

    def parameters(self) -> dict[str, Any]:
        """Return the weights as float32 arrays, in the nested dict that the decoder takes.

        Layer weights are stacked `(num_layers, in, out)`; the embedding is
        `(vocabulary_size, hidden_size)`. Matrices in 4 bits are `QuantizedMatrix`, stacked.
        """
        config = self.config
        width, embedding = config.hidden_size, (config.vocabulary_size, config.hidden_size)
        matrices, scales = config.matrix_shapes(), (width,)
        layers: dict[str, Any] = {}
        for path, name in _LAYER_MATRICES.items():
            _insert(layers, path, self._stacked(name, matrices[path]))
        for path, name in _LAYER_SCALES.items():
            _insert(layers, path, self._stacked(name, scales))
        parameters = {
            "embedding": {"embedding": self._array("model.embed_tokens", embedding)},
            "layers": layers,
            "final_norm": {"scale": self._array("model.norm", scales)},
        }
        if not config.tied_embeddings:
            parameters["head"] = {"kernel": self._array("lm_head", embedding[::-1])}
        return parameters

    def tokenizer(self) -> Tokenizer:
        """What turns text into the model's tokens.

        Raises:
          UsageError: there is no `tokenizer.json`, or it can't be read.
        """
        path = self._folder / "tokenizer.json"
        if not path.is_file():
            raise UsageError(f"--model: {self._folder} has no tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # what the library raises is of no narrower type
            raise UsageError(f"--model: cannot read {path}: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def special_tokens(self) -> SpecialTokens:
        """What the model has around a text."""
        begin, end = self._token("bos_token_id"), self._token("eos_token_id")
        puts_it = begin is not None and begin in self.tokenizer().encode("a").ids
        return SpecialTokens(begin if puts_it else None, end)

    def _token(self, field: str) -> int | None:
        """A token, or the first of several."""
        value = self._fields.get(field)
        value = value[0] if isinstance(value, list) and value else value
        if value is not None and (
            type(value) is not int or not 0 <= value < self._int("vocab_size")
        ):
            raise self._wrong(field, "a token below vocab_size")
        return value

    @property
    def _rope(self) -> dict[str, Any]:
        """`rope_parameters`; older files have its fields among the others."""
        rope = self._fields.get("rope_parameters") or self._fields
        if not isinstance(rope, dict):
            raise self._wrong("rope_parameters", "of rope_type default")
        return rope

    def _stacked(self, name: str, shape: tuple[int, ...]) -> Any:
        modules = _layer_modules(self.config, name)
        weights = [self._host_array(module, shape) for module in modules]
        if len({jax.tree.structure(weight) for weight in weights}) > 1:
            raise UsageError(
                f"--model: {self._folder}: {name} must be stored in the same way in all layers"
            )
        return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *weights)

    def _array(self, module: str, shape: tuple[int, ...]) -> Any:
        return jax.tree.map(jnp.asarray, self._host_array(module, shape))

    def _host_array(self, module: str, shape: tuple[int, ...]) -> Any:
        """A module's weight, `(in, out)`, floats as float32."""
        name = f"{module}.weight"
        if name not in self._tensors:
            raise UsageError(f"--model: {self._folder} has no tensor {name}")
        try:
            weight = self._tensors[name]
        except ValueError as error:
            raise UsageError(f"--model: {error}") from error
        is_lookup = module == "model.embed_tokens"
        if not isinstance(weight, qlora.QuantizedMatrix):
            weight = np.asarray(weight, np.float32)
            weight = weight if is_lookup else weight.T
        elif is_lookup:
            raise UsageError(f"--model: {self._folder}: {name} must be in floats")
        if weight.shape != shape:
            raise UsageError(
                f"--model: {self._folder}: {name} must be for {shape}, as config.json has it, "
                f"is for {weight.shape}"
            )
        return weight

    def _num_layers(self) -> int:
        number = self._int("num_hidden_layers")
        if number > len(self._tensors):
            raise self._wrong("num_hidden_layers", f"at most {len(self._tensors)}, the tensors")
        return number

    def _int(self, field: str, default: int | None = None) -> int:
        value = self._fields.get(field)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            raise self._wrong(field, "a positive int")
        return value

    def _number(self, fields: Mapping[str, Any], field: str, default: float) -> float:
        value = fields.get(field, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise self._wrong(field, "a positive number")
        return float(value)

    def _wrong(self, field: str, right: str) -> UsageError:
        given = json.dumps(self._fields.get(field))[:200]
        return UsageError(
            f"--model: {self._folder / 'config.json'}: {field} must be {right}, is {given}"
        )


def _insert(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value
