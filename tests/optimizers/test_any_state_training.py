"""`quantize_state` in training: the loss of float32, a share of its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from optax_lowbit import Policy, QuantSpec, quantize_state
from tests.optimizers.cases import standard_promotion
from tests.optimizers.test_memory import shares

EIGHT_BITS = Policy(rules=[("", {"mu": QuantSpec(
    codebook="dynamic_exponent", bits=8, signed=True, scaling="block")})])  # fmt: skip


@pytest.mark.parametrize(
    ("tx", "policy"),
    [
        (optax.rmsprop(1e-2), None),
        (optax.adabelief(1e-2), None),
        # Momenta of 0.99 and 0.95, without noise in the gradients: 4 bits lose small changes.
        (optax.lion(3e-3), EIGHT_BITS),
        (optax.contrib.muon(2e-2), EIGHT_BITS),
    ],
    ids=["rmsprop", "adabelief", "lion-8bit", "muon-8bit"],
)
def test_it_trains_like_float32(tx, policy):
    """A matrix from products with it: the loss falls to a small share, as in float32."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(128, 96)), jnp.float32)
    y = x @ jnp.asarray(rng.normal(size=(96, 64)) / 10, jnp.float32)
    start = jnp.zeros((96, 64))

    def loss_fn(w):
        return jnp.mean((x @ w - y) ** 2)

    def train(tx):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(w), state, w)
            return (optax.apply_updates(w, updates), state), None

        with standard_promotion():
            (w, _), _ = jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), length=150))()
        return loss_fn(w) / loss_fn(start)

    float32, low_bit = train(tx), train(quantize_state(tx, policy))
    assert float32 < 0.05
    assert abs(low_bit - float32) < 0.02


MEASURE = """
import json
import jax, jax.numpy as jnp, optax, optax.contrib
from optax_lowbit import quantize_state

params = {f"layer{i}": jax.ShapeDtypeStruct((2048, 2048), jnp.float32) for i in range(12)}

def share(tx):
    state = jax.eval_shape(tx.init, params)
    update = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state, params).compile()
    return update.memory_analysis().temp_size_in_bytes / (12 * 2048 * 2048 * 4)

def chain(core):
    return optax.chain(optax.clip_by_global_norm(1.0), core, optax.add_decayed_weights(0.1),
                       optax.scale_by_learning_rate(1e-3))

print(json.dumps({
    "lion": share(quantize_state(chain(optax.scale_by_lion()))),
    "adam": share(quantize_state(chain(optax.scale_by_adam()))),
    "lamb": share(quantize_state(optax.lamb(1e-3))),
    "float32": share(chain(optax.scale_by_adam())),
}))
"""


def test_an_update_holds_a_tile_or_a_leaf_in_float32():
    """12 leaves, 50M parameters: temporaries as a share of the parameters' bytes."""
    measured = shares(MEASURE)
    assert measured["lion"] < 0.01 and measured["adam"] < 0.01, measured
    assert measured["lamb"] < 0.45, measured  # five times one leaf
    assert measured["float32"] > 0.9, measured
