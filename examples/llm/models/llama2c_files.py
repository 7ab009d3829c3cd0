"""The models of llama2.c: a header of seven numbers, weights in float32, and a tokenizer beside."""

import math
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from tokenizers import Tokenizer

from examples.llm.errors import UsageError
from examples.llm.models.config import DecoderConfig
from examples.llm.models.gguf_files import half_split_rows
from examples.llm.models.parameters import Keep, as_read, stacked
from examples.llm.models.sentence_pieces import (
    LONGEST_PIECE,
    SPACE,
    sentence_piece_tokenizer,
)
from examples.llm.models.tokenizer import SpecialTokens

_FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
_HEADER = struct.Struct("<7i")
# Of the newer kind of file.
_NEWER = b"24ka"
# The first pieces of a tokenizer; a text is between two of the second.
_SPECIAL: tuple[str, ...] = ("<unk>", "<s>", "</s>")
_UNKNOWN, _BEGIN = 0, 1


class Llama2cModel:
    """A LLaMA in a `.bin` file of llama2.c's first kind.

    Attributes:
      config: its shape.
    """

    def __init__(self, path: Path):
        """Reads the header.

        Raises:
          UsageError: it can't be read, or is no such file.
        """
        self._path = path
        try:
            with path.open("rb") as file:
                header = file.read(_HEADER.size)
            size = path.stat().st_size
        except OSError as error:
            raise UsageError(f"--model: cannot read {path}: {error.strerror}") from error
        if header[:4] == _NEWER:
            raise self._wrong("it is of version 1 or 2, and must be of version 0")
        if len(header) < _HEADER.size:
            raise self._wrong(f"it has {len(header)} bytes, fewer than a header")
        self._fields = dict(zip(_FIELDS, _HEADER.unpack(header), strict=True))
        self.config = self._read_config()
        needed = _HEADER.size + 4 * sum(math.prod(shape) for _, shape in self._tensors())
        if size != needed:
            raise self._wrong(f"it must have {needed} bytes for {self._fields}, has {size}")

    def parameters(self, keep: Keep = as_read) -> dict[str, Any]:
        """Return the weights as float32 arrays, in the nested dict that the decoder takes.

        `keep` makes something else of each tensor as it is read.
        """
        weights = np.memmap(self._path, "<f4", "r", _HEADER.size)
        heads = {"query": self.config.num_heads, "key": self.config.num_key_value_heads}

        def kept(path: str, array: np.ndarray) -> Any:
            *_, module, leaf = path.split("/")
            array = half_split_rows(array, heads[module]) if module in heads else array
            return keep(path, array.T if leaf == "kernel" else array)

        found, start = {}, 0
        for path, shape in self._tensors():
            array = np.asarray(weights[start : start + math.prod(shape)]).reshape(shape)
            start += array.size
            if path.startswith("layers/"):
                found[path] = stacked(path, (kept(path, layer) for layer in array), len(array))
            elif path:
                found[path] = jax.tree.map(jnp.array, kept(path, array))
        return unflatten_dict(found, sep="/")

    def tokenizer(self) -> Tokenizer:
        """What turns text into the model's tokens: `tokN.bin` of N tokens, or `tokenizer.bin`.

        Raises:
          UsageError: there is neither beside the model, or it can't be read.
        """
        count = self.config.vocabulary_size
        paths = [self._path.with_name(name) for name in (f"tok{count}.bin", "tokenizer.bin")]
        path = next(filter(Path.is_file, paths), None)
        if path is None:
            raise self._wrong(f"there is no {paths[0].name} or {paths[1].name} beside it")
        pieces, scores = _read_pieces(path, count)
        return sentence_piece_tokenizer(pieces, scores, special={0, 1, 2}, unknown=_UNKNOWN)

    def special_tokens(self) -> SpecialTokens:
        """What the model has around a text."""
        return SpecialTokens(_BEGIN, _BEGIN)

    def _read_config(self) -> DecoderConfig:
        fields = self._fields
        for name, value in fields.items():
            if value <= 0 and not (name == "vocab_size" and value < 0):
                raise self._wrong(f"{name} must be at least 1, is {value}")
        if fields["dim"] % fields["n_heads"]:
            raise self._wrong(f"n_heads must divide dim, {fields['dim']}, is {fields['n_heads']}")
        try:
            return DecoderConfig(
                vocabulary_size=abs(fields["vocab_size"]),
                hidden_size=fields["dim"],
                feed_forward_size=fields["hidden_dim"],
                num_layers=fields["n_layers"],
                num_heads=fields["n_heads"],
                num_key_value_heads=fields["n_kv_heads"],
                head_size=fields["dim"] // fields["n_heads"],
                context_length=fields["seq_len"],
                norm_epsilon=1e-5,
                tied_embeddings=fields["vocab_size"] > 0,
            )
        except ValueError as error:
            raise self._wrong(str(error)) from error

    def _tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """What is in the file, in order, by paths of parameters; matrices are `(out, in)`."""
        config = self.config
        layers, width, inner = config.num_layers, config.hidden_size, config.feed_forward_size
        embedding = (config.vocabulary_size, width)
        key = config.num_key_value_heads * config.head_size
        angles = config.context_length * config.head_size  # cosines and sines, computed anew
        head = [] if config.tied_embeddings else [("head/kernel", embedding)]
        return [
            ("embedding/embedding", embedding),
            ("layers/attention_norm/scale", (layers, width)),
            ("layers/attention/query/kernel", (layers, width, width)),
            ("layers/attention/key/kernel", (layers, key, width)),
            ("layers/attention/value/kernel", (layers, key, width)),
            ("layers/attention/output/kernel", (layers, width, width)),
            ("layers/feed_forward_norm/scale", (layers, width)),
            ("layers/feed_forward/gate/kernel", (layers, inner, width)),
            ("layers/feed_forward/down/kernel", (layers, width, inner)),
            ("layers/feed_forward/up/kernel", (layers, inner, width)),
            ("final_norm/scale", (width,)),
            ("", (angles,)),
            *head,
        ]

    def _wrong(self, what: str) -> UsageError:
        return UsageError(f"--model: cannot read {self._path}: {what}")


def _read_pieces(path: Path, count: int) -> tuple[list[str], list[float]]:
    """The pieces of a tokenizer, `SPACE` for spaces, and their scores."""

    def wrong(what: str) -> UsageError:
        return UsageError(f"--model: cannot read {path}: {what}")

    try:
        data = path.read_bytes()
    except OSError as error:
        raise wrong(str(error.strerror)) from error
    pieces, scores, at = [*_SPECIAL], [], 4  # after the length of the longest
    for number in range(count):
        if len(data) < at + 8:
            raise wrong(f"it ends before piece {number} of {count}")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= length <= min(4 * LONGEST_PIECE, len(data) - at):
            raise wrong(f"piece {number} has an impossible length, {length}")
        if not math.isfinite(score):
            raise wrong(f"piece {number} must have a finite score, has {score}")
        piece, at = data[at : at + length], at + length
        scores.append(score)
        if number < len(_SPECIAL):
            continue
        try:
            pieces.append(piece.decode().replace(" ", SPACE))
        except UnicodeDecodeError as error:
            raise wrong(f"piece {number} is not UTF-8") from error
    if at != len(data):
        raise wrong(f"it has {len(data) - at} bytes more than {count} pieces")
    if len(set(pieces)) < len(pieces):
        raise wrong("pieces must differ from each other")
    return pieces, scores
