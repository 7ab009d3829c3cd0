"""From the tensors of a file to the parameters of a model, and back."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from examples.llm.errors import UsageError
from examples.llm.models.building import abstract_model
from examples.llm.models.config import ModelConfig

_SUFFIXES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}

# Gives, of a parameter's path, a tensor's name and a shape, an array of this shape, float32, or a
# matrix in few bits. Matrices are `(in, out)`, tables `(rows, size)`.
Read = Callable[[str, str, tuple[int, ...]], Any]
# Gives, of a parameter's path and what was read of it, of one layer, what is kept of that: floats
# of another dtype, or a matrix in few bits. A tensor is kept before the next one is read.
Keep = Callable[[str, Any], Any]


def as_read(path: str, tensor: Any) -> Any:
    """Keep a tensor as it was read, a `Keep`."""
    del path
    return tensor


def read_parameters(
    config: ModelConfig, names: Mapping[str, str], read: Read, keep: Keep = as_read
) -> dict[str, Any]:
    """Return all parameters of a model, in the nested dict that it takes.

    Args:
      config: its shape.
      names: what a file calls the modules, by their paths; `{}` stands for the number of a layer.
      read: reads a tensor.
      keep: what is kept of it. Those of layers are stacked.

    Raises:
      UsageError: what `read` and `keep` raise, or layers are stored in different ways.
    """

    def parameter(keys: Any, abstract: jax.ShapeDtypeStruct) -> Any:
        path = "/".join(key.key for key in keys)
        name, shape = tensor_name(names, path), abstract.shape
        if "{}" not in name:
            return jax.tree.map(jnp.asarray, keep(path, read(path, name, shape)))
        count = config.num_layers
        layers = (keep(path, read(path, name.format(i), shape[1:])) for i in range(count))
        return stacked(name.format("*"), layers, count)

    return jax.tree_util.tree_map_with_path(parameter, abstract_model(config)[1])


def tensors_of(names: Mapping[str, str], parameters: Any) -> dict[str, np.ndarray]:
    """Return the tensors that `read_parameters` has made parameters of, in their dtypes.

    Args:
      names: as there.
      parameters: all of a model, or some.

    Returns:
      By their names, one for each layer: matrices `(out, in)`, tables `(rows, size)`. Views, where
      parameters are on the host.
    """
    tensors: dict[str, np.ndarray] = {}
    flat: dict[str, Any] = flatten_dict(parameters, sep="/")
    for path, parameter in flat.items():
        name, tensor = tensor_name(names, path), np.asarray(parameter)
        if path.endswith("/kernel"):
            tensor = tensor.swapaxes(-1, -2)
        if "{}" in name:
            tensors |= {name.format(layer): part for layer, part in enumerate(tensor)}
        else:
            tensors[name] = tensor
    return tensors


def stacked(name: str, layers: Iterable[Any], count: int) -> Any:
    """Return a parameter of all layers, each of which is put into its place before the next.

    Args:
      name: of the parameter, for the error.
      layers: arrays, or matrices in few bits.
      count: how many there are.

    Raises:
      UsageError: they are stored in different ways.
    """
    structure, places = None, []
    for number, layer in enumerate(layers):
        leaves, its_structure = jax.tree.flatten(layer)
        if structure is None:
            structure = its_structure
            places = [np.empty((count, *leaf.shape), leaf.dtype) for leaf in leaves]
        if its_structure != structure:
            raise UsageError(f"--model: {name} must be stored in the same way in all layers")
        for place, leaf in zip(places, leaves, strict=True):
            place[number] = leaf
    assert structure is not None  # a model has layers
    return jax.tree.unflatten(structure, [jnp.asarray(place) for place in places])


def tensor_name(names: Mapping[str, str], path: str) -> str:
    """Return what a file calls the parameter at a path."""
    module, _, leaf = path.rpartition("/")
    return f"{names[module]}.{_SUFFIXES[leaf]}"
