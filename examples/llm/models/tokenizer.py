"""The tokenizer that a GGUF file carries."""

import math
from typing import TYPE_CHECKING, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from examples.llm.models.sentence_pieces import LONGEST_PIECE, sentence_piece_tokenizer

if TYPE_CHECKING:
    from examples.llm.models.gguf_files import GGUFModel

# Of gguf.TokenType.
_UNKNOWN_TOKEN, _CONTROL_TOKEN, _USER_DEFINED_TOKEN = 2, 3, 4
_MODEL, _WORDS, _SCORES = (f"tokenizer.ggml.{name}" for name in ("model", "pre", "scores"))
_TOKENS, _KINDS = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_MERGES = "tokenizer.ggml.merges"


class SpecialTokens(NamedTuple):
    """The tokens that a model has around a text; None where it has none.

    Attributes:
      begin: before it, where the model's own tokenizer puts one.
      end: after it.
      pad: what fills batches up.
      mask: in place of a token that is to be found.
    """

    begin: int | None
    end: int | None
    pad: int | None = None
    mask: int | None = None

    @property
    def front(self) -> list[int]:
        """What is put in front of a text."""
        return [] if self.begin is None else [self.begin]


NO_SPECIAL_TOKENS = SpecialTokens(None, None)


def read_tokenizer(model: "GGUFModel") -> Tokenizer:
    """Build the tokenizer of a model: of byte-level words, or of SentencePiece's.

    Raises:
      UsageError: it is of another kind, or its fields don't fit together.
    """
    kind = model.field(_MODEL)
    if kind not in ("gpt2", "llama"):
        raise model.wrong(_MODEL, "gpt2 or llama, the only ones that are supported")
    vocabulary = _read_vocabulary(model)
    kinds = model.required_field(_KINDS)
    if not isinstance(kinds, list) or len(kinds) != len(vocabulary):
        raise model.wrong(_KINDS, f"an array of {len(vocabulary)}, one for each token")
    build = _byte_level if kind == "gpt2" else _sentence_pieces
    return build(model, vocabulary, kinds)


def _byte_level(model: "GGUFModel", vocabulary: dict[str, int], kinds: list[int]) -> Tokenizer:
    """SmolLM's, which splits digits and then byte-level words."""
    if model.field(_WORDS) != "smollm":
        raise model.wrong(_WORDS, "smollm, the only one that is supported")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_read_merges(model, vocabulary)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(vocabulary, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    return tokenizer


def _sentence_pieces(model: "GGUFModel", vocabulary: dict[str, int], kinds: list[int]) -> Tokenizer:
    pieces, scores = list(vocabulary), model.required_field(_SCORES)
    is_array = isinstance(scores, list) and len(scores) == len(pieces)
    if not is_array or not all(type(x) is float and math.isfinite(x) for x in scores):
        raise model.wrong(_SCORES, f"an array of {len(pieces)} finite floats, one for each token")
    longest = max(pieces, key=len)
    if len(longest) > LONGEST_PIECE:
        right = f"tokens of at most {LONGEST_PIECE} characters"
        raise model.wrong(_TOKENS, right, longest)
    tokenizer = sentence_piece_tokenizer(
        pieces,
        scores,
        special={n for n, kind in enumerate(kinds) if kind in (_CONTROL_TOKEN, _UNKNOWN_TOKEN)},
        unknown=next((n for n, kind in enumerate(kinds) if kind == _UNKNOWN_TOKEN), None),
        in_front=model.field("tokenizer.ggml.add_space_prefix", True) is not False,
    )
    tokenizer.add_tokens(
        [
            AddedToken(piece, normalized=False)
            for piece, kind in zip(pieces, kinds, strict=True)
            if kind == _USER_DEFINED_TOKEN
        ]
    )
    return tokenizer


def _read_vocabulary(model: "GGUFModel") -> dict[str, int]:
    tokens = model.strings(_TOKENS)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise model.wrong(_TOKENS, "an array of tokens that differ from each other")
    return vocabulary


def _read_merges(model: "GGUFModel", vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in model.strings(_MERGES) if model.field(_MERGES) is not None else ():
        one, _, other = merge.partition(" ")
        if not {one, other, one + other} <= vocabulary.keys():
            raise model.wrong(_MERGES, "pairs of tokens that make a token", merge)
        merges.append((one, other))
    return merges


def plain_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text alone, whatever the tokenizer would put around it."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def continuation_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text that stands after another one.

    A tokenizer of SentencePiece's puts a space in front of what it takes for the beginning of a
    text; one more than a text such as `" great"` has. After a line's end it has its own alone.
    """
    line_end = plain_tokens(tokenizer, "\n")
    tokens = plain_tokens(tokenizer, "\n" + text)
    if tokens[: len(line_end)] == line_end:
        return tokens[len(line_end) :]
    # The line's end has become a part of a token, as two of them do in tables of bytes, which have
    # no space to put in front.
    return plain_tokens(tokenizer, text)
