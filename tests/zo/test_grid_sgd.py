"""Steps from code to code: places, perturbations, residuals."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_lowbit import QuantSpec, dequantize, quantize, zo
from optax_lowbit.quant import random_bits
from optax_lowbit.zo.grid import Grid
from optax_lowbit.zo.grid_sgd import RESIDUAL, DescendOnGrid, GridSteps
from optax_lowbit.zo.noise import Probe
from optax_lowbit.zo.rows import whole
from optax_lowbit.zo.updates import Leaf
from tests.zo.cases import Given, drawn

spec = functools.partial(QuantSpec, signed=True, scaling="block", block_size=16)
NF4 = spec(codebook="nf4", bits=4)
FP4 = spec(codebook="fp4", bits=4)
INT4 = spec(codebook="integer", bits=4)
INT8 = spec(codebook="integer", bits=8)
DYNAMIC8 = spec(codebook="dynamic_exponent", bits=8)
THREE = spec(codebook=(1.0, -1.0, 0.25), bits=2)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [(NF4, (2, 3, 13)), (FP4, (3, 40)), (THREE, (7,)), (DYNAMIC8, (20,)), (INT4, ())],
    ids=["nf4", "fp4", "three", "dynamic", "scalar"],
)
def test_places_are_ranks_of_values(spec, shape):
    q = quantize(jax.random.normal(jax.random.key(0), shape), spec)
    grid = Grid.of(q)
    places = jax.jit(grid.places)(q.codes)
    assert places.shape == shape
    ones = dataclasses.replace(q, scales=jnp.ones_like(q.scales))
    table = np.sort(np.asarray(spec.values, np.float32), kind="stable")
    np.testing.assert_array_equal(table[places], dequantize(ones))
    np.testing.assert_array_equal(jax.jit(grid.codes)(places), q.codes)


@pytest.mark.parametrize(
    ("eps", "sizes", "variance"), [(0.25, [0, 1], 0.25), (2.75, [2, 3], 4 + 5 * 0.75)]
)
def test_perturbations_are_whole_symmetric_and_of_the_stated_variance(eps, sizes, variance):
    noise = GridSteps(eps)
    key = random_bits.key_words(5)
    z = np.asarray(noise.draw(Probe(key, key, jnp.int32(0)), whole(0, jnp.zeros((100, 300)))))
    assert sorted(np.unique(np.abs(z))) == sizes
    assert noise.variance == variance
    for samples, mean in ((z, 0), (np.abs(z), eps), (z**2, variance)):
        assert abs(samples.mean() - mean) < 5 * samples.std() / z.size**0.5
    neighbours = z[:, 1:] * z[:, :-1]
    assert abs(neighbours.mean()) < 5 * neighbours.std() / z.size**0.5


X = jax.random.normal(jax.random.key(1), (6, 20))


def tree():
    weights = jax.random.normal(jax.random.key(0), (2, 20, 20)) * 0.3
    return {"norm": jnp.ones(20), "stack": quantize(weights, FP4)}


def loss(params):
    x, _ = jax.lax.scan(lambda x, q: (jnp.tanh(x @ dequantize(q)) + x, None), X, params["stack"])
    return jnp.mean((x * params["norm"][None] - 1) ** 2)


def by_hand(q, steps):
    """``q`` with places moved, through numpy and the sorted table."""
    grid = Grid.of(q)
    order = np.argsort(np.asarray(q.spec.values, np.float32), kind="stable")
    places = np.argsort(order)[np.asarray(grid.unpacked(q.codes))] + np.asarray(steps, int)
    codes = order[np.clip(places, 0, len(order) - 1)].astype(np.uint8)
    return dataclasses.replace(q, codes=grid.packed(jnp.asarray(codes)))


def test_loss_is_that_of_moved_codes_and_the_step_is_along_them():
    params = tree()
    opt = zo.zo_sgd_grid(0.1, eps=0.5)
    state = opt.init(params, 3)
    new, state_after, info = jax.jit(opt.step, static_argnums=0)(loss, params, state)
    direction = jax.jit(functools.partial(drawn, opt))(params, state)
    steps, evaluate = np.asarray(direction["stack"].codes), jax.jit(loss)
    up, down = (
        evaluate({**params, "stack": by_hand(params["stack"], sign * steps)}) for sign in (1, -1)
    )
    np.testing.assert_allclose(info.loss, (up + down) / 2, rtol=1e-6)
    np.testing.assert_allclose(info.coefficients, [(up - down) / 2], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(info.record, -0.1 * info.coefficients / 0.5, rtol=1e-6)
    grid = Grid.of(params["stack"])
    residual = in_places(grid, state_after.moments["residual"][0])
    old, after = (np.asarray(grid.places(tree["stack"].codes)) for tree in (params, new))
    step = float(info.record[0]) * steps
    inside = (old + step > 1 / 16) & (old + step < grid.top - 1 / 16)
    assert inside.mean() > 0.5  # of a block, one is at the end of the table
    # To one of the two sixteenths around it.
    assert (np.abs(after - old + residual - step) < 1 / 16)[inside].all()
    np.testing.assert_array_equal(new["stack"].scales, params["stack"].scales)
    np.testing.assert_array_equal(new["norm"], params["norm"])


def in_places(grid, residual):
    """A packed residual as a float."""
    units = 2**grid.spec.bits
    residual = np.asarray(grid.unpacked(residual)).astype(int)
    return np.where(residual >= units // 2, residual - units, residual) / units


@functools.partial(jax.jit, static_argnums=0)
def drift(grid, codes, moments, step, times):
    """Codes and moments after so many steps that each add the same to all places."""
    rule = DescendOnGrid(variance=1.0, moments=RESIDUAL if moments else {})

    def turn(i, state):
        rows = whole(0, state[0], state[1])
        key = random_bits.fold_in(random_bits.key_words(0), i)
        leaf = Leaf(
            rows,
            Given(lambda slopes, rows, each: jnp.full_like(rows.values, step)),
            jnp.uint32(0),
            key,
            i,
            decays=False,
            scalars={},
            grid=grid,
        )
        return rule.update(jnp.zeros(1), leaf)

    return jax.lax.fori_loop(0, times, turn, (codes, moments))


def rule_on(q, step, times, residual=None):
    """Places and residuals after steps; and the residual as it is stored."""
    grid = Grid.of(q)
    residual = jnp.zeros_like(q.codes) if residual is None else residual
    codes, moments = drift(grid, q.codes, {"residual": residual}, float(step), times)
    kept = moments["residual"]
    return np.asarray(grid.places(codes)), in_places(grid, kept), kept


def at_place(place, spec=INT4):
    shape = (64, 99)
    q = quantize(jnp.ones(shape), spec)
    return dataclasses.replace(q, codes=Grid.of(q).codes(jnp.full(shape, place, jnp.int32)))


def test_steps_below_a_code_add_up_exactly():
    # Three sixteenths: to the nearest code, each is no step at all.
    places, residual, _ = rule_on(at_place(4), 3 / 16, 16)
    assert (places == 7).all() and (residual == 0).all()
    places, residual, _ = rule_on(at_place(4), -3 / 16, 11)
    assert (places == 2).all() and (residual == 4 + -33 / 16 - 2).all()
    places, residual, _ = rule_on(at_place(100, INT8), 5 / 256, 100)
    assert (places == 102).all() and (residual == 500 / 256 - 2).all()


@pytest.mark.parametrize("has_residual", [True, False])
def test_mean_movement_is_the_step_and_its_spread_is_as_stated(has_residual):
    step, times, q = 0.0123, 100, at_place(5)
    grid = Grid.of(q)
    moments = {"residual": jnp.zeros_like(q.codes)} if has_residual else {}
    codes, moments = drift(grid, q.codes, moments, step, times)
    moved = np.asarray(grid.places(codes)) - 5.0
    if has_residual:
        moved += in_places(grid, moments["residual"])
    # Each rounding goes up one unit with the chance that keeps the mean: a binomial.
    unit = 1 / 16 if has_residual else 1.0
    variance = times * step * (unit - step)
    assert abs(moved.mean() - times * step) < 5 * (variance / moved.size) ** 0.5
    assert abs(moved.var() / variance - 1) < 5 * (3 / moved.size) ** 0.5


@pytest.mark.parametrize("spec", [INT4, THREE], ids=["integer", "three"])
def test_table_is_never_left_and_nothing_winds_up_at_its_ends(spec):
    top = len(spec.values) - 1
    places, residual, kept = rule_on(at_place(1, spec), 2.7, 300)
    assert (places == top).all() and (residual == 0).all()
    back, *_ = rule_on(at_place(top, spec), -1, 1, residual=kept)
    assert (back == top - 1).all()
    places, residual, _ = rule_on(at_place(1, spec), -1e30, 3)
    assert (places == 0).all() and (residual == 0).all()


def test_probes_do_not_leave_the_table():
    grid, top = Grid(INT4, 6), len(INT4.values) - 1
    rows = whole(0, grid.codes(jnp.array([[0, 0, 1, top - 1, top, top]])))
    steps = jnp.array([[-1.0, 1.0, -3.0, 5.0, 1.0, -1.0]])
    codes = grid.moved(rows.values, steps)
    np.testing.assert_array_equal(grid.places(codes), [[0, 1, 0, top, top, top - 1]])


def test_step_of_nothing_changes_nothing():
    q = at_place(9)
    _, _, kept = rule_on(q, 0.4, 1)
    places, residual, after = rule_on(q, 0, 5, residual=kept)
    assert (places == 9).all() and (residual != 0).all()
    np.testing.assert_array_equal(kept, after)


def test_regression_learns_in_place():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (64, 16))
    y = x @ jax.random.normal(keys[1], (16, 4))
    start = jax.random.normal(keys[2], (16, 4))
    params = {"w4": quantize(start, NF4), "w8": quantize(start, INT8)}

    def loss(params):
        return sum(jnp.mean((x @ dequantize(q) - y) ** 2) for q in params.values())

    four = zo.zo_sgd_grid(4.0, eps=0.5, num_probes=4, trainable="^w4")
    eight = zo.zo_sgd_grid(40.0, eps=5, num_probes=4, trainable="^w8")
    scales = np.asarray(params["w4"].scales), np.asarray(params["w8"].scales)
    before = loss(params)
    for name, one in (("w4", four), ("w8", eight)):
        state = one.init(params, 0)
        (residual,) = state.moments["residual"]
        assert residual.nbytes == params[name].codes.nbytes and residual.dtype == jnp.uint8
        step = jax.jit(one.step, static_argnums=0, donate_argnums=(1, 2))
        for _ in range(150):
            params, state, _ = step(loss, params, state)
    assert loss(params) < before / 3
    np.testing.assert_array_equal(scales[0], params["w4"].scales)
    np.testing.assert_array_equal(scales[1], params["w8"].scales)


def test_wrong_arguments():
    schedule: Any = optax.constant_schedule(1.0)
    derivative: Any = zo.ForwardGradient()
    with pytest.raises(ValueError, match="eps must be a number of places of at least"):
        zo.zo_sgd_grid(1.0, eps=0)
    with pytest.raises(TypeError, match="eps must be a number of places"):
        zo.zo_sgd_grid(1.0, eps=schedule)
    with pytest.raises(TypeError, match="estimator must need no derivatives"):
        zo.zo_sgd_grid(1.0, estimator=derivative)
    with pytest.raises(ValueError, match="the codes of a QuantizedArray"):
        zo.zo_sgd_grid(1.0).init({"w": jnp.ones(3)}, 0)
