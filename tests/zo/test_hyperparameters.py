"""Hyperparameters in the state: read, changed and scheduled without compiling again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_lowbit import QuantSpec, quantize, zo
from tests.zo.quick_noise import QuickSigns

PARAMS = {"a": jnp.linspace(-1, 1, 12).reshape(3, 4)}


def test_changes_need_no_compiling():
    traces = []

    def loss(params):
        traces.append(0)
        return jnp.sum(jnp.sin(params["a"]))

    opt = zo.inject_hyperparams(zo.zo_sgd)(
        optax.linear_schedule(0.4, 0.0, 4), 0.125, num_probes=2, noise=QuickSigns(), clip=100.0
    )
    state = opt.init(PARAMS, 1)
    assert {name: float(x) for name, x in state.hyperparams.items()} == {
        "learning_rate": pytest.approx(0.4), "eps": 0.125, "weight_decay": 0.0, "clip": 100.0
    }  # fmt: skip
    step = jax.jit(opt.step, static_argnums=0)
    params, mine = PARAMS, PARAMS
    own = zo.zo_sgd(0.0).init(PARAMS, 1)
    once = None
    for rate, eps, decay, clip in [(0.4, 0.125, 0.0, 100.0), (0.3, 0.25, 0.5, 1.0)]:
        state.hyperparams.update(
            eps=jnp.float32(eps), weight_decay=jnp.float32(decay), clip=jnp.float32(clip),
            learning_rate=jnp.float32(77),  # of a schedule: of no effect
        )  # fmt: skip
        params, state, info = step(loss, params, state)
        once = once or len(traces)
        assert len(traces) == once
        np.testing.assert_allclose(state.hyperparams["learning_rate"], rate, rtol=1e-6)
        plain = zo.zo_sgd(rate, eps, 2, noise=QuickSigns(), weight_decay=decay, clip=clip)
        with jax.disable_jit():
            mine, own, expected = plain.step(lambda p: jnp.sum(jnp.sin(p["a"])), mine, own)
        record = jnp.append(expected.record, jnp.array([rate, eps, decay, clip]))
        expected = expected._replace(record=record)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), info, expected)
        np.testing.assert_allclose(params["a"], mine["a"], rtol=1e-5, atol=1e-6)
    assert np.abs(expected.coefficients).max() == 1 and state.count == 2


def test_halves_and_ask_and_tell():
    opt = zo.inject_hyperparams(zo.zo_sgd)(0.5, 0.125, noise=QuickSigns())

    def loss(params):
        return jnp.sum(params["a"] ** 2)

    with jax.disable_jit():
        state = opt.init(PARAMS, 1)
        state.hyperparams["eps"] = 0.25
        losses = [loss(opt.ask(PARAMS, state, i)) for i in range(opt.evaluations)]
        told = opt.tell(PARAMS, state, losses)
        info = opt.estimate(loss, PARAMS, state)
        applied = opt.apply(PARAMS, state, info.record)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), told, (*applied, info))
    assert np.abs(opt.ask(PARAMS, state, 0)["a"] - PARAMS["a"]).max() == 0.25


def test_what_is_a_hyperparameter():
    def is_matrix(path, leaf):
        return leaf.ndim == 2

    opt = zo.inject_hyperparams(zo.zo_sgd)(
        1, num_probes=3, trainable=is_matrix, weight_decay=np.float32(0.5)
    )
    assert opt.hyperparams == {"learning_rate": 1, "eps": 1e-3, "weight_decay": 0.5}
    inner = zo.inject_hyperparams(
        lambda learning_rate: zo.hybrid(zo.zo_sgd(learning_rate), optax.sgd(0.1), "a")
    )(0.25)
    state = inner.init({**PARAMS, "b": jnp.ones(2)}, 0)
    assert state.hyperparams == {"learning_rate": 0.25} and state.count == 0


def test_wrong_arguments_are_seen_at_once():
    with pytest.raises(ValueError, match="eps must be above 0"):
        zo.inject_hyperparams(zo.zo_sgd)(0.5, eps=-1.0)
    with pytest.raises(TypeError, match="learning_rate"):
        zo.inject_hyperparams(zo.zo_sgd)()


def test_arguments_that_are_part_of_the_program_are_named():
    params = {
        "w": quantize(
            jnp.ones((4, 128)),
            QuantSpec(codebook="integer", bits=4, signed=True, scaling="block", block_size=64),
        )
    }
    opt = zo.inject_hyperparams(zo.zo_sgd_grid, static_args="eps")(20.0)
    state = opt.init(params, 0)
    assert set(state.hyperparams) == {"learning_rate"}
    with pytest.raises(ValueError, match=r"static_args must name arguments of .* got \['epss'\]"):
        zo.inject_hyperparams(zo.zo_sgd, static_args=["epss"])


def test_a_state_that_is_written_over_is_the_states_alone():
    rate = jnp.float32(1e-2)
    opt, params = zo.inject_hyperparams(zo.zo_sgd)(rate), {"w": jnp.ones(3)}
    step = jax.jit(opt.step, static_argnums=0, donate_argnums=(1, 2))
    step(lambda p: jnp.sum(p["w"] ** 2), params, opt.init(params, 0))
    assert not rate.is_deleted()
    opt.init({"w": jnp.ones(3)}, 0)
