"""How likely a model finds the options, and what is trained on and reported."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from examples.llm.models.decoder import LanguageModel
from examples.llm.tasks.batches import OptionBatch


def token_log_likelihoods(model: LanguageModel, batch: OptionBatch) -> jax.Array:
    """The log-probability of each token of each option, given the prompt and those before it.

    Returns:
      float32 `(batch, options, option length)`, 0 at padding.
    """
    size, rows, length = batch.tokens.shape
    features = model.features(batch.tokens.reshape(size * rows, length))
    return option_log_likelihoods(model.logits, features, batch)


def option_log_likelihoods(
    head: Callable[[jax.Array], jax.Array], features: jax.Array, batch: OptionBatch
) -> jax.Array:
    """The same from the features of all rows, `(batch x rows, length, hidden_size)`."""
    (size, rows, _), options = batch.tokens.shape, batch.targets.shape[1]
    row = jnp.arange(size)[:, None] * rows + jnp.arange(options)[None, :] % rows
    # The head sees the places of options alone: on whole rows it costs as much as many layers.
    logits = head(features[row[:, :, None], batch.positions])
    return -batch.mask * optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)


def option_scores(log_likelihoods: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean log-probability of an option's tokens, float32 `(batch, options)`.

    The mean instead of the sum: long options are not less likely for being long. An option that an
    example lacks is never chosen.
    """
    count = jnp.sum(mask, axis=-1)
    mean = jnp.sum(log_likelihoods, axis=-1) / jnp.maximum(count, 1)
    return jnp.where(count > 0, mean, -jnp.inf)


def classification_loss(log_likelihoods: jax.Array, batch: OptionBatch) -> jax.Array:
    """Cross-entropy of the options, whose scores are taken as logits."""
    scores = option_scores(log_likelihoods, batch.mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch.labels)
    return jnp.sum(batch.weights * losses) / jnp.sum(batch.weights)


def language_model_loss(log_likelihoods: jax.Array, batch: OptionBatch) -> jax.Array:
    """Cross-entropy of the right options' tokens, the mean over all of them."""
    losses = -_of_right_options(log_likelihoods, batch)
    return jnp.sum(batch.weights[:, None] * losses) / right_tokens(batch)


def right_tokens(batch: OptionBatch) -> jax.Array:
    """The number of tokens of the right options, float32 `()`."""
    return jnp.sum(batch.weights[:, None] * _of_right_options(batch.mask, batch))


def _of_right_options(x: jax.Array, batch: OptionBatch) -> jax.Array:
    return jnp.take_along_axis(x, batch.labels[:, None, None], axis=1)[:, 0]


def examples(batch: OptionBatch) -> jax.Array:
    """The number of examples, float32 `()`."""
    return jnp.sum(batch.weights)


def error_rate(log_likelihoods: jax.Array, batch: OptionBatch) -> jax.Array:
    """One less the accuracy."""
    predictions = jnp.argmax(option_scores(log_likelihoods, batch.mask), axis=-1)
    return 1 - accuracy(predictions, batch.labels, batch.weights)


def f1_loss(log_likelihoods: jax.Array, batch: OptionBatch) -> jax.Array:
    """One less the F1 score."""
    predictions = jnp.argmax(option_scores(log_likelihoods, batch.mask), axis=-1)
    return 1 - f1(predictions, batch.labels, batch.weights)


def accuracy(predictions: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """The share of right predictions, float32 `()`."""
    return jnp.sum(jnp.where(predictions == labels, weights, 0)) / jnp.sum(weights)


def accuracy_by_subject(
    predictions: jax.Array, labels: jax.Array, weights: jax.Array, subjects: jax.Array, count: int
) -> jax.Array:
    """The mean of the accuracies of subjects, float32 `()`: MMLU's.

    Of `count` subjects those that have no example, as in a small part of a task, are left out.
    """
    right = jnp.zeros(count).at[subjects].add(jnp.where(predictions == labels, weights, 0))
    examples = jnp.zeros(count).at[subjects].add(weights)
    return jnp.mean(right / jnp.maximum(examples, 1), where=examples > 0)


def f1(predictions: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """The F1 score of option 1, float32 `()`: `2 TP / (2 TP + FP + FN)`, and 0 if that is 0/0."""
    claimed, there = predictions == 1, labels == 1
    found, *marked = (jnp.sum(jnp.where(x, weights, 0)) for x in (claimed & there, claimed, there))
    return 2 * found / jnp.maximum(sum(marked), 1)


@dataclass(frozen=True)
class Objective:
    """What a method makes small.

    Attributes:
      loss: of token log-likelihoods and a batch, float32 `()`.
      has_gradient: whether backpropagation gets anything from it.
      weight: the number of what it is a mean over, of a batch; None if it is no mean.
    """

    loss: Callable[[jax.Array, OptionBatch], jax.Array]
    has_gradient: bool = True
    weight: Callable[[OptionBatch], jax.Array] | None = examples


OBJECTIVES = {
    "classification": Objective(classification_loss),
    "language-model": Objective(language_model_loss, weight=right_tokens),
    "accuracy": Objective(error_rate, has_gradient=False),
    "f1": Objective(f1_loss, has_gradient=False, weight=None),
}
