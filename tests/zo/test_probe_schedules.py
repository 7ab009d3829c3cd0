"""Schedules of the number of probes, of methods that look at several of them together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import zo

X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
PARAMS = {
    "w": jnp.asarray(np.random.default_rng(1).normal(size=(6, 8)), jnp.float32),
    "b": jnp.linspace(-1.0, 1.0, 8),
}
METHODS = {
    "fzoo": lambda q, **options: zo.fzoo(0.1, 0.1, q, **options),
    "lozo": lambda q, **options: zo.lozo(0.1, 0.1, q, momentum=0.5, **options),
    "hizoo": lambda q, **options: zo.hizoo(0.1, num_probes=q, smoothing=0.5, **options),
    "hizoo by differences": lambda q, **options: zo.hizoo(
        0.1, 0.1, q, smoothing=0.5, curvature="difference", **options
    ),
}
# Evaluations of a step with 2 probes; an exact curvature takes one with tangents.
PASSES = {"fzoo": 3, "lozo": 4, "hizoo": 2, "hizoo by differences": 5}


def loss(params):
    return jnp.sum(jnp.sin(X @ params["w"] + params["b"][None]) ** 2)


@pytest.mark.parametrize("method", METHODS)
def test_step_is_that_of_so_many_probes_at_their_cost(method):
    calls = []

    def counted(params):
        jax.debug.callback(lambda: calls.append(1))
        return loss(params)

    # A spread takes two probes: that of one is not asked for.
    given = 1 if method == "fzoo" else 2
    scheduled = METHODS[method](5, active_probes=lambda count: given * count)
    fixed = METHODS[method](2)
    state = fixed.init(PARAMS, 3)._replace(count=jnp.int32(1))
    *new, info = jax.jit(scheduled.step, static_argnums=0)(counted, PARAMS, state)
    jax.effects_barrier()
    assert len(calls) == PASSES[method]
    *expected, theirs = jax.jit(fixed.step, static_argnums=0)(loss, PARAMS, state)
    np.testing.assert_allclose(info.loss, theirs.loss, rtol=1e-6)
    np.testing.assert_allclose(info.coefficients[:2], theirs.coefficients, rtol=1e-4)
    assert not info.coefficients[2:].any()
    for x, y in zip(*map(jax.tree.leaves, (new, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert np.all(new[0]["w"] != PARAMS["w"])
