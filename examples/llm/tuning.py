"""Which numbers of a decoder train: all of them, or a small tree beside the frozen ones."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx

from examples.llm.decoder import Decoder, LanguageModel
from examples.llm.training import build_model
from optax_lowbit import adapters

SCHEMES = ("full", "lora", "prefix", "prompt")
LORA = adapters.LoRA(rank=8, alpha=16.0, targets=r"(query|value)/kernel$")


@dataclass(frozen=True)
class TunedModel:
    """A decoder with what was trained beside it, as losses see it.

    Attributes:
      features: see `Decoder.features`.
      logits: see `Decoder.logits`.
    """

    features: Callable[[jax.Array], jax.Array]
    logits: Callable[[jax.Array], jax.Array]


class Tuning(NamedTuple):
    """A decoder in two trees.

    Attributes:
      trainable: what an optimizer is given; float32, but for full tuning, where it is all of the
        decoder's parameters as they are.
      frozen: the rest, to be passed on to `model` untouched.
      model: `(trainable, frozen) -> model`; the model sees no virtual tokens in what it is given
        or gives. A pure function; it holds no arrays.
    """

    trainable: Any
    frozen: Any
    model: Callable[[Any, Any], LanguageModel]

    def logits(self, trainable: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        """Map int32 `(batch, length)` to float32 `(batch, length, vocabulary_size)`."""
        model = self.model(trainable, frozen)
        return model.logits(model.features(tokens))


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
    return Tuning(parameters, {}, lambda trainable, frozen: build_model(graph, trainable))


def _lora(graph, parameters, key, lora: adapters.LoRA) -> Tuning:
    wrapped = lora.wrap(build_model(graph, parameters), key)
    wrapped_graph, trainable, frozen = nnx.split(wrapped, nnx.LoRAParam, ...)

    def model(trainable, frozen):
        return nnx.merge(wrapped_graph, nnx.State(trainable), nnx.State(frozen))

    return Tuning(nnx.to_pure_dict(trainable), nnx.to_pure_dict(frozen), model)


def _prefix(graph, parameters, key, num_tokens: int) -> Tuning:
    decoder = build_model(graph, parameters)
    vocabulary_size = len(parameters["embedding"]["embedding"])
    prefix = adapters.init_prefix(
        decoder.keys_and_values, vocabulary_size, key, num_tokens=num_tokens
    )

    def model(trainable, frozen):
        decoder = build_model(graph, frozen)
        return TunedModel(partial(decoder.features, prefix=trainable), decoder.logits)

    return Tuning(prefix, parameters, model)


def _prompt(graph, parameters, key, num_tokens: int) -> Tuning:
    embedding = parameters["embedding"]["embedding"]
    prompt = adapters.init_prompt(embedding, key, num_tokens=num_tokens)

    def model(trainable, frozen):
        decoder = build_model(graph, frozen)
        features = partial(decoder.features, prompt=trainable["prompt"])
        return TunedModel(features, decoder.logits)

    return Tuning({"prompt": prompt}, parameters, model)
