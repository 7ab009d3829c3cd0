"""Stacks that the Triton kernels take in slices: interpreted, the same bits as at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit.kernels import pallas_gpu
from optax_lowbit.kernels.adam import coefficients
from optax_lowbit.kernels.pallas_gpu import slices
from optax_lowbit.kernels.parameters import Descent
from optax_lowbit.moments.presets import FIRST_MOMENT_4BIT, SECOND_MOMENT_4BIT
from optax_lowbit.quant import QuantSpec, quantize

SHAPE = 3, 10, 24
ADAM = coefficients(0.9, 0.99, 1e-8, 0.0, jnp.int32(3), nesterov=False)
MU = QuantSpec(codebook="dynamic_exponent", bits=4, signed=True, scaling="block", block_size=4)


def normal(rng, shape=SHAPE, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def second_moment(rng, scaling):
    if scaling == "factored":
        return normal(rng, (3, 10, 1)) ** 2, normal(rng, (3, 1, 24)) ** 2
    spec = QuantSpec(codebook="linear", bits=4, signed=False, scaling=scaling, block_size=4)
    return quantize(normal(rng) ** 2, spec)


def adam(grad, mu, nu, descent):
    """As `optax_lowbit.kernels.steps` calls it."""
    nu_scales = None
    if isinstance(getattr(nu, "scales", None), tuple):
        nu_scales = pallas_gpu.adam_rank1_maxima(grad, nu, ADAM, interpret=True)
    return pallas_gpu.adam(grad, mu, nu, ADAM, nu_scales=nu_scales, descent=descent, interpret=True)


def momentum(grad, mu, nu, descent):
    step = functools.partial(pallas_gpu.momentum, nesterov=True, interpret=True)
    return step(grad, mu, jnp.float32(0.9), descent=descent)


def there_and_back(grad, mu, nu, descent):
    q = pallas_gpu.quantize(grad, MU, interpret=True)
    return q, pallas_gpu.dequantize(q, interpret=True)


@pytest.mark.parametrize("has_descent", [False, True])
@pytest.mark.parametrize(
    ("step", "scaling"),
    [(adam, "block"), (adam, "rank1"), (adam, "factored"), (momentum, "block"),
     (there_and_back, "block")],
    ids=lambda x: getattr(x, "__name__", x),
)  # fmt: skip
def test_slices_have_the_bits_of_the_whole(rng, monkeypatch, step, scaling, has_descent):
    mu, nu = quantize(normal(rng), MU), second_moment(rng, scaling)
    descent = None
    if has_descent:
        descent = Descent(normal(rng, dtype=jnp.bfloat16), jnp.float32(0.1), jnp.float32(0.2))
    operands = normal(rng), mu, nu, descent
    expected = jax.jit(step)(*operands)
    whole = str(jax.make_jaxpr(step)(*operands))
    monkeypatch.setattr(slices, "MOST_ELEMENTS", 500)
    in_slices = functools.partial(step)  # another function: nothing that was traced is found
    parts = str(jax.make_jaxpr(in_slices)(*operands))
    # What a kernel is given, flattened.
    assert "f32[720]" in whole and "f32[720]" not in parts and "f32[240]" in parts
    jax.tree.map(np.testing.assert_array_equal, jax.jit(in_slices)(*operands), expected)


def test_stacks_of_layers_may_have_any_number_of_elements():
    specs = FIRST_MOMENT_4BIT, SECOND_MOMENT_4BIT
    assert pallas_gpu.why_not("adam", (40, 5120, 20480), jnp.bfloat16, *specs) is None
