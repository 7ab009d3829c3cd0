"""A training step of the models of `architectures`, to be compiled for what it needs.

It is written for JAX's own settings of dtype and rank promotion.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_lowbit.memory.architectures import Architecture

Params = Any


def loss(
    a: Architecture, params: Params, tokens: jax.Array, *, remat: bool, data_axis: str | None = None
) -> jax.Array:
    """Mean loss of predicting the next tokens; of an encoder, the mean square of what it pools.

    Args:
      a: The architecture.
      params: As of :func:`abstract_params`. Activations have their dtype.
      tokens: Integers ``(batch, length)``.
      remat: Whether the activations inside of a layer are computed again for its gradient, so that
        a layer keeps its input only.
      data_axis: The mesh axis that examples are spread over; None: they are not.
    """

    def step(x, weights):
        return spread(layer(a, x, weights), data_axis), None

    x = spread(embedded(a, params, tokens), data_axis)
    x, _ = jax.lax.scan(jax.checkpoint(step) if remat else step, x, params["layers"])
    return loss_of_last(a, params, x, tokens)


def spread(x: jax.Array, data_axis: str | None) -> jax.Array:
    """Activations, with examples spread over an axis of the mesh unless that is None."""
    if data_axis is None:
        return x
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(data_axis))


def loss_of_last(a: Architecture, params: Params, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """The loss, from what the last layer gives."""
    if a.norm_first:
        x = _normed(a, x, params["final_norm"])
    if a.encoder:
        pooled = jnp.tanh(x[:, 0] @ params["pooler"] + params["pooler_bias"])
        return jnp.mean(pooled.astype(jnp.float32) ** 2)
    if a.embedding_width:
        x = x @ params["embedding_out"]
    logits = x @ (params["embedding"].T if a.tied else params["head"])
    logits = logits.astype(jnp.float32)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def embedded(a: Architecture, params: Params, tokens: jax.Array) -> jax.Array:
    """What the first layer is given: ``(batch, length, width)``."""
    x = params["embedding"][tokens]
    if a.embedding_width:
        x = x @ params["embedding_in"]
    if a.positions:
        x = x + params["positions"][: tokens.shape[1]]
    if a.encoder:
        x = _normed(a, x + params["segments"], params["embedding_norm"])
    return x


def layer(a: Architecture, x: jax.Array, weights: Params) -> jax.Array:
    """One layer, of whose weights there is no stack."""
    blocks = (_attention, "attention_norm"), (_feed_forward, "inner_norm")
    for block, norm in blocks:
        if a.norm_first:
            x = x + block(a, _normed(a, x, weights[norm]), weights)
        else:
            x = _normed(a, x + block(a, x, weights), weights[norm])
    return x


def _attention(a: Architecture, x: jax.Array, weights: Params) -> jax.Array:
    size = a.query_width // a.heads

    def heads(name):
        return _linear(x, weights, name).reshape(*x.shape[:2], -1, size)

    query, key, value = heads("query"), heads("key"), heads("value")
    if not a.positions:
        query, key = _rotated(query), _rotated(key)
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=not a.encoder)
    return _linear(mixed.reshape(*x.shape[:2], -1), weights, "output")


def _feed_forward(a: Architecture, x: jax.Array, weights: Params) -> jax.Array:
    inner = _linear(x, weights, "up")
    inner = jax.nn.silu(x @ weights["gate"]) * inner if a.gated else jax.nn.gelu(inner)
    return _linear(inner, weights, "down")


def _linear(x: jax.Array, weights: Params, name: str) -> jax.Array:
    x = x @ weights[name]
    bias = weights.get(f"{name}_bias")
    return x if bias is None else x + bias


def _normed(a: Architecture, x: jax.Array, weights: Params) -> jax.Array:
    wide = x.astype(jnp.float32)
    if a.norm == "layer":
        wide = wide - wide.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-5)
    x = (wide * scale).astype(x.dtype) * weights["scale"]
    return x + weights["bias"] if a.norm == "layer" else x


def _rotated(x: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None, None] * rates
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def train_step(
    a: Architecture,
    tx: optax.GradientTransformation,
    *,
    remat: bool = True,
    data_axis: str | None = None,
    specs: tuple[Any, Any] | None = None,
    explicit: bool = False,
) -> Callable[[Params, optax.OptState, jax.Array], tuple[Params, optax.OptState, jax.Array]]:
    """``(params, state, tokens) -> (params, state, loss)``, to be jitted by the caller.

    Args:
      a: The architecture.
      tx: The optimizer.
      remat: As of :func:`loss`.
      data_axis: As of :func:`loss`.
      specs: Partition specs of parameters, which gradients get as well, and of the state. None:
        there is one device.
      explicit: Whether shardings are part of the types as the optimizer sees them: compilers for
        TPUs part a kernel in no other way (https://github.com/jax-ml/jax/issues/38196).
    """
    loss_fn = functools.partial(loss, a, remat=remat, data_axis=data_axis)

    def update_once(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    update: Callable[..., Any] = update_once
    if explicit and specs is not None:
        update = jax.sharding.explicit_axes(update, in_sharding=(specs[0], *specs))

    def step(params, state, tokens):
        value, grads = jax.value_and_grad(loss_fn)(params, tokens)
        if specs is not None:
            grads = jax.lax.with_sharding_constraint(grads, specs[0])
        params, state = update(grads, params, state)
        return params, state, value

    return step
