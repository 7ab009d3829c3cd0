"""Tasks with options for encoders: a mask is filled, or a layer on top tells the class."""

from dataclasses import replace
from typing import Literal, Protocol

import jax
from tokenizers import Tokenizer

from examples.llm.errors import UsageError
from examples.llm.models.config import EncoderConfig, ModelConfig
from examples.llm.models.tokenizer import plain_tokens
from examples.llm.tasks.batches import EncodedExample, OptionBatch
from examples.llm.tasks.example import Example
from examples.llm.tasks.formats import Format
from examples.llm.tasks.problem import OptionProblem, Reading
from examples.llm.tasks.scoring import option_log_likelihoods

# What an encoder is asked for: the word in place of a mask, or the class of a text.
Head = Literal["masked-lm", "classes"]


def head_for(config: ModelConfig, asked: Head | None) -> Head | None:
    """Return what is asked of a model of this shape that is an encoder, None for a decoder.

    Args:
      config: of the model.
      asked: what the user wants; None for masks if the model was made to fill them.

    Raises:
      UsageError: it can't do that.
    """
    if not isinstance(config, EncoderConfig):
        if asked is not None:
            raise UsageError("--head: the model is a decoder")
        return None
    if asked == "masked-lm" and config.head != "masked-lm":
        raise UsageError("--head: the model was not made to fill masks, choose classes")
    return asked or ("masked-lm" if config.head == "masked-lm" else "classes")


class MaskedLanguageModel(Protocol):
    """What losses see of an encoder that fills masks."""

    def features(self, tokens: jax.Array, mask: jax.Array, /) -> jax.Array:
        """Map int32 `(batch, length)`, and 1 where it is no padding, to `(..., hidden_size)`."""
        ...

    def logits(self, features: jax.Array, /) -> jax.Array:
        """Map `(..., hidden_size)` to those of the token there, `(..., vocabulary_size)`."""
        ...


class Classifier(Protocol):
    """What losses see of an encoder that tells the class of a text."""

    def class_logits(self, tokens: jax.Array, mask: jax.Array, /) -> jax.Array:
        """Map int32 `(batch, length)`, and 1 where it is no padding, to `(batch, classes)`."""
        ...


class MaskedProblem(OptionProblem):
    """The right one of several words in place of a mask."""

    def log_likelihoods(self, model: MaskedLanguageModel, batch: OptionBatch) -> jax.Array:
        """The log-probability of each word, float32 `(batch, options, 1)`."""
        features = model.features(batch.tokens[:, 0], batch.seen[:, 0])
        return option_log_likelihoods(model.logits, features, batch)


class ClassProblem(OptionProblem):
    """The right one of several classes."""

    def log_likelihoods(self, model: Classifier, batch: OptionBatch) -> jax.Array:
        """The log-probability of each class, float32 `(batch, options, 1)`."""
        logits = model.class_logits(batch.tokens[:, 0], batch.seen[:, 0])
        return jax.nn.log_softmax(logits)[:, :, None]


def masked_reading(
    format_: Format, tokenizer: Tokenizer, mask: int | None, max_length: int
) -> Reading:
    """How a model reads a task whose options it puts in place of a mask.

    Args:
      format_: the task.
      tokenizer: of the model.
      mask: its token.
      max_length: tokens that it reads at most; texts lose their beginning.

    Raises:
      UsageError: the options are no words in one place, or there is no mask.
    """
    template = format_.wording.cloze
    if template is None:
        raise UsageError(f"--task: {format_.name} has no wording with a mask")
    word = None if mask is None else tokenizer.id_to_token(mask)
    if mask is None or word is None:
        raise UsageError("--model: its tokenizer has no mask")
    template = replace(template, prompt=template.prompt.replace("{mask}", word))
    own = _truncating(tokenizer, max_length)
    return Reading(template, lambda example: _masked(example, own, mask), MaskedProblem)


def class_reading(format_: Format, tokenizer: Tokenizer, max_length: int) -> Reading:
    """How a model reads a task whose options are classes to it; arguments as above.

    Raises:
      UsageError: the options are not the same for all examples.
    """
    template = format_.wording.bare or format_.wording.aligned
    if any("{" in option for option in template.options):
        raise UsageError(f"--task: {format_.name} has other options in each example, so no classes")
    own = _truncating(tokenizer, max_length)
    return Reading(template, lambda example: _labelled(example, own), ClassProblem)


def _truncating(tokenizer: Tokenizer, max_length: int) -> Tokenizer:
    """Puts the model's special tokens around texts, which lose their beginning."""
    own = Tokenizer.from_str(tokenizer.to_str())
    own.enable_truncation(max_length, direction="left")
    return own


def _masked(example: Example, tokenizer: Tokenizer, mask: int) -> EncodedExample:
    options = tuple(tuple(plain_tokens(tokenizer, option)) for option in example.options)
    for text, option in zip(example.options, options, strict=True):
        if len(option) != 1:
            raise UsageError(f"--task: {text!r} is {len(option)} tokens of the model, must be one")
    encoded = tokenizer.encode(example.prompt)
    tokens = tuple(encoded.ids)
    if tokens.count(mask) != 1:
        raise UsageError(f"--sequence-length: {len(tokens)} tokens must hold one mask")
    place, is_cut = tokens.index(mask), bool(encoded.overflowing)
    return EncodedExample(tokens, options, example.label, example.subject, place, is_cut)


def _labelled(example: Example, tokenizer: Tokenizer) -> EncodedExample:
    encoded, classes = tokenizer.encode(example.prompt), ((0,),) * len(example.options)
    tokens, is_cut = tuple(encoded.ids), bool(encoded.overflowing)
    return EncodedExample(tokens, classes, example.label, example.subject, 0, is_cut)
