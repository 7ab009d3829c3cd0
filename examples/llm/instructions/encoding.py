"""Instructions and answers as tokens."""

from dataclasses import dataclass

from tokenizers import Tokenizer

from examples.llm.errors import UsageError
from examples.llm.instructions.formats import Pair
from examples.llm.models.tokenizer import SpecialTokens, plain_tokens


@dataclass(frozen=True)
class EncodedPair:
    """A pair in tokens.

    Attributes:
      tokens: source and target, at least two.
      source_length: tokens that belong to the source.
    """

    tokens: tuple[int, ...]
    source_length: int


def encode_pair(
    pair: Pair, tokenizer: Tokenizer, special: SpecialTokens, max_length: int
) -> EncodedPair:
    """Turn a pair into tokens: begin, source, target, end.

    What is too long is cut: the target to what a source of at most half of all tokens leaves, at
    its end; then the source, at its beginning, since what it asks for stands at its end.

    Args:
      pair: to be encoded.
      tokenizer: of the model.
      special: of the model.
      max_length: tokens that the model reads at most; it reads all but the last.

    Raises:
      UsageError: there are too few tokens for one to be predicted.
    """
    begin = [] if special.begin is None else [special.begin]
    end = [] if special.end is None else [special.end]
    source = plain_tokens(tokenizer, pair.source)
    target = plain_tokens(tokenizer, pair.target) + end
    room = max_length + 1 - len(begin)
    target = target[: room - min(len(source), room // 2)]
    source = source[max(0, len(source) + len(target) - room) :]
    tokens = (*begin, *source, *target)
    if len(tokens) < 2 or not target:
        raise UsageError(f"--task: nothing is to be written after {pair.source[:200]!r}")
    return EncodedPair(tokens, len(begin) + len(source))
