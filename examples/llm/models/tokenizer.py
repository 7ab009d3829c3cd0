"""The byte-level BPE tokenizer that a GGUF file carries."""

from typing import TYPE_CHECKING, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from examples.llm.models.gguf_files import GGUFModel

_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL
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
    """Build the tokenizer of a model: SmolLM's, which splits digits and then byte-level words."""
    for field, supported in (("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "smollm")):
        if model.field(field) != supported:
            raise model.wrong(field, f"{supported}, the only one that is supported")
    vocabulary = _read_vocabulary(model)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_read_merges(model, vocabulary)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = model.required_field(_KINDS)
    if not isinstance(kinds, list) or len(kinds) != len(vocabulary):
        raise model.wrong(_KINDS, f"an array of {len(vocabulary)}, one for each token")
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(vocabulary, kinds, strict=True)
            if kind == _CONTROL_TOKEN
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
