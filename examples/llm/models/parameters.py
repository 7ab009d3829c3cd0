"""The parameters of a model, put together from the tensors of a file."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.llm.errors import UsageError
from examples.llm.models.building import abstract_model
from examples.llm.models.config import ModelConfig

_SUFFIXES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}

# Gives, of a parameter's path, a tensor's name and a shape, an array of this shape, float32, or a
# matrix in few bits. Matrices are `(in, out)`, tables `(rows, size)`.
Read = Callable[[str, str, tuple[int, ...]], Any]


def read_parameters(config: ModelConfig, names: Mapping[str, str], read: Read) -> dict[str, Any]:
    """Return all parameters of a model, in the nested dict that it takes.

    Args:
      config: its shape.
      names: what a file calls the modules, by their paths; `{}` stands for the number of a layer.
      read: reads a tensor. Those of layers are stacked.

    Raises:
      UsageError: what `read` raises, or layers are stored in different ways.
    """

    def parameter(keys: Any, abstract: jax.ShapeDtypeStruct) -> Any:
        path = "/".join(key.key for key in keys)
        name, shape = tensor_name(names, path), abstract.shape
        if "{}" not in name:
            return jax.tree.map(jnp.asarray, read(path, name, shape))
        layers = [read(path, name.format(layer), shape[1:]) for layer in range(config.num_layers)]
        if len({jax.tree.structure(layer) for layer in layers}) > 1:
            name = name.format("*")
            raise UsageError(f"--model: {name} must be stored in the same way in all layers")
        return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *layers)

    return jax.tree_util.tree_map_with_path(parameter, abstract_model(config)[1])


def tensor_name(names: Mapping[str, str], path: str) -> str:
    """Return what a file calls the parameter at a path."""
    module, _, leaf = path.rpartition("/")
    return f"{names[module]}.{_SUFFIXES[leaf]}"
