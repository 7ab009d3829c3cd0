"""Parameters in bfloat16: probing leaves their bits alone, and small steps are not lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit import zo
from tests.zo.cases import drawn

OPT = zo.zo_sgd(1.0, eps=1e-3)
APPLY = jax.jit(OPT.apply, donate_argnums=0)


def weights():
    return {"w": (jax.random.normal(jax.random.key(0), (256, 256)) * 0.02).astype(jnp.bfloat16)}


def loss(params):
    return jnp.sum(params["w"].astype(jnp.float32) ** 2)


def bits(params):
    return np.asarray(params["w"]).tobytes()


def test_probing_leaves_every_bit_alone():
    params = weights()
    state, before = OPT.init(params, 0), bits(params)

    @jax.jit
    def cycles(params, state):
        def turn(i, total):
            info = OPT.estimate(loss, params, state._replace(count=i))
            return total + jnp.abs(info.coefficients[0])

        return jax.lax.fori_loop(0, 1000, turn, jnp.float32(0))

    assert cycles(params, state) > 0
    assert bits(params) == before


def test_donated_parameters_come_back_as_they_were():
    params, keep = weights(), weights()
    state = OPT.init(params, 0)

    def probed(params, state):
        return params, OPT.estimate(loss, params, state)

    params, info = jax.jit(probed, donate_argnums=0)(params, state)
    assert bits(params) == bits(keep)
    # And a step of nothing, of a record of zeros, rounds to what there was.
    params, _ = APPLY(params, state, jnp.zeros_like(info.record))
    assert bits(params) == bits(keep)


def test_a_step_far_below_the_last_bit_is_not_lost():
    size, params = 1e-6, weights()
    state = OPT.init(params, 0)
    direction = np.asarray(jax.jit(functools.partial(drawn, OPT))(params, state)["w"])
    old = np.asarray(params["w"], np.float64)
    new, _ = APPLY(params, state, jnp.array([-size, 0.0]))
    new = np.asarray(new["w"], np.float64)
    moved = (new - old) * -direction  # along the direction, in which each was to move by `size`
    # A weight moves by its gap to the next with the chance size / gap, and else not at all.
    share = (moved != 0).mean()
    error = moved.std() / moved.size**0.5
    assert abs(moved.mean() - size) < 5 * error
    assert error < size / 5
    # To nearest, only weights to 2**-11 would move, whose gap is under twice the step: 1.95% of
    # normal ones of deviation .02. Five standard deviations of that share of 65536.
    nearest = (old - size * direction).astype(np.float32).astype(jnp.bfloat16)
    lost = nearest.astype(np.float64) != old
    assert abs(lost.mean() - 0.0195) < 0.0027
    assert (np.abs(old[lost]) <= 2**-11).all() and share > lost.mean()
