"""Examples as tokens, and batches of them in few shapes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import grain
import numpy as np
from tokenizers import Tokenizer

from examples.llm.errors import UsageError
from examples.llm.models.tokenizer import SpecialTokens, continuation_tokens, plain_tokens
from examples.llm.sampling import shuffled
from examples.llm.tasks.example import Example

# Rows are as long as a multiple of this, so that lengths, each of which compiles, are few.
_LENGTH_STEP = 16


# NumPy's where a batch is made, JAX's where it is traced.
Array = Any


class OptionBatch(NamedTuple):
    """Examples, padded; nothing depends on the padding.

    Attributes:
      tokens: int32 `(batch, rows, length)`: what the model reads. One row where every option is a
        single token, since the model then reads no option; else one for each option.
      seen: int32, the same shape: 1 for a token, 0 for padding.
      positions: int32 `(batch, options, option length)`: where in its row a token is predicted.
      targets: int32, the same shape: the tokens of the options.
      mask: float32, the same shape: 1 for a token, 0 for padding, all of it for an option that an
        example lacks.
      labels: int32 `(batch,)`: number of the right option.
      weights: float32 `(batch,)`: 1 for an example, 0 for one that fills the batch up.
      subjects: int32 `(batch,)`: number of the part of the task that an example belongs to.
    """

    tokens: Array
    seen: Array
    positions: Array
    targets: Array
    mask: Array
    labels: Array
    weights: Array
    subjects: Array


@dataclass(frozen=True)
class EncodedExample:
    """An example in tokens.

    Attributes:
      prompt: at least one.
      options: each at least one.
      label: number of the right option.
      subject: the part of the task that it belongs to.
      place: where in the prompt an option of a single token stands, of a model that sees what is
        after it; None: after the prompt.
      is_cut: whether the prompt was longer.
    """

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    label: int
    subject: str = ""
    place: int | None = None
    is_cut: bool = False

    @property
    def length(self) -> int:
        """Tokens that the model reads: all but the last of the longest option."""
        return len(self.prompt) + max(map(len, self.options)) - 1


def encode(
    example: Example, tokenizer: Tokenizer, special: SpecialTokens, max_length: int
) -> EncodedExample:
    """Turn an example into tokens; a prompt that is too long loses its beginning.

    Args:
      example: to be encoded.
      tokenizer: of the model.
      special: of the model; without a token in front, 0 stands for an empty prompt.
      max_length: tokens that the model reads at most.

    Raises:
      UsageError: an option alone is too long, or has no token.
    """
    options = tuple(tuple(continuation_tokens(tokenizer, option)) for option in example.options)
    if not all(options):
        raise UsageError(f"--task: an option of {example.options} is empty")
    room = max_length + 1 - max(map(len, options)) - len(special.front)
    if room < 1:
        raise UsageError(
            f"--sequence-length: {max_length} tokens are too few for the options {example.options}"
        )
    tokens = plain_tokens(tokenizer, example.prompt)
    prompt = tuple([*special.front, *tokens[-room:]] or [0])
    is_cut = len(tokens) > room
    return EncodedExample(prompt, options, example.label, example.subject, is_cut=is_cut)


@dataclass(frozen=True)
class Batches:
    """Batches of a set of examples.

    Attributes:
      examples: those with fewer options than others are given some of no tokens.
      size: examples in a batch.
      max_length: of examples, and of rows, which are padded; None for any.
      subjects: the parts of the task by their numbers, those of the examples among them; the same
        for all sets of a task.
    """

    examples: Sequence[EncodedExample]
    size: int
    max_length: int | None = None
    subjects: tuple[str, ...] = ("",)

    @property
    def num_options(self) -> int:
        """Options of the example that has most."""
        return max(len(example.options) for example in self.examples)

    def random(self, seed: int) -> grain.MapDataset:
        """An endless sequence of `OptionBatch`es of one shape, in an order that `seed` chooses."""
        groups = shuffled(len(self.examples), self.size, seed)
        return groups.map(lambda group: self._padded(group.tolist(), self._longest))

    def all(self) -> Iterator[OptionBatch]:
        """All examples once, those of like length together, so that shapes are few and small."""
        order = np.argsort([example.length for example in self.examples], kind="stable")
        for start in range(0, len(order), self.size):
            chosen = order[start : start + self.size].tolist()
            yield self._padded(chosen, max(self.examples[index].length for index in chosen))

    @cached_property
    def _longest(self) -> int:
        return max(example.length for example in self.examples)

    def _padded(self, chosen: Sequence[int], length: int) -> OptionBatch:
        length = -(-length // _LENGTH_STEP) * _LENGTH_STEP
        length = length if self.max_length is None else min(length, self.max_length)
        sizes = [len(option) for example in self.examples for option in example.options]
        width, options = max(sizes), self.num_options
        rows = 1 if width == 1 else options
        batch = OptionBatch(
            tokens=np.zeros((self.size, rows, length), np.int32),
            seen=np.zeros((self.size, rows, length), np.int32),
            positions=np.zeros((self.size, options, width), np.int32),
            targets=np.zeros((self.size, options, width), np.int32),
            mask=np.zeros((self.size, options, width), np.float32),
            labels=np.zeros(self.size, np.int32),
            weights=(np.arange(self.size) < len(chosen)).astype(np.float32),
            subjects=np.zeros(self.size, np.int32),
        )
        for row in range(self.size):
            # The last example fills the batch up, with no weight.
            example = self.examples[chosen[min(row, len(chosen) - 1)]]
            _write(batch, row, example)
            batch.subjects[row] = self.subjects.index(example.subject)
        return batch


def _write(batch: OptionBatch, row: int, example: EncodedExample) -> None:
    start = len(example.prompt) - 1 if example.place is None else example.place
    batch.labels[row] = example.label
    for number, option in enumerate(example.options):
        line = (*example.prompt, *option[:-1])
        copy = number % batch.tokens.shape[1]
        batch.tokens[row, copy, : len(line)] = line
        batch.seen[row, copy, : len(line)] = 1
        batch.positions[row, number, : len(option)] = np.arange(start, start + len(option))
        batch.targets[row, number, : len(option)] = option
        batch.mask[row, number, : len(option)] = 1
