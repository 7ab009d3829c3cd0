"""Measures beside a float32 shadow: against numpy, and that the wrapper changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_lowbit
from optax_lowbit import Policy, dequantize, quantize_state, with_diagnostics
from tests.optimizers.cases import (
    assert_bit_equal,
    assert_same_types,
    normal_tree,
    standard_promotion,
)

SHAPES = {"first": (64, 128), "second": (64, 256), "bias": (64,)}
LOW = optax_lowbit.adamw4bit(1e-2)
FULL = optax.adamw(1e-2)


def run(tx, steps=3):
    params = normal_tree(SHAPES, seed=0)
    update, state, states = jax.jit(tx.update), tx.init(params), []
    for step in range(steps):
        updates, state = update(normal_tree(SHAPES, seed=step + 1), state, params)
        states.append((updates, state))
    return states


def test_measures_are_those_of_numpy():
    measured = run(with_diagnostics(LOW, FULL, "first"))
    low = run(LOW)
    with standard_promotion():
        full = run(FULL)
    measures = measured[-1][1].measures
    for moment in ("mu", "nu"):
        stored, before = (np_codes(low[i][1], moment) for i in (-1, -2))
        exact = np.asarray(getattr(full[-1][1][0], moment)["first"], np.float64)
        error = np.asarray(dequantize(getattr(low[-1][1][0], moment)["first"])) - exact
        relative = np.linalg.norm(error) / np.linalg.norm(exact)
        np.testing.assert_allclose(measures[f"first/{moment}/relative_error"], relative, rtol=1e-4)
        assert measures[f"first/{moment}/occupancy"] == len(np.unique(stored)) / 16
        assert measures[f"first/{moment}/frozen"] == np.float32(np.mean(stored == before))
        assert 0 < measures[f"first/{moment}/frozen"] < 1
    u, v = (np.asarray(s[-1][0]["first"], np.float64).ravel() for s in (low, full))
    cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
    np.testing.assert_allclose(measures["first/update_cosine"], cosine, rtol=1e-5)
    assert len(measures) == 7


def np_codes(state, moment):
    """Codes of half-blocks: 64 low nibbles, then 64 high ones, of each block of 128."""
    codes = np.asarray(getattr(state[0], moment)["first"].codes).reshape(64, -1, 64)
    return np.concatenate([codes & 15, codes >> 4], axis=-1).reshape(64, 128)


def test_updates_and_state_are_those_without():
    for (updates, state), (expected, inner) in zip(
        run(with_diagnostics(LOW, FULL, "")), run(LOW), strict=True
    ):
        assert_bit_equal(updates, expected)
        assert_bit_equal(state.inner_state, inner)


def test_no_bits_lost_no_error():
    """With `first` in float32 only `second` is measured, which in 8 bits is nearly exact."""
    tx = optax_lowbit.adamw8bit(1e-2, policy=Policy(rules=[("first", None)]))
    _, state = run(with_diagnostics(tx, FULL, "first|second"))[-1]
    assert {name.split("/")[0] for name in state.measures} == {"second"}
    assert state.measures["second/mu/relative_error"] < 0.02
    assert state.measures["second/update_cosine"] > 0.999


def test_measured_in_every_so_many_steps():
    measured = run(with_diagnostics(LOW, FULL, "first", every=2), steps=4)
    cosines = [float(state.measures["first/update_cosine"]) for _, state in measured]
    assert cosines[0] == cosines[1] != cosines[2] == cosines[3]


def test_shadow_costs_chosen_leaves_alone():
    params = normal_tree(SHAPES)
    state = with_diagnostics(LOW, FULL, "first").init(params)
    size = sum(x.size for x in jax.tree.leaves(state.shadow_state))
    assert size == 2 * 64 * 128 + 1
    assert all(jnp.isnan(x) for x in state.measures.values())


def test_state_keeps_its_types_and_moments_without_counterpart_have_no_error():
    tx = with_diagnostics(LOW, optax.sgd(1e-2), "second")
    params = normal_tree(SHAPES)
    state = tx.init(params)
    _, new = jax.jit(tx.update)(params, state, params)
    assert_same_types(new, state)
    assert not [name for name in new.measures if "relative_error" in name]
    assert optax.tree.get(new, "measures") is new.measures


def test_in_a_chain_and_on_an_empty_tree():
    tx = optax.chain(optax.clip_by_global_norm(1.0), with_diagnostics(LOW, FULL, "first"))
    _, state = run(tx, steps=1)[0]
    assert "first/update_cosine" in optax.tree.get(state, "measures")
    assert with_diagnostics(LOW, FULL, "first").init({}).measures == {}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded(axis_type):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
    tx = with_diagnostics(LOW, FULL, "first")
    params = {"first": normal_tree({"first": (64, 1024)})["first"]}
    _, expected = jax.jit(tx.update)(params, tx.init(params), params)
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, NamedSharding(mesh, PartitionSpec("x", "y")))
        _, state = jax.jit(tx.update)(spread, tx.init(spread), spread)
    for name, value in expected.measures.items():
        np.testing.assert_allclose(state.measures[name], value, rtol=1e-5)


def test_moments_of_one_name_are_numbered():
    tx = quantize_state(optax.chain(optax.trace(0.9), optax.trace(0.8)))
    params = normal_tree(SHAPES)
    state = with_diagnostics(tx, optax.identity(), "first").init(params)
    assert {"first/trace/frozen", "first/trace 2/frozen"} <= state.measures.keys()


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"tx must be an optax\.GradientTransformation, got str"):
        with_diagnostics("x", FULL, "first")
    with pytest.raises(ValueError, match="leaves must be a regular expression, got None"):
        with_diagnostics(LOW, FULL, None)
    with pytest.raises(ValueError, match="shadow must keep its state in float32"):
        with_diagnostics(LOW, LOW, "first").init(normal_tree(SHAPES))
    with pytest.raises(ValueError, match="every must be an int of at least 1, got 0"):
        with_diagnostics(LOW, FULL, "first", every=0)
    with pytest.raises(ValueError, match=r"leaves must be a regular expression, got '\('"):
        with_diagnostics(LOW, FULL, "(")
    with pytest.raises(ValueError, match="leaves must match a parameter with low-bit moments"):
        with_diagnostics(LOW, FULL, "bias").init(normal_tree(SHAPES))
