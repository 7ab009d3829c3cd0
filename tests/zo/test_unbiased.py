"""Estimates of many probes against the gradient, within what their known variance allows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import zo

PROBES = 2**14
# A mean of so many is normal, and beyond 4.5 standard deviations once in 150,000 times.
SIGMAS = 4.5
PARAMS = {
    "matrix": (jnp.arange(12.0).reshape(3, 4) * 0.37) % 1 - 0.4,
    "vector": jnp.array([0.5, -1.0, 0.3, 0.8]),
}
# Second derivatives of the loss, whose Hessian is diagonal.
CURVATURE = np.linspace(0.5, 3.0, 16)
EPS = 0.5


def quadratic(params):
    """Central differences of it are exact, so the mean of estimates is its gradient."""
    x = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])
    return jnp.sum(jnp.asarray(CURVATURE, jnp.float32) * (x - 1) ** 2) / 2


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


GRADIENT = CURVATURE * (flat(PARAMS).astype(np.float64) - 1)


def mean_estimate(opt, state=None):
    """The mean of ``c_i z_i`` over the probes of one step."""
    state = opt.init(PARAMS, 6) if state is None else state

    @jax.jit
    def mean(state):
        info = opt.estimate(quadratic, PARAMS, state)
        return opt.combine(PARAMS, state, info.coefficients / PROBES)

    return flat(mean(state)).astype(np.float64)


def check(found, expected, variance):
    """Elements without variance are exact, and the bounds of others far below what they bound."""
    bound = SIGMAS * np.sqrt(variance / PROBES)
    assert np.linalg.norm(bound) < np.linalg.norm(expected) / 4
    assert (np.abs(found - expected) <= bound).all()


def many(noise, **arguments):
    return zo.zo_sgd(1.0, EPS, PROBES, noise=noise, probe_batch=PROBES, **arguments)


def test_gaussian():
    # E[(z_i z^T g)^2] = |g|^2 + 2 g_i^2.
    variance = np.sum(GRADIENT**2) + GRADIENT**2
    check(mean_estimate(many(zo.Gaussian())), GRADIENT, variance)


def test_one_sided():
    # z^T H z is the trace for signs: its product with z_i has no mean, but a variance.
    variance = np.sum(GRADIENT**2) - GRADIENT**2 + (EPS / 2 * CURVATURE.sum()) ** 2
    check(mean_estimate(many(zo.Rademacher(), estimator=zo.OneSided())), GRADIENT, variance)


def kept_by_size(share, largest):
    """Where weights are, over both leaves, that a share of the others is larger or smaller than."""
    size = np.abs(flat(PARAMS))
    left_out = round(share * size.size)
    order = np.argsort(-size if largest else size)
    return ~np.isin(np.arange(size.size), order[:left_out])


@pytest.mark.parametrize("scope", ["leaf", "global"])
@pytest.mark.parametrize("make", [zo.MagnitudeMask, zo.RandomMask])
def test_masks(make, scope):
    found = mean_estimate(many(make(zo.Rademacher(), 0.375, 10, scope)))
    mask = found != 0
    sizes = [leaf.size for leaf in jax.tree.leaves(PARAMS)]
    counts = [part.sum() for part in np.split(~mask, np.cumsum(sizes)[:-1])]
    if scope == "leaf":
        assert counts == [round(0.375 * size) for size in sizes]
    else:
        is_kept = kept_by_size(0.375, largest=make is zo.MagnitudeMask)
        assert counts == [part.sum() for part in np.split(~is_kept, np.cumsum(sizes)[:-1])]
        assert make is zo.RandomMask or (mask == is_kept).all()
    gradient = mask * GRADIENT
    check(found, gradient, mask * (np.sum(gradient**2) - gradient**2))


@pytest.mark.parametrize("curvature", ["exact", "difference"])
def test_directions_scaled_by_the_hessian(curvature):
    opt = zo.hizoo(1.0, EPS, PROBES, curvature=curvature, probe_batch=PROBES)
    keys = jax.random.split(jax.random.key(0), 2)
    hessian = [
        jnp.exp(jax.random.normal(key, leaf.shape))
        for key, leaf in zip(keys, jax.tree.leaves(PARAMS))
    ]
    state = opt.init(PARAMS, 6)._replace(moments={"hessian": tuple(hessian)})
    # Of v = z / sqrt(H) the mean of v v^T is 1 / H.
    scale = 1 / flat(hessian).astype(np.float64)
    variance = scale * np.sum(scale * GRADIENT**2) + (scale * GRADIENT) ** 2
    check(mean_estimate(opt, state), scale * GRADIENT, variance)
