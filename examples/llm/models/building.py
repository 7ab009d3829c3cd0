"""From the shape of a model to the model."""

from functools import lru_cache
from typing import Any

from flax import nnx

from examples.llm.models.config import DecoderConfig, ModelConfig
from examples.llm.models.decoder import Decoder
from examples.llm.models.encoder import Classifier, Encoder, MaskedLanguageModel

_ENCODERS = {None: Encoder, "masked-lm": MaskedLanguageModel, "classes": Classifier}


def new_model(config: ModelConfig, *, rngs: nnx.Rngs) -> Any:
    """Build the decoder, or the encoder with its head, of a shape, with random parameters."""
    if isinstance(config, DecoderConfig):
        return Decoder(config, rngs=rngs)
    return _ENCODERS[config.head](config, rngs=rngs)


def abstract_model(config: ModelConfig) -> tuple[Any, dict[str, Any]]:
    """Return a model's structure and its parameters' shapes, without allocating any."""
    graph, state = _abstract_model(config)
    return graph, nnx.to_pure_dict(state)


@lru_cache(maxsize=16)
def _abstract_model(config: ModelConfig) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: new_model(config, rngs=nnx.Rngs(0))))


def build_model(graph: Any, parameters: Any) -> Any:
    """Put `parameters`, a nested dict of arrays, into a model's structure."""
    return nnx.merge(graph, nnx.State(parameters))
