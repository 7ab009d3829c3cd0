"""Models in Hugging Face's folders: floats, or 4 bits of bitsandbytes."""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from examples.llm.errors import UsageError
from examples.llm.models.config import EncoderConfig
from examples.llm.models.config_fields import ConfigFields
from examples.llm.models.huggingface_config import read_config
from examples.llm.models.huggingface_names import PREFIXES, names_of
from examples.llm.models.huggingface_tokenizers import (
    known_token,
    puts_in_front,
    read_tokenizer,
)
from examples.llm.models.parameters import Keep, as_read, read_parameters
from examples.llm.models.tokenizer import SpecialTokens
from optax_lowbit import qlora

# What transformers draws the matrices of a new head with, unless `config.json` says otherwise.
_DEVIATION = 0.02
# Endings of names, and what they were in the files of the first BERT models.
_OLD_NAMES = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))


class HuggingFaceModel:
    """A model in a folder of `config.json` and safetensors files, in one or several.

    Weights are in float32, float16 or bfloat16, and matrices may be in 4 bits of bitsandbytes.

    Attributes:
      config: its shape.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Any] | None = None):
        """Opens a folder; `tensors`, if given, are in place of those in it.

        Raises:
          UsageError: it can't be read, or holds a model that is not supported.
        """
        self._folder = folder
        try:
            files = qlora.read_bitsandbytes(folder)
        except (OSError, ValueError) as error:
            raise UsageError(f"--model: cannot read {folder}: {error}") from error
        if not (folder / "config.json").exists():
            raise UsageError(f"--model: {folder} has no config.json")
        self._tensors = files if tensors is None else tensors
        self._fields = ConfigFields(folder / "config.json", files.config)
        self.config: Any = read_config(self._fields)
        if self.config.num_layers > len(self._tensors):
            right = f"at most {len(self._tensors)}, the tensors"
            raise self._fields.wrong("num_hidden_layers", right)
        # Of a head that is made: what it is drawn with, and whether all of it is.
        self._random: np.random.Generator | None = None
        self._new_output = False

    def with_classes(self, count: int, seed: int = 0) -> "HuggingFaceModel":
        """Return the encoder with a head that tells `count` classes apart.

        What the files have of the head is taken, if it is for as many classes; the rest is new.

        Raises:
          UsageError: it is no encoder.
        """
        config, other = self.config, copy.copy(self)
        if not isinstance(config, EncoderConfig):
            raise self._fields.wrong("model_type", "that of an encoder, roberta or bert")
        other.config = dataclasses.replace(config, head="classes", num_classes=count)
        other._random = np.random.default_rng(seed)
        other._new_output = config.head != "classes" or config.num_classes != count
        return other

    def parameters(self, keep: Keep = as_read) -> dict[str, Any]:
        """Return the weights as float32 arrays, in the nested dict that the model takes.

        Layer weights are stacked `(num_layers, in, out)`; an embedding is `(rows, size)`. Matrices
        in 4 bits are `QuantizedMatrix`, stacked. `keep` makes something else of each tensor as it
        is read.
        """
        return read_parameters(self.config, names_of(self.config), self._read, keep)

    def tokenizer(self) -> Tokenizer:
        """What turns text into the model's tokens.

        Raises:
          UsageError: there is none, or it can't be read.
        """
        return read_tokenizer(self._folder)

    def special_tokens(self) -> SpecialTokens:
        """What the model has around a text, and in place of tokens."""
        tokenizer, is_encoder = self.tokenizer(), isinstance(self.config, EncoderConfig)

        def token(role: str, field: str, *, may_be_usual: bool) -> int | None:
            token = self._fields.token(field, self.config.vocabulary_size)
            return known_token(tokenizer, role) if token is None and may_be_usual else token

        begin = token("begin", "bos_token_id", may_be_usual=is_encoder)
        if not (is_encoder or puts_in_front(self._folder, tokenizer, begin)):
            begin = None
        return SpecialTokens(
            begin,
            token("end", "eos_token_id", may_be_usual=is_encoder),
            token("pad", "pad_token_id", may_be_usual=True),
            known_token(tokenizer, "mask"),
        )

    def _read(self, path: str, name: str, shape: tuple[int, ...]) -> Any:
        """A tensor, `(in, out)`, floats as float32; or a part of a new head."""
        found = self._found(name)
        is_new = found is None or (self._new_output and path.startswith("head/output/"))
        if is_new and self._random is not None and path.startswith("head/"):
            return self._drawn(self._random, shape)
        if found is None:
            raise UsageError(f"--model: {self._folder} has no tensor {name}")
        try:
            weight = self._tensors[found]
        except ValueError as error:
            raise UsageError(f"--model: {error}") from error
        is_kernel = path.endswith("/kernel")
        is_quantized = isinstance(weight, qlora.QuantizedMatrix)
        if (is_quantized and not is_kernel) or not jnp.issubdtype(weight.dtype, jnp.floating):
            raise UsageError(f"--model: {self._folder}: {name} must be in floats")
        if not is_quantized:
            weight = np.asarray(weight, np.float32)
            weight = weight.T if is_kernel else weight
        if weight.shape != shape:
            raise UsageError(
                f"--model: {self._folder}: {name} must be for {shape}, as config.json has it, "
                f"is for {weight.shape}"
            )
        return weight

    def _found(self, name: str) -> str | None:
        """What the files call a tensor: those of models without heads have no prefix."""
        short = name.removeprefix(PREFIXES[self.config.family.name])
        for known in (name, short):
            for new, old in (("", ""), *_OLD_NAMES):
                if known.endswith(new) and known.removesuffix(new) + old in self._tensors:
                    return known.removesuffix(new) + old
        return None

    def _drawn(self, random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.zeros(shape, np.float32)
        deviation = self._fields.number("initializer_range", _DEVIATION)
        return np.float32(deviation) * random.standard_normal(shape, np.float32)
