"""Every distribution of directions: unbiased, of unit variance, the same in probe and update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_lowbit import zo
from tests.zo.cases import moved_by, probed


def named(noises):
    return {"ids": lambda noise: type(noise).__name__, "argvalues": noises}


def quadratic(params):
    """Has curvature, and slopes that differ from leaf to leaf and from element to element."""
    weights = jnp.arange(1.0, 13.0).reshape(3, 4) / 6
    return jnp.sum(weights * params["matrix"] ** 2) + jnp.sum((params["vector"] - 0.2) ** 2)


SMALL = {
    "matrix": (jnp.arange(12.0).reshape(3, 4) * 0.37) % 1 - 0.4,
    "vector": jnp.array([0.5, -1.0, 0.3, 0.8]),
}


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def estimates(noise, num_probes=1, samples=3000):
    """Of one step each, all from the same parameters: what is taken from them, and slopes."""
    # A central difference of a quadratic is exact for any eps.
    opt = zo.zo_sgd(1.0, eps=0.5, num_probes=num_probes, noise=noise)
    state = opt.init(SMALL, 5)

    def one(count):
        new, _, info = opt.step(quadratic, SMALL, state._replace(count=count))
        return jax.tree.map(jnp.subtract, SMALL, new), info.coefficients

    taken, slopes = jax.jit(lambda: jax.lax.map(one, jnp.arange(samples)))()
    return np.concatenate([x.reshape(samples, -1) for x in jax.tree.leaves(taken)], 1), slopes


def deviations(samples, mean):
    """How many of its standard deviations the mean of samples is off, for each column."""
    error = samples.std(axis=0) / len(samples) ** 0.5
    return np.abs(samples.mean(axis=0) - mean) / error


@pytest.mark.parametrize("noise", **named([zo.Sphere(), zo.LowRank(2, 1), zo.Subspace(2, 1)]))
def test_estimate_is_unbiased_and_directions_are_white(noise):
    taken, slopes = estimates(noise)
    assert deviations(taken, flat(jax.grad(quadratic)(SMALL))).max() < 4.5
    z = taken / np.asarray(slopes)
    products = np.einsum("si,sj->sij", z, z).reshape(len(z), -1)
    assert deviations(products, np.eye(z.shape[1]).ravel()).max() < 5
    # Directions of different steps have nothing in common.
    assert deviations(z[1:, :1] * z[:-1], 0.0).max() < 4.5


def test_mean_over_probes_is_unbiased():
    taken, slopes = estimates(zo.LowRank(3, 1), num_probes=3, samples=1000)
    assert slopes.shape == (1000, 3)
    assert deviations(taken, flat(jax.grad(quadratic)(SMALL))).max() < 4.5


def test_masked_estimate_is_of_the_masked_gradient():
    taken, _ = estimates(zo.RandomMask(zo.Sphere(), 0.4, 10**6), samples=1500)
    mask = np.any(taken != 0, axis=0)
    assert mask.sum() == 7 + 2  # 4.8 of 12 and 1.6 of 4 elements are left out, rounded
    gradient = flat(jax.grad(quadratic)(SMALL))
    assert deviations(taken[:, mask], gradient[mask]).max() < 4.5


def test_sphere_has_one_radius():
    opt = zo.zo_sgd(1.0, noise=zo.Sphere())
    params = {"a": jnp.zeros((6, 7)), "b": jnp.zeros(5)}
    z, _ = jax.jit(functools.partial(moved_by, opt))(params, opt.init(params, 0))
    np.testing.assert_allclose(np.sum(flat(z) ** 2), 47, rtol=1e-6)


def test_length_of_a_direction_is_found_without_it():
    params = jnp.zeros((1024, 1024))
    noise = zo.Sphere()
    key = jnp.uint32(1), jnp.uint32(2)
    probe = zo.Probe(key, key, jnp.int32(0))
    compiled = jax.jit(lambda keys: noise.scale(probe, keys, [params]))
    analysis = compiled.lower(jnp.zeros((3, 1, 2), jnp.uint32)).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < params.nbytes / 8


NOISES = [
    zo.Rademacher(),
    zo.Gaussian(),
    zo.Sphere(),
    zo.LowRank(2, 3),
    zo.RandomMask(zo.LowRank(3, 2), 0.3, 3),
    zo.MagnitudeMask(zo.Sphere(), 0.3, 3, "global"),
    zo.Subspace(3, 3),
]


def odd():
    keys = jax.random.split(jax.random.key(1), 2)
    return {"stack": jax.random.normal(keys[0], (3, 5, 7)), "bias": jnp.array([1.0, 0.25, -0.5])}


def observed(tree):
    """The tree as a program sees it that scans over it, and looks rows up."""
    _, scanned = jax.lax.scan(lambda turn, weight: (turn + 1, weight * 1.0), 0.0, tree["stack"])
    return {"stack": scanned, "bias": tree["bias"] * 1.0, "rows": tree["stack"][2, 1:3] * 1.0}


@pytest.mark.parametrize("noise", **named(NOISES))
def test_update_is_along_what_was_probed_bit_for_bit(noise):
    opt = zo.zo_sgd(1.0, noise=noise)
    params = odd()
    state = opt.init(params, 2)

    @jax.jit
    def both(state):
        new, after = moved_by(opt, params, state)
        return probed(opt, params, state, observed), observed(new), new, after

    seen = []
    for _ in range(5):  # V, bases and masks are made anew for the first step and the fourth
        probe, update, new, state = both(state)
        jax.tree.map(np.testing.assert_array_equal, probe, update)
        seen.append(flat(new))
    assert len(np.unique(np.stack(seen), axis=0)) == 5


@pytest.mark.parametrize("noise", **named(NOISES))
def test_direction_has_the_same_bits_on_a_mesh(noise):
    opt = zo.zo_sgd(1.0, noise=noise)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    values = jax.random.normal(jax.random.key(0), (8, 6))
    step = jax.jit(functools.partial(moved_by, opt))
    expected = step(values, opt.init(values, 0))
    placed = jax.device_put(values, NamedSharding(mesh, PartitionSpec("x", "y")))
    found = step(placed, opt.init(placed, 0))
    assert len(found[0].sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_probes_together_are_probes_one_by_one():
    params, noise = odd(), zo.RandomMask(zo.Sphere(), 0.3, 3)
    loss = lambda tree: jnp.sum(jnp.sin(tree["stack"])) + jnp.prod(tree["bias"])  # noqa: E731
    infos = []
    for batch in (1, 3):
        opt = zo.zo_sgd(1.0, eps=0.1, num_probes=3, noise=noise, probe_batch=batch)
        infos.append(jax.jit(lambda opt=opt: opt.estimate(loss, params, opt.init(params, 0)))())
    np.testing.assert_allclose(infos[0].coefficients, infos[1].coefficients, rtol=1e-4)
    assert len(np.unique(infos[0].coefficients)) == 3


@pytest.mark.parametrize("make", [zo.LowRank, zo.Subspace])
def test_impossible_ranks_and_intervals_are_refused(make):
    for bad in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="rank must be an int of at least 1"):
            make(rank=bad)
        with pytest.raises(ValueError, match="interval must be an int of at least 1"):
            make(interval=bad)
