"""Which numbers of a decoder train: all of them, or a small tree beside the frozen ones."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from examples.llm.decoder import Decoder
from examples.llm.training import build_model
from optax_lowbit import adapters

SCHEMES = ("full", "lora", "prefix", "prompt")
LORA = adapters.LoRA(rank=8, alpha=16.0, targets=r"(query|value)/kernel$")


class Tuning(NamedTuple):
    """A decoder in two trees.

    Attributes:
      trainable: what an optimizer is given; float32, but for full tuning, where it is all of the
        decoder's parameters as they are.
      frozen: the rest, to be passed on to `logits` untouched.
      logits: `(trainable, frozen, tokens) -> logits`, from int32 `(batch, length)` to float32
        `(batch, length, vocabulary_size)`, whether virtual tokens stand in front or not. A pure
        function; it holds no arrays.
    """

    trainable: Any
    frozen: Any
    logits: Callable[[Any, Any, jax.Array], jax.Array]


def tuned(
    scheme: str,
    graph: nnx.GraphDef[Decoder],
    parameters: Any,
    key: jax.Array | int,
    *,
    lora: adapters.LoRA = LORA,
    prefix_tokens: int = 5,
    prompt_tokens: int = 10,
) -> Tuning:
    """Return what trains under `scheme`, initialized so that training starts from the decoder.

    Args:
      scheme: one of `SCHEMES`.
      graph: structure of the decoder.
      parameters: its parameters, a nested dict of arrays.
      key: a `jax.random.key` or a seed.
      lora: the adapters under "lora".
      prefix_tokens: virtual tokens under "prefix".
      prompt_tokens: virtual tokens under "prompt".
    """
    if scheme == "full":
        return _full(graph, parameters)
    if scheme == "lora":
        return _lora(graph, parameters, key, lora)
    if scheme == "prefix":
        return _prefix(graph, parameters, key, prefix_tokens)
    if scheme == "prompt":
        return _prompt(graph, parameters, key, prompt_tokens)
    raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")


def _full(graph: nnx.GraphDef[Decoder], parameters: Any) -> Tuning:
    def logits(trainable, frozen, tokens):
        del frozen
        return build_model(graph, trainable)(tokens)

    return Tuning(parameters, {}, logits)


def _lora(graph, parameters, key, lora: adapters.LoRA) -> Tuning:
    wrapped = lora.wrap(build_model(graph, parameters), key)
    wrapped_graph, trainable, frozen = nnx.split(wrapped, nnx.LoRAParam, ...)

    def logits(trainable, frozen, tokens):
        model = nnx.merge(wrapped_graph, nnx.State(trainable), nnx.State(frozen))
        return model(tokens)

    return Tuning(nnx.to_pure_dict(trainable), nnx.to_pure_dict(frozen), logits)


def _prefix(graph, parameters, key, num_tokens: int) -> Tuning:
    decoder = build_model(graph, parameters)
    vocabulary_size = len(parameters["embedding"]["embedding"])
    prefix = adapters.init_prefix(
        decoder.keys_and_values, vocabulary_size, key, num_tokens=num_tokens
    )

    def logits(trainable, frozen, tokens):
        return build_model(graph, frozen)(tokens, prefix=trainable)

    return Tuning(prefix, parameters, logits)


def _prompt(graph, parameters, key, num_tokens: int) -> Tuning:
    embedding = parameters["embedding"]["embedding"]
    prompt = adapters.init_prompt(embedding, key, num_tokens=num_tokens)

    def logits(trainable, frozen, tokens):
        return build_model(graph, frozen)(tokens, prompt=trainable["prompt"])

    return Tuning({"prompt": prompt}, parameters, logits)
