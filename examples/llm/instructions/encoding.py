"""Instructions and answers as tokens."""

from dataclasses import dataclass

from tokenizers import Tokenizer

from examples.llm.errors import UsageError
from examples.llm.instructions.formats import Dialogue
from examples.llm.models.tokenizer import SpecialTokens, continuation_tokens, plain_tokens


@dataclass(frozen=True)
class EncodedText:
    """A text in tokens.

    Attributes:
      tokens: at least two.
      is_target: of each token, whether it belongs to what the model is to write.
      is_cut: whether it was longer.
    """

    tokens: tuple[int, ...]
    is_target: tuple[bool, ...]
    is_cut: bool = False


def encode_dialogue(
    dialogue: Dialogue, tokenizer: Tokenizer, special: SpecialTokens, max_length: int
) -> EncodedText:
    """Turn a dialogue into tokens: begin, then source, target and end of each pair.

    What is too long is cut: the target to what a source of at most half of all tokens leaves, at
    its end; then the source, at its beginning, since what it asks for stands at its end. Pairs
    after the first get what that leaves, and the last of them loses its end.

    Args:
      dialogue: to be encoded.
      tokenizer: of the model.
      special: of the model.
      max_length: tokens that the model reads at most; it reads all but the last.

    Raises:
      UsageError: there are too few tokens for one to be predicted.
    """

    def after(text: str) -> list[int]:
        return continuation_tokens(tokenizer, text)

    end = [] if special.end is None else [special.end]
    first, *others = dialogue.pairs
    whole = plain_tokens(tokenizer, first.source), after(first.target) + end
    room = max_length + 1 - len(special.front)
    source, target = _cut(*whole, room)
    tokens = [*special.front, *source, *target]
    if len(tokens) < 2 or not target:
        raise UsageError(f"--task: nothing is to be written after {first.source[:200]!r}")
    is_target = [False] * (len(special.front) + len(source)) + [True] * len(target)
    for pair in others:
        source, target = after(pair.source), after(pair.target) + end
        tokens += [*source, *target]
        is_target += [False] * len(source) + [True] * len(target)
    is_cut = sum(map(len, whole)) > room or len(tokens) > max_length + 1
    return EncodedText(tuple(tokens[: max_length + 1]), tuple(is_target[: max_length + 1]), is_cut)


def _cut(source: list[int], target: list[int], room: int) -> tuple[list[int], list[int]]:
    target = target[: room - min(len(source), room // 2)]
    return source[max(0, len(source) + len(target) - room) :], target
