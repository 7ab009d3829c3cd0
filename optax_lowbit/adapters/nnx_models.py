"""Flax NNX models with adapters in their layers. Imported only where it is used: it needs Flax."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_lowbit.adapters import sites
from optax_lowbit.adapters.arrays import is_quantized_matrix
from optax_lowbit.adapters.entries import Entry, check_shapes, new_entry, pair_of
from optax_lowbit.adapters.merging import Adapters, check_unmergeable
from optax_lowbit.adapters.nnx_einsum import LoRAEinsum
from optax_lowbit.adapters.nnx_layers import (
    LoRAConv,
    LoRAEmbed,
    LoRALayer,
    LoRALinear,
    TrainedParam,
    node_path,
)
from optax_lowbit.kernels.reference import float_dtype, name_hash
from optax_lowbit.quant import random_bits

if TYPE_CHECKING:
    from optax_lowbit.adapters.lora import LoRA

_LAYERS: tuple[type[LoRALayer], ...] = (LoRALinear, LoRAEmbed, LoRAConv, LoRAEinsum)
# Variables that are no parameters.
_NO_PARAMETERS = (nnx.BatchStat, nnx.RngState, nnx.Cache, nnx.Intermediate)


def wrap_layers(
    lora: "LoRA", model: nnx.Module, key: jax.Array | int, weights: nnx.Module | None
) -> nnx.Module:
    """See :meth:`LoRA.wrap`."""
    kernels = _kernels(lora, model)
    for path, node in nnx.iter_graph(model):
        if isinstance(node, LoRALayer):
            raise ValueError(
                f"model has adapters already, at {node_path(path)!r}: adapters.mix and lora.update "
                "put others in"
            )
    chosen = set(sites.chosen_matrices(lora, kernels))
    trained = _trained_variables(lora, model, chosen)
    originals = {} if weights is None else _kernels(lora, weights)

    def wrapped(path, node):
        _replace_variables(node, lambda variable: trained.get(id(variable)))
        kind = _kind(node)
        if kind is None or node_path(path, kind.adapted) not in chosen:
            return node
        name, variable = node_path(path, kind.adapted), getattr(node, kind.adapted)
        kernel = kind.in_order(node, kernels[name])
        site = sites.site_of(lora, name, kernel, kind.kernel_axes(node))
        original = _original(kind, node, kernel, originals.get(name))
        base, entry = new_entry(lora, site, kernel, key, original)
        if base is not kernel:
            setattr(node, kind.adapted, variable.replace(kind.out_of_order(node, base)))
        has_dropout = kind is not LoRAEmbed
        return kind(node, entry, site.scale, _dropout(lora, site, key) if has_dropout else None)

    return nnx.recursive_map(wrapped, model)


def unwrap_layers(model: nnx.Module) -> nnx.Module:
    """See :meth:`LoRA.unwrap`."""
    restored = _restored_variables(model)

    def unwrapped(path, node):
        _replace_variables(node, lambda variable: restored.get(id(variable)))
        return node.merged() if isinstance(node, LoRALayer) else node

    return nnx.recursive_map(unwrapped, model)


def unmerge_layers(lora: "LoRA", model: nnx.Module, adapters: Adapters) -> nnx.Module:
    """See :meth:`LoRA.unmerged`."""
    left = dict(adapters)

    def unmerged(path, node):
        kind = _kind(node)
        if kind is None or (name := node_path(path, kind.adapted)) not in left:
            return node
        entry, kernel = left.pop(name), kind.in_order(node, getattr(node, kind.adapted).get_value())
        check_unmergeable(name, kernel, entry)
        site = sites.site_of(lora, name, kernel, kind.kernel_axes(node))
        check_shapes(_with_all_ranks(site, entry), kernel, entry)
        a, b = pair_of(entry)
        return kind(node, {"a": a, "b": b}, -site.scale).merged()

    new = nnx.recursive_map(unmerged, model)
    for path, entry in left.items():
        check_unmergeable(path, None, entry)
    if left:
        raise ValueError(f"adapters must be of layers of the model, which has no {sorted(left)}")
    return new


def _with_all_ranks(site: sites.Site, entry: Entry) -> sites.Site:
    """The site, or, of what was extracted of a mixture, that with the ranks of all together."""
    shape = jnp.shape(entry.get("a", 0))
    if "weights" in entry or len(shape) < 2 or not shape[-2] or shape[-2] % site.rank:
        return site
    return dataclasses.replace(site, rank=shape[-2])


def requantize_layers(model: nnx.Module) -> tuple[nnx.Module, dict[str, jax.Array]]:
    """See :meth:`LoRA.requantized`."""
    errors, restored = {}, _restored_variables(model)

    def unwrapped(path, node):
        _replace_variables(node, lambda variable: restored.get(id(variable)))
        if not isinstance(node, LoRALayer):
            return node
        layer, error = node.requantized()
        if error is not None:
            errors[node_path(path, node.adapted)] = error
        return layer

    return nnx.recursive_map(unwrapped, model), errors


def extract_adapters(model: nnx.Module) -> dict[str, dict[str, jax.Array]]:
    """See :meth:`LoRA.extract`."""
    return {
        path: node.entry() if isinstance(node, LoRALayer) else {"value": _value(node)}
        for path, node in _adapted_nodes(model).items()
    }


def update_adapters(lora: "LoRA", model: nnx.Module, adapters: Adapters) -> None:
    """See :meth:`LoRA.update`."""
    nodes = _adapted_nodes(model)
    if nodes.keys() != adapters.keys():
        raise ValueError(
            f"adapters must be of {sorted(nodes)}, as those of the model, got {sorted(adapters)}"
        )
    for path, node in nodes.items():
        _check_entry(lora, path, node, adapters[path])
    for path, node in nodes.items():
        if isinstance(node, LoRALayer):
            node.set_entry(adapters[path])
        else:
            node.set_value(adapters[path]["value"].astype(node.dtype))


def _check_entry(lora, path, node, entry):
    if isinstance(node, LoRALayer):
        # Those of a mixture have other ranks than the site's.
        if jax.tree.map(jnp.shape, dict(entry)) == jax.tree.map(jnp.shape, node.entry()):
            return None
        kernel = node.matrix().base
        site = sites.site_of(lora, path, kernel, node.kernel_axes(node.base))
        return check_shapes(site, kernel, entry)
    shapes = {name: jnp.shape(x) for name, x in entry.items()}
    if shapes != {"value": node.shape}:
        raise ValueError(
            f"adapters[{path!r}] must have a value of shape {node.shape}, got {shapes}"
        )


def _kernels(lora: "LoRA", model: nnx.Module) -> dict[str, Any]:
    """What can have adapters, by path."""
    kernels = {}
    for path, node in nnx.iter_graph(model):
        kind = _kind(node)
        # Under "all-linear" convolutions have none, as in PEFT.
        if kind is None or (kind is LoRAConv and lora.targets == "all-linear"):
            continue
        kernels[node_path(path, kind.adapted)] = getattr(node, kind.adapted).get_value()
    return kernels


def _kind(node: Any) -> type[LoRALayer] | None:
    """The layer with adapters that takes a node, if there is one."""
    return next((kind for kind in _LAYERS if kind.takes(node)), None)


def _original(kind, node, kernel, weights) -> Any:
    """What ``kernel`` was quantized from, as it is: a matrix."""
    if weights is None or is_quantized_matrix(weights):
        return weights
    weights = kind.in_order(node, weights)
    is_flat = is_quantized_matrix(kernel) and weights.size == kernel.size
    return weights.reshape(kernel.shape) if is_flat else weights


def _trained_variables(lora, model, adapted) -> dict[int, TrainedParam]:
    """By the identity of each variable that trains itself, what takes its place."""
    dtypes, variables = {}, {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable) and not isinstance(node, _NO_PARAMETERS):
            variables[node_path(path)] = node
        elif isinstance(node, nnx.Module):
            dtypes[node_path(path)] = getattr(node, "dtype", None)
    leaves = {path: variable.get_value() for path, variable in variables.items()}
    trained = {}
    for path in sites.chosen_values(lora, leaves, adapted):
        own = leaves[path].dtype
        # A layer without a dtype would compute in that of its widest parameter.
        has_dtype = dtypes.get(path.rpartition("/")[0]) is not None
        variable, dtype = variables[path], float_dtype(own) if has_dtype else own
        before = {"type_before": type(variable), "dtype_before": own}
        metadata = variable.get_metadata()
        trained[id(variable)] = TrainedParam(leaves[path].astype(dtype), **metadata, **before)
    return trained


def _restored_variables(model) -> dict[int, nnx.Variable]:
    """By the identity of each variable that trains itself, one as it was before."""
    restored = {}
    for _, node in nnx.iter_graph(model):
        if isinstance(node, TrainedParam):
            metadata = node.get_metadata()
            kind, dtype = metadata.pop("type_before"), metadata.pop("dtype_before")
            restored[id(node)] = kind(node.get_value().astype(dtype), **metadata)
    return restored


def _replace_variables(node: Any, new: Callable[[nnx.Variable], nnx.Variable | None]) -> None:
    """Others in the place of a module's own variables, into which `nnx.recursive_map` writes."""
    if isinstance(node, nnx.List):
        for i, child in enumerate(node):
            if isinstance(child, nnx.Variable) and (variable := new(child)) is not None:
                node[i] = variable
    elif isinstance(node, nnx.Module):
        for name, child in list(vars(node).items()):
            if isinstance(child, nnx.Variable) and (variable := new(child)) is not None:
                setattr(node, name, variable)


def _value(variable: nnx.Variable) -> jax.Array:
    value = variable.get_value()
    return value.astype(float_dtype(value.dtype))


def _adapted_nodes(model: nnx.Module) -> dict[str, Any]:
    """Layers with adapters and variables that train themselves, by paths of the plain model."""
    found = list(nnx.iter_graph(model))
    layers = {path: node for path, node in found if isinstance(node, LoRALayer)}
    nodes: dict[str, Any] = {node_path(path, node.adapted): node for path, node in layers.items()}
    for path, node in found:
        if isinstance(node, TrainedParam):
            is_in_layer = path[:-2] in layers and path[-2] == "base"
            nodes[node_path(path[:-2] + path[-1:] if is_in_layer else path)] = node
    return nodes


def _dropout(lora, site, key) -> nnx.Dropout | None:
    if not lora.dropout:
        return None
    words = random_bits.fold_in(random_bits.key_words(key), name_hash(f"{site.path}/dropout"))
    own = jax.random.wrap_key_data(jnp.stack(words), impl="threefry2x32")
    stream = nnx.RngStream(jax.random.split(own, site.stack) if site.stack else own, tag="dropout")
    dropout = nnx.Dropout(lora.dropout, deterministic=True)
    dropout.rngs = stream
    return dropout
