"""Algorithm 1 in NumPy: dequantize, step, requantize, as the low-bit optimizers do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_lowbit
from optax_lowbit import dequantize
from tests.optimizers.cases import FOUR


def numpy_rounded(x, spec):
    """What a matrix is after it was quantized to nearest, by the table's midpoints in float32."""
    magnitudes = np.abs(x)
    if spec.scaling == "rank1":
        scales = np.minimum(magnitudes.max(1, keepdims=True), magnitudes.max(0, keepdims=True))
    else:
        blocks = magnitudes.reshape(len(x), -1, spec.block_size)
        scales = blocks.max(-1).repeat(spec.block_size, 1)
    table = optax_lowbit.codebook(spec.codebook, spec.bits, spec.signed)
    ratio = np.divide(x, scales, out=np.zeros_like(x), where=scales > 0)
    return table[np.searchsorted((table[1:] + table[:-1]) / np.float32(2), ratio)] * scales


def lion_step(g, moments, t):
    (m,) = moments
    return np.sign(0.9 * m + 0.1 * g), [0.99 * m + 0.01 * g]


def ademamix_step(g, moments, t):
    m1, m2, nu = moments
    m1, m2 = 0.9 * m1 + 0.1 * g, 0.9999 * m2 + 0.0001 * g
    nu = 0.999 * nu + 0.001 * g**2
    denominator = np.sqrt(nu / (1 - 0.999**t)) + 1e-8
    return (m1 / (1 - 0.9**t) + 5 * m2) / denominator, [m1, m2, nu]


def rmsprop_step(g, moments, t):
    nu = 0.9 * moments[0] + 0.1 * g**2
    return g / np.sqrt(nu + 1e-8), [nu]


def centered_step(g, moments, t):
    mu, nu = moments
    nu = np.maximum(nu, (1 + 2**-16) * mu**2)
    mu, nu = 0.9 * mu + 0.1 * g, 0.9 * nu + 0.1 * g**2
    return g / np.sqrt(nu - mu**2 + 1e-8), [mu, nu]


def adagrad_step(g, moments, t):
    total = moments[0] + g**2
    return g / np.sqrt(total + 1e-7), [total]


ALGORITHMS = {
    "lion4bit": (
        optax_lowbit.lion4bit(1.0, weight_decay=0.0, mu_spec=FOUR),
        lion_step,
        ["mu"],
        0.0,
    ),
    "lion8bit": (optax_lowbit.lion8bit(1.0, weight_decay=0.0), lion_step, ["mu"], 0.0),
    "ademamix4bit": (
        optax_lowbit.ademamix4bit(1.0, m2_spec=FOUR), ademamix_step, ["m1", "m2", "nu"], 0.0,
    ),
    "rmsprop8bit": (optax_lowbit.rmsprop8bit(1.0, initial_scale=0.5), rmsprop_step, ["nu"], 0.5),
    "rmsprop8bit-centered": (
        optax_lowbit.rmsprop8bit(1.0, centered=True), centered_step, ["mu", "nu"], 0.0,
    ),
    "adagrad8bit": (optax_lowbit.adagrad8bit(1.0), adagrad_step, ["sum_of_squares"], 0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", ALGORITHMS)
def test_steps_are_those_of_algorithm_1(name):
    tx, step, names, initial = ALGORITHMS[name]
    rng = np.random.default_rng(0)
    # A power of two lies on no border of a code.
    grads = [rng.standard_t(4, (48, 256)).astype(np.float32) for _ in range(3)]
    params = jnp.zeros((48, 256))
    state = tx.init(params)
    update = jax.jit(tx.update)
    floats = [np.full((48, 256), initial, np.float32) for _ in names]
    for t, grad in enumerate(grads, 1):
        updates, state = update(grad, state, params)
        expected, new = step(grad, floats, t)
        moments = [getattr(state[0], moment) for moment in names]
        # From the state just reached, lest one code on a border make all later steps differ.
        floats = [np.asarray(dequantize(moment)) for moment in moments]
        off = np.abs(-updates - expected) > 1e-5 * np.abs(expected) + 1e-6
        assert off.mean() < 1e-3, t
        for moment, after, stored in zip(moments, new, floats):
            rounded = numpy_rounded(after.astype(np.float32), moment.spec)
            assert np.mean(np.abs(stored - rounded) > 1e-6 * np.abs(rounded)) < 2e-3, t
