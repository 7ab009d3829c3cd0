"""Prompts and prefixes in Flax NNX models. Imported only where it is used: it needs Flax."""

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_lowbit.adapters.arrays import is_quantized_matrix
from optax_lowbit.adapters.nnx_layers import LoRAEmbed, node_path
from optax_lowbit.adapters.prefix import prefix_mask
from optax_lowbit.adapters.virtual_tokens import prepend, random_tokens
from optax_lowbit.kernels.reference import widened

if TYPE_CHECKING:
    from optax_lowbit.adapters.prefix import Prefix
    from optax_lowbit.adapters.prompt import Prompt

Entries = Mapping[str, Mapping[str, jax.Array]]


class PromptEmbed(nnx.Module):
    """An embedding that puts a prompt in front of the tokens that are looked up.

    Attributes:
      base: `nnx.Embed`, frozen.
      prompt: `nnx.LoRAParam`, float32 ``(num_tokens, features)``.
    """

    trained = ("prompt",)

    def __init__(self, base: Any, prompt: jax.Array):
        self.base = base
        self.prompt = nnx.LoRAParam(prompt)

    def __call__(self, tokens: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Of tokens ``(batch, length)``: ``(batch, num_tokens + length, features)``."""
        return prepend(self.prompt[...], self.base(tokens, *args, **kwargs))

    def attend(self, query: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """As of the base: a prompt is no token that could be predicted."""
        return self.base.attend(query, *args, **kwargs)


class PrefixAttention(nnx.Module):
    """An `attention_fn` of `nnx.MultiHeadAttention` with keys and values in front of its own.

    Attributes:
      attention_fn: The function, as it was.
      keys, values: `nnx.LoRAParam`, float32 ``(..., num_tokens, heads, head_size)``; leading axes
        are those of layers that are stacked.
      is_recording: Whether a call puts what it is given there, and attends to nothing else.
    """

    trained = ("keys", "values")

    def __init__(self, attention_fn: Callable[..., jax.Array], shape: tuple[int, ...]):
        self.attention_fn = attention_fn
        self.keys = nnx.LoRAParam(jnp.zeros(shape, jnp.float32))
        self.values = nnx.LoRAParam(jnp.zeros(shape, jnp.float32))
        self.is_recording = False

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        mask: jax.Array | None = None,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> jax.Array:
        """Attention of ``(batch, length, heads, head_size)``, of which each sees the prefix."""
        num_tokens = self.keys.shape[-3]
        if self.is_recording:
            # A prompt may stand in front of them.
            self.keys.set_value(widened(key[0, -num_tokens:]))
            self.values.set_value(widened(value[0, -num_tokens:]))
            return self.attention_fn(query, key, value, mask=mask, is_causal=is_causal, **kwargs)
        causal = prefix_mask(num_tokens, key.shape[1])[None, None] if is_causal else None
        if mask is not None:
            mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(num_tokens, 0)], constant_values=1)
        return self.attention_fn(
            query, prepend(self.keys[...], key), prepend(self.values[...], value),
            mask=nnx.combine_masks(mask, causal), is_causal=False, **kwargs,
        )  # fmt: skip


_LAYERS: dict[str, type[PromptEmbed] | type[PrefixAttention]] = {
    kind.__name__: kind for kind in (PromptEmbed, PrefixAttention)
}


def wrap_embedding(prompt: "Prompt", model: nnx.Module, key: jax.Array | int) -> nnx.Module:
    """See :meth:`Prompt.wrap`."""
    if prompted := extract_virtual(model, PromptEmbed.__name__):
        raise ValueError(f"model has a prompt already, at {[*prompted]}")
    path = _only(_tables(model), prompt.targets)

    def wrapped(own, node):
        if node_path(own) != path:
            return node
        table = getattr(node, "base", node).embedding[...]
        return PromptEmbed(node, prompt.init(table, key))

    return nnx.recursive_map(wrapped, model)


def wrap_attention(
    prefix: "Prefix",
    model: nnx.Module,
    key: jax.Array | int,
    vocabulary_size: int,
    call: Callable[[Any, jax.Array], Any],
) -> nnx.Module:
    """See :meth:`Prefix.wrap`."""
    tokens = random_tokens(prefix.num_tokens, vocabulary_size, key)
    found: dict[str, PrefixAttention] = {}

    def wrapped(path, node):
        if isinstance(node, nnx.MultiHeadAttention) and re.search(prefix.targets, node_path(path)):
            if isinstance(node.attention_fn, PrefixAttention):
                raise ValueError(f"model has a prefix already, at {node_path(path)!r}")
            attention = PrefixAttention(node.attention_fn, _shape(node, prefix.num_tokens))
            node.attention_fn = nnx.data(attention)
            found[node_path(path)] = node.attention_fn
        return node

    new = nnx.recursive_map(wrapped, model)
    if not found:
        raise ValueError(f"targets={prefix.targets!r} must choose an nnx.MultiHeadAttention")
    starts = {path: attention.keys.get_value() for path, attention in found.items()}
    for attention in found.values():
        attention.is_recording = True
    call(new, tokens[None])
    for path, attention in found.items():
        keys = attention.keys.get_value()
        if keys is starts[path] or keys.shape != starts[path].shape:
            raise ValueError(f"call must run all tokens through {path!r}, or targets leave it out")
        attention.is_recording = False
    return new


def unwrap_virtual(model: nnx.Module, layer: str) -> nnx.Module:
    """See :meth:`VirtualTokens.unwrap`."""

    def without_prompt(path, node):
        return node.base if isinstance(node, PromptEmbed) else node

    def without_prefix(path, node):
        attention = node.attention_fn if isinstance(node, nnx.MultiHeadAttention) else None
        if isinstance(attention, PrefixAttention):
            node.attention_fn = nnx.static(attention.attention_fn)
        return node

    unwrapped = without_prompt if layer == PromptEmbed.__name__ else without_prefix
    return nnx.recursive_map(unwrapped, model)


def extract_virtual(model: nnx.Module, layer: str) -> dict[str, dict[str, jax.Array]]:
    """See :meth:`VirtualTokens.extract`."""
    return {
        path: {name: getattr(node, name)[...] for name in node.trained}
        for path, node in _found(model, layer).items()
    }


def update_virtual(model: nnx.Module, layer: str, adapters: Entries) -> None:
    """See :meth:`VirtualTokens.update`."""
    shapes = jax.tree.map(jnp.shape, extract_virtual(model, layer))
    if (got := jax.tree.map(jnp.shape, {**adapters})) != shapes:
        raise ValueError(
            f"adapters must have the shapes {shapes}, as those of the model, got {got}"
        )
    for path, node in _found(model, layer).items():
        for name in node.trained:
            getattr(node, name).set_value(widened(adapters[path][name]))


def _found(model: nnx.Module, layer: str) -> dict[str, PromptEmbed | PrefixAttention]:
    """By the path of the layer in the plain model: an attention function is inside of its own."""
    return {
        node_path(path[:-1] if isinstance(node, PrefixAttention) else path): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, _LAYERS[layer])
    }


def _tables(model: nnx.Module) -> list[str]:
    """Paths of embeddings, with adapters or without."""
    found = dict(nnx.iter_graph(model))
    tables = [path for path, node in found.items() if isinstance(node, nnx.Embed | LoRAEmbed)]
    return [node_path(path) for path in tables if path[:-1] not in tables]


def _only(paths: list[str], pattern: str) -> str:
    chosen = [path for path in paths if re.search(pattern, path)]
    if len(chosen) != 1:
        raise ValueError(
            f"targets={pattern!r} must choose one nnx.Embed, got {chosen}; the model has {paths}"
        )
    return chosen[0]


def _shape(attention: nnx.MultiHeadAttention, num_tokens: int) -> tuple[int, ...]:
    """That of its keys for so many tokens, with the axes of layers that are stacked in front."""
    layer = getattr(attention.key, "base", attention.key)
    kernel = layer.kernel.get_value()
    stack = kernel.shape[: -2 if is_quantized_matrix(kernel) else -3]
    return (*stack, num_tokens, *layer.out_features)
