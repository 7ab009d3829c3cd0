"""Whole steps of every method: parameters move along what the loss was evaluated at, bit for bit.

The loss writes down what it is given. From parameters of 0 with an ``eps`` of 1 that is the
direction itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import zo
from tests.zo.quick_noise import QuickSigns

# Some elements are 0 for three steps, and then others are.
MASKED = zo.RandomMask(QuickSigns(), 0.3, 3)
SHAPES = {"bias": (4,), "stack": (2, 3, 5)}
ZEROS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}

# Where directions are no signs, slopes are powers of 2, so that no product is rounded.
CLIP = 2.0**-6

# Those whose update is a sum of directions, each times a number of the record.
SUMS = {
    "zo_sgd": zo.zo_sgd(0.3, 1.0, 3, noise=MASKED),
    "one-sided": zo.zo_sgd(0.3, 1.0, 3, noise=MASKED, estimator=zo.OneSided()),
    "probes together": zo.zo_sgd(0.3, 1.0, 3, noise=MASKED, probe_batch=3),
    "scalar sign": zo.zo_sgd_scalar_sign(0.3, 1.0, 3, noise=MASKED),
    "conservative": zo.zo_sgd_conservative(1e-3, 1.0, 3, noise=MASKED),
    "forward_grad": zo.forward_grad(0.3, 3, noise=MASKED),
    "fzoo": zo.fzoo(0.3, 1.0, 3, noise=MASKED),
    "lozo": zo.lozo(0.5, 1.0, interval=3, clip=CLIP),
    "hizoo": zo.hizoo(0.5, 1.0, curvature="difference", clip=CLIP),
    "hizoo, exact": zo.hizoo(0.5, noise=zo.RandomMask(zo.Gaussian(), 0.3, 3), clip=CLIP),
}
# Those that make more of it: from moments of 0, a number times the direction.
MULTIPLES = {
    "momentum": zo.zo_sgd_momentum(0.3, 1.0, noise=MASKED),
    "sign": zo.zo_sgd_sign(0.3, 1.0, noise=MASKED),
    "adam": zo.zo_adam(0.3, 1.0, noise=MASKED),
    "adam of signs": zo.zo_adam(0.3, 1.0, noise=QuickSigns()),
    "lozo, momentum": zo.lozo(0.5, 1.0, interval=3, momentum=0.5, clip=CLIP),
}


def observed(tree):
    """The tree as a program sees it that scans over it, and rows that it looks up."""
    _, scanned = jax.lax.scan(lambda turn, weight: (turn + 1, weight * 1.0), 0.0, tree["stack"])
    return [tree["bias"] * 1.0, scanned, tree["stack"][1, 1:3] * 1.0]


def flat(leaves):
    return np.concatenate([np.ravel(leaf) for leaf in leaves])


class Recorder:
    """A loss that writes down what it sees; the tangents of that, where it is differentiated."""

    def __init__(self):
        self.seen = []

        @jax.custom_jvp
        def watched(leaves):
            jax.debug.callback(self._write, leaves, ordered=True)
            return leaves

        @watched.defjvp
        def watched_jvp(primals, tangents):
            jax.debug.callback(self._write, tangents[0], ordered=True)
            return primals[0], tangents[0]

        self._watched = watched

    def _write(self, leaves):
        self.seen.append(flat(leaves))

    def __call__(self, params):
        leaves = self._watched(observed(params))
        return functools.reduce(jnp.add, (jnp.sum((x - 0.25) ** 2) for x in leaves))


def directions(seen, number):
    """The first ones, without the parameters themselves and without what lies opposite."""
    found = []
    for z in seen:
        if z.any() and not any(np.array_equal(z, -other) for other in found):
            found.append(z)
    return found[:number]


def first_steps(opt):
    """Of five steps from zeros: the directions as they were seen, the update, and the record."""
    loss = Recorder()
    start = state = opt.init(ZEROS, 4)
    if "hessian" in start.moments:
        keys = jax.random.split(jax.random.key(0), len(SHAPES))
        hessian = [jnp.exp(jax.random.normal(k, s)) for k, s in zip(keys, SHAPES.values())]
        start = state = start._replace(moments={"hessian": tuple(hessian)})

    @jax.jit
    def step(state):
        new, state, info = opt.step(loss, ZEROS, state)
        return observed(new), state, info

    for _ in range(5):  # masks and V are made anew for the first and for the fourth
        loss.seen.clear()
        update, state, info = step(state)
        jax.effects_barrier()
        assert info.is_taken
        yield directions(loss.seen, opt.num_probes), flat(update), info.record
        state = state._replace(moments=start.moments, scalars=start.scalars)


@pytest.mark.parametrize("name", SUMS)
def test_update_is_the_sum_of_what_was_probed(name):
    opt = SUMS[name]
    seen = []
    for probed, update, record in first_steps(opt):
        assert len(probed) == opt.num_probes
        terms = [slope * z for slope, z in zip(np.asarray(record), probed)]
        np.testing.assert_array_equal(update, functools.reduce(np.add, terms))
        seen.extend(probed)
    assert len(np.unique(np.stack(seen), axis=0)) == 5 * opt.num_probes


@pytest.mark.parametrize("name", MULTIPLES)
def test_first_update_is_a_multiple_of_what_was_probed(name):
    seen = []
    for (z,), update, _ in first_steps(MULTIPLES[name]):
        largest = np.argmax(np.abs(z))
        np.testing.assert_array_equal(update, update[largest] / z[largest] * z)
        seen.append(z)
    assert len(np.unique(np.stack(seen), axis=0)) == 5
