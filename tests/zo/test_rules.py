"""What rules make of coefficients and given directions, against Optax fed the estimates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_lowbit
from optax_lowbit import Policy, zo
from optax_lowbit.moments.storage import init_moment
from optax_lowbit.zo import rows
from optax_lowbit.zo.adam import BLOCK_SECOND_MOMENT_4BIT
from optax_lowbit.zo.rows import whole
from optax_lowbit.zo.updates import Leaf, update_leaf
from tests.zo.cases import Given

RATE = 2.0**-5
POLICY = Policy(min_size=100)
SHAPE = (2, 6, 40)
COEFFICIENTS = np.array([[0.5, -1.25], [2.0, 0.75], [-0.125, 3.0]], np.float32)


def values(dtype=jnp.float32):
    return jax.random.normal(jax.random.key(0), SHAPE).at[0, 0, 0].set(-0.0).astype(dtype)


def directions(step, n):
    rng = np.random.default_rng(step)
    return np.where(rng.random((n, *SHAPE)) < 0.5, np.float32(-1), np.float32(1))


def bits(tree):
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), tree)


class Follower:
    """One leaf under an optimizer's rule, along given directions."""

    def __init__(self, opt, leaf, decay=0.0):
        self.rule, self.decay, self.values = opt.rule, decay, leaf
        self.moments = {
            name: init_moment(name, moment, leaf, opt.policy or Policy())
            for name, moment in self.rule.moments.items()
        }
        self.scalars = jax.tree.map(jnp.asarray, dict(self.rule.scalars))
        self.step = jax.jit(self._step)

    def _step(self, leaf, moments, scalars, record, z, count):
        rows = z.reshape(len(z), -1, SHAPE[-1])

        def draw(slopes, part, each):
            own = each(rows[:, part.numbers[..., 0]])
            return jnp.einsum("i,i...->...", slopes, own, precision="highest")

        scalars = self.rule.advance(scalars, record, count)
        key = jnp.uint32(1), jnp.uint32(2)
        whole_leaf, zero = whole(0, leaf, moments), jnp.uint32(0)
        own = Leaf(whole_leaf, Given(draw), zero, key, count, self.decay != 0, scalars)
        return *update_leaf(self.rule, record, own), scalars

    def take(self, coefficients, z, count):
        record = self.rule.record(
            jnp.asarray(coefficients), jnp.float32(RATE), jnp.float32(self.decay)
        )
        self.last = record, z
        state = self.values, self.moments, self.scalars
        self.values, self.moments, self.scalars = self.step(*state, record, z, jnp.int32(count))

    def check_idle(self):
        """A record of zeros changes no bit."""
        state = self.values, self.moments, self.scalars
        record = jnp.zeros_like(self.last[0])
        new, moments, _ = self.step(*state, record, self.last[1], jnp.int32(3))
        assert bits((new, moments)) == bits(state[:2])


def compared(opt, theirs, probes=1, decay=0.0):
    """The leaf under the rule and under an Optax transform, after three steps."""
    ours = Follower(opt, values(), decay)
    params, state = values(), theirs.init(values())

    @jax.jit
    def step(params, state, estimate):
        update, state = theirs.update(estimate, state, params)
        return optax.apply_updates(params, update), state

    for count, coefficients in enumerate(COEFFICIENTS[:, :probes]):
        z = directions(count, probes)
        ours.take(coefficients, z, count)
        estimate = np.einsum("i,i...->...", coefficients, z)
        with jax.numpy_dtype_promotion("standard"):
            params, state = step(params, state, estimate)
    return ours, params, state


def test_momentum_is_optax():
    opt = zo.zo_sgd_momentum(RATE, nesterov=True, trace_spec=None)
    theirs = optax.chain(
        optax.trace(0.9, nesterov=True), optax.add_decayed_weights(0.5),
        optax.scale_by_learning_rate(RATE),
    )  # fmt: skip
    ours, params, _ = compared(opt, theirs, decay=0.5)
    np.testing.assert_allclose(ours.values, params, rtol=2e-6, atol=2e-7)
    ours.check_idle()


def test_momentum_in_4_bits_is_that_of_sgd4bit_slice_by_slice(monkeypatch):
    monkeypatch.setattr(rows, "TILE_ELEMENTS", 100)
    opt = zo.zo_sgd_momentum(RATE, policy=POLICY)
    ours, params, state = compared(opt, optax_lowbit.sgd4bit(RATE, 0.9, policy=POLICY))
    np.testing.assert_allclose(ours.values, params, rtol=2e-6, atol=2e-7)
    np.testing.assert_array_equal(ours.moments["trace"].codes, state[0].trace.codes)
    ours.check_idle()


def test_adam_of_signs_keeps_one_second_moment_and_is_adam():
    opt = zo.zo_adam(RATE, b1=0.8, b2=0.95, adam_eps=1e-3, mu_spec=None)
    theirs = optax.adamw(RATE, 0.8, 0.95, 1e-3, weight_decay=0.5)
    ours, params, (adam, *_) = compared(opt, theirs, decay=0.5)
    # Bias corrections are reciprocals, and in float32 have five digits.
    np.testing.assert_allclose(ours.values, params, rtol=2e-6, atol=1e-6)
    assert ours.moments.keys() == {"mu"} and ours.scalars["count"] == 3
    np.testing.assert_allclose(adam.nu, np.full(SHAPE, ours.scalars["nu"]), rtol=1e-6)
    ours.check_idle()


def test_adam_of_several_probes_keeps_both_moments_in_4_bits():
    opt = zo.zo_adam(RATE, num_probes=2, policy=POLICY)
    theirs = optax_lowbit.adam4bit(RATE, nu_spec=BLOCK_SECOND_MOMENT_4BIT, policy=POLICY)
    ours, params, (adam, *_) = compared(opt, theirs, probes=2)
    np.testing.assert_allclose(ours.values, params, rtol=2e-6, atol=1e-6)
    for name, moment in (("mu", adam.mu), ("nu", adam.nu)):
        np.testing.assert_array_equal(ours.moments[name].codes, moment.codes)


def test_second_moment_is_a_number_only_where_it_is_one():
    assert zo.zo_adam(RATE).rule.moments.keys() == {"mu"}
    for opt in (zo.zo_adam(RATE, noise=zo.Gaussian()), zo.zo_adam(RATE, num_probes=2)):
        assert opt.rule.moments.keys() == {"mu", "nu"}


def test_signs_of_elements():
    theirs = optax.chain(
        optax.scale_by_sign(), optax.add_decayed_weights(0.5), optax.scale_by_learning_rate(RATE)
    )
    ours, params, _ = compared(zo.zo_sgd_sign(RATE), theirs, probes=2, decay=0.5)
    # A few roundings of terms of the size of the learning rate.
    np.testing.assert_allclose(ours.values, params, rtol=1e-6, atol=1e-8)
    ours.check_idle()


def test_elements_with_an_estimate_of_0_stay_under_signs():
    ours = Follower(zo.zo_sgd_sign(RATE), values())
    z = directions(0, 2)
    ours.take([1.0, 1.0], z, 0)
    expected = np.asarray(values()) - RATE * np.sign(z[0] + z[1])
    np.testing.assert_array_equal(ours.values, expected)


def test_signs_of_coefficients():
    opt = zo.zo_sgd_scalar_sign(RATE, estimator=zo.OneSided())
    assert opt.estimator.uses_base and opt.estimator.signs == (1.0,)
    losses = jnp.array([[5.0], [2.0], [1.9]])
    signs = opt.estimator.coefficients(jnp.float32(2), losses, jnp.float32(1e-3))
    np.testing.assert_array_equal(signs, [1, 0, -1])


def test_stochastic_rounding_of_bfloat16_keeps_small_steps(monkeypatch):
    monkeypatch.setattr(rows, "TILE_ELEMENTS", 100)
    ours = Follower(zo.zo_sgd_momentum(RATE, policy=POLICY), jnp.ones(SHAPE, jnp.bfloat16))
    z = directions(0, 1)
    ours.take([2.0**-8], z, 0)
    fall = -(np.asarray(ours.values, np.float32) - 1) * z[0]
    # 1 is 2**-8 from the value below it and 2**-7 from that above; the step is 2**-13.
    assert set(np.unique(fall)) == {0.0, 2.0**-8, 2.0**-7}
    # Five standard deviations of the sum of 480 steps, of variance 2**-13 * 1.5 * 2**-8 each.
    assert abs(np.sum(fall) - 480 * 2.0**-13) < 5 * np.sqrt(480 * 2.0**-13 * 1.5 * 2.0**-8)
    # Slices are rounded with noise of their own.
    assert np.any(np.asarray(ours.values[0] != 1) != np.asarray(ours.values[1] != 1))


def test_hessian_is_averaged_after_the_step_along_old_directions():
    opt = zo.hizoo(RATE, smoothing=0.25, num_probes=2)
    ours = Follower(opt, values(), decay=0.5)
    h = np.exp(np.random.default_rng(3).standard_normal(SHAPE)).astype(np.float32)
    ours.moments = {"hessian": jnp.asarray(h)}
    v = np.random.default_rng(4).standard_normal((2, *SHAPE)).astype(np.float32)
    record = jnp.array([0.5, -0.25, 0.125, 0.0625, RATE * 0.5, 0.25])
    state = ours.values, ours.moments, ours.scalars
    new, moments, _ = ours.step(*state, record, v, jnp.int32(0))
    old = np.asarray(values())
    expected = old - RATE * 0.5 * old + 0.5 * v[0] - 0.25 * v[1]
    np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-6)
    # With z^2 = H v^2.
    expected = 0.75 * h + 0.125 * h * (h * v[0] ** 2) + 0.0625 * h * (h * v[1] ** 2)
    np.testing.assert_allclose(moments["hessian"], expected, rtol=1e-5)
