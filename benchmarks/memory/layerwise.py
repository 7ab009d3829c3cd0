"""A training step that updates each layer as soon as its gradients are there.

The gradients of one layer exist at a time, and never those of all. It is what a user can write by
hand; Lv et al, `Full Parameter Fine-tuning with Limited Resources
<https://arxiv.org/abs/2306.09782>`_, 2023, do it for SGD.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_lowbit.memory.architectures import Architecture
from optax_lowbit.memory.transformer import embedded, layer, loss_of_last, spread

State = tuple[optax.OptState, optax.OptState]


def split(params: Any) -> tuple[Any, Any]:
    """Parameters outside of the layers, and the stacks of those inside, under their names."""
    outer = {name: leaf for name, leaf in params.items() if name != "layers"}
    return outer, {"layers": params["layers"]}


def init(tx: optax.GradientTransformation, params: Any) -> State:
    """The state of the parameters outside of the layers, and a stack of states of the layers."""
    outer, layers = split(params)
    return tx.init(outer), jax.vmap(tx.init)(layers)


def step(
    a: Architecture,
    tx: optax.GradientTransformation,
    params: Any,
    state: State,
    tokens: jax.Array,
    data_axis: str | None = None,
) -> tuple[Any, State, jax.Array]:
    """``(params, state, loss)`` after a step. A layer's activations are computed again."""
    outer, layers = split(params)
    outer_state, layer_states = state

    def forward(x, weights):
        return spread(layer(a, x, weights["layers"]), data_axis)

    def embed(outer):
        return spread(embedded(a, outer, tokens), data_axis)

    def update(grads, state, params) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    x, back_to_embedding = jax.vjp(embed, outer)
    x, inputs = jax.lax.scan(lambda x, weights: (forward(x, weights), x), x, layers)
    value, back_from_loss = jax.vjp(lambda p, x: loss_of_last(a, p, x, tokens), outer, x)
    outer_grads, x_grad = back_from_loss(jnp.ones_like(value))

    def backward(i, carry):
        # In a carry the stacks are written in place; as what a scan returns they would be copied.
        x_grad, stacks = carry
        index = a.layers - 1 - i
        weights, layer_state = at(stacks, index)
        _, back = jax.vjp(forward, at(inputs, index), weights)
        x_grad, grads = back(x_grad)
        return x_grad, put(stacks, index, update(grads, layer_state, weights))

    carry = x_grad, (layers, layer_states)
    x_grad, (layers, layer_states) = jax.lax.fori_loop(0, a.layers, backward, carry)
    (embedding_grads,) = back_to_embedding(x_grad)
    grads = jax.tree.map(jnp.add, outer_grads, embedding_grads)
    outer, outer_state = update(grads, outer_state, outer)
    return {**outer, "layers": layers["layers"]}, (outer_state, layer_states), value


def at(tree: Any, index: jax.Array) -> Any:
    """Of each stack, the slice of one layer."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def put(tree: Any, index: jax.Array, slices: Any) -> Any:
    """The stacks with the slices of one layer replaced."""
    return jax.tree.map(
        lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, index, 0), tree, slices
    )
