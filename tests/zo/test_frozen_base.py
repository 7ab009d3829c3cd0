"""Steps of small float leaves over a low-bit base that is frozen."""

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit import QuantSpec, dequantize, quantize, zo

NF4 = QuantSpec(
    codebook="nf4", bits=4, signed=True, scaling="block", block_size=16, double_quant=True
)


def test_adapters_train_over_a_base_that_keeps_its_bits():
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (64, 16))
    base = quantize(jax.random.normal(keys[1], (16, 24)), NF4)
    wanted = jax.random.normal(keys[2], (16, 2)) @ jax.random.normal(keys[3], (2, 24))
    params = {
        "layer": {
            "base": base,
            "a": jax.random.normal(keys[4], (16, 2)).astype(jnp.bfloat16),
            "b": jnp.zeros((2, 24), jnp.bfloat16),
        }
    }
    target = x @ (dequantize(base) + wanted * 0.3)

    def loss(params):
        layer = params["layer"]
        low_rank = jnp.dot(x.astype(jnp.bfloat16), layer["a"]) @ layer["b"]
        return jnp.mean(
            (x @ dequantize(layer["base"]) + low_rank.astype(jnp.float32) - target) ** 2
        )

    opt = zo.zo_sgd(2e-2, eps=1e-2, num_probes=4, trainable=r"(^|/)[ab]$")
    state = opt.init(params, 0)
    step = jax.jit(opt.step, static_argnums=0, donate_argnums=(1, 2))
    before = loss(params)
    kept = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params["layer"]["base"])]
    start = {name: np.asarray(params["layer"][name], np.float32) for name in "ab"}
    for _ in range(300):
        params, state, _ = step(loss, params, state)
    layer = params["layer"]
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(layer["base"])] == kept
    assert all((np.asarray(layer[name], np.float32) != start[name]).any() for name in "ab")
    assert loss(params) < before / 2
