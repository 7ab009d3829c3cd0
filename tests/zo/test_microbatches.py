"""The mean loss over parts of a batch, against that of the batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import zo
from tests.zo.quick_noise import QuickSigns

PARAMS = {"embedding": jnp.linspace(-1, 1, 20).reshape(5, 4), "w": jnp.ones((4, 3)), "none": None}
TOKENS = jnp.array([0, 3, 1, 4, 2, 2, 0, 1])


def loss(params, tokens, targets, scale=1.0):
    x = jnp.tanh(params["embedding"][tokens] @ params["w"])
    return jnp.mean((x - targets[:, None]) ** 2) * scale


def test_estimate_and_gradient_are_those_of_the_batch():
    opt = zo.zo_sgd(0.1, eps=0.125, noise=QuickSigns())
    state = opt.init(PARAMS, 1)

    @jax.jit
    def found(targets):
        return [
            (opt.estimate(fun, PARAMS, state, *args), jax.grad(fun)(PARAMS, *args))
            for fun in (zo.microbatched(loss, 4), loss)
            for args in [(TOKENS, targets, 2.0)]
        ]

    mine, whole = found(jnp.linspace(0, 1, 8))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), mine, whole)


def test_parts_are_every_so_many_rows():
    def product(params, x):
        return x[0] * x[1] + params

    found = zo.microbatched(product, 3)(jnp.float32(0), jnp.arange(6.0))
    np.testing.assert_allclose(found, (0 * 3 + 1 * 4 + 2 * 5) / 3, rtol=1e-6)


def test_each_part_draws_anew_where_it_needs():
    drawn = []

    @dataclasses.dataclass(frozen=True)
    class Counted(QuickSigns):
        def draw(self, probe, rows):
            drawn.append((rows.leaf, rows.values.shape))
            return super().draw(probe, rows)

    opt = zo.zo_sgd(0.1, noise=Counted())
    with jax.disable_jit():
        opt.estimate(zo.microbatched(loss, 4), PARAMS, opt.init(PARAMS, 1), TOKENS, jnp.ones(8))
    # Two evaluations of four parts: two rows of the embedding, and the matrix.
    assert sorted(drawn) == [*[(0, (2, 4))] * 8, *[(1, (4, 3))] * 8]


def test_memory_is_that_of_a_part():
    params = {"a": jnp.zeros((64, 64)), "b": jnp.zeros((64, 64))}

    def deep(params, x):
        return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"]) ** 2)

    def temporaries(loss_fn):
        opt = zo.zo_sgd(0.1, noise=QuickSigns())
        compiled = jax.jit(functools.partial(opt.estimate, loss_fn)).lower(
            params, opt.init(params, 0), jnp.zeros((4096, 64))
        )
        return compiled.compile().memory_analysis().temp_size_in_bytes

    batch = 4096 * 64 * 4
    assert temporaries(deep) > batch
    # A part is a sixteenth; and a few leaves.
    assert temporaries(zo.microbatched(deep, 16)) < batch / 16 * 2 + 4 * 64 * 64 * 4


def test_wrong_arguments():
    with pytest.raises(ValueError, match="number must be an int"):
        zo.microbatched(loss, 2.0)
    with pytest.raises(ValueError, match="number=3 parts must divide the batch, which has 8 rows"):
        zo.microbatched(loss, 3)(PARAMS, TOKENS, TOKENS)
    with pytest.raises(ValueError, match="batch axis"):
        zo.microbatched(lambda params: jnp.sum(params), 3)(jnp.ones(2))
    with pytest.raises(TypeError, match="float of shape"):
        zo.microbatched(lambda params, x: x, 2)(jnp.ones(2), TOKENS)
