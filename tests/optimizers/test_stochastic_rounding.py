"""Bfloat16 parameters, rounded stochastically: unbiased, reproducible, and nothing else changed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import optax_lowbit
from optax_lowbit import apply_updates_stochastic
from optax_lowbit.quant import random_bits

BACKENDS = ["auto", "reference", "interpret"]


def neighbours(x):
    """The bfloat16 numbers around float32 ones, that nearer to zero first."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    upper = bits & np.uint32(0xFFFF0000)
    away = np.where(bits == upper, upper, upper + np.uint32(0x10000))
    return upper.view(np.float32), away.view(np.float32)


def test_the_mean_is_the_sum_and_every_value_a_neighbour():
    params = jnp.full((500, 2000), 1, jnp.bfloat16)
    updates = jnp.asarray(np.random.default_rng(0).uniform(-0.9, 0.9, (500, 2000)), jnp.float32)
    new = np.asarray(apply_updates_stochastic(params, updates, 3), np.float32)
    exact = np.asarray(params, np.float32) + np.asarray(updates)
    toward_zero, away = neighbours(exact)
    assert ((new == toward_zero) | (new == away)).all()
    # The variance of one rounding is p (1 - p) gap**2: five standard deviations of the sum.
    gap, error = away - toward_zero, new - exact
    chance = np.divide(exact - toward_zero, gap, out=np.zeros_like(gap), where=gap != 0)
    deviation = np.sqrt(np.sum(chance * (1 - chance) * gap.astype(np.float64) ** 2))
    assert abs(error.astype(np.float64).sum()) < 5 * deviation


def test_small_steps_are_not_lost():
    params = jnp.ones(4096, jnp.bfloat16)
    step = jax.jit(lambda p, i: apply_updates_stochastic(p, jnp.full(4096, -1e-4), i))
    lost = params
    for i in range(500):
        params = step(params, i)
        lost = optax.apply_updates(lost, jnp.full(4096, -1e-4))
    assert (lost == 1).all()
    # A walk of 500 roundings, gaps of 2**-8 taken with a chance of 1e-4 / 2**-8: its deviation in
    # one element is 2**-8 * sqrt(500 * .0256 * .974) = .0138, in the mean 64 times less.
    assert abs(float(params.astype(jnp.float32).mean()) - 0.95) < 5 * 0.0138 / 64


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1.5, -(2.0**-120), np.inf, -np.inf, np.nan], ids=lambda v: str(v)
)
def test_what_bfloat16_has_stays(value):
    params = jnp.full(256, value, jnp.bfloat16)
    new = apply_updates_stochastic(params, jnp.zeros(256), 0)
    np.testing.assert_array_equal(
        np.asarray(new, np.float32), np.full(256, jnp.bfloat16(value), np.float32)
    )


def test_the_sixteen_bits_are_pieces_of_threefry():
    key = random_bits.key_words(7)
    rows, columns = jnp.meshgrid(*map(jnp.uint32, (jnp.arange(3), jnp.arange(200))), indexing="ij")
    ours = np.asarray(random_bits.halves(key, rows, columns))
    for row, column in [(0, 0), (1, 17), (2, 40), (2, 63), (0, 64), (1, 199)]:
        counter = column // 64 * 16 + column % 16
        words = random_bits.threefry2x32(key, jnp.uint32(row), jnp.uint32(counter))
        piece = int(words[column // 32 % 2]) >> 16 * (column // 16 % 2) & 0xFFFF
        assert ours[row, column] == piece
    # All are different calls or pieces: as many equal pairs as chance has, 600**2 / 2**17 = 2.7.
    assert ours.size - np.unique(ours).size < 15


def test_other_dtypes_are_optax_s_own():
    params = {"a": jnp.ones(300), "b": jnp.ones(300, jnp.float16), "c": None}
    updates = {"a": jnp.full(300, 1e-4), "b": jnp.full(300, 1e-3), "c": None}
    new = apply_updates_stochastic(params, updates, 0)
    expected = optax.apply_updates(params, updates)
    for ours, theirs in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_variables_stay_variables():
    state = nnx.state(nnx.Linear(8, 64, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
    updates = jax.tree.map(lambda x: jnp.full(x.shape, 1e-3), state)
    new = apply_updates_stochastic(state, updates, 0)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(new))


def test_the_bits_do_not_depend_on_the_mesh():
    params = jnp.ones((64, 256), jnp.bfloat16)
    updates = jnp.asarray(np.random.default_rng(1).normal(size=(64, 256)), jnp.float32)
    apply = jax.jit(apply_updates_stochastic)
    expected = apply(params, updates, jax.random.key(5))
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = NamedSharding(mesh, PartitionSpec("x", "y"))
    spread = apply(*(jax.device_put(x, place) for x in (params, updates)), jax.random.key(5))
    np.testing.assert_array_equal(spread, expected)


@pytest.mark.parametrize("key", ["seed", 1.5, None])
def test_no_key_is_refused(key):
    with pytest.raises(TypeError, match="key must be"):
        apply_updates_stochastic(jnp.ones(3), jnp.ones(3), key)


TRANSFORMS = {
    "adamw4bit": functools.partial(optax_lowbit.adamw4bit, 1e-2, weight_decay=0.1),
    "factor4bit": functools.partial(optax_lowbit.factor4bit, 1e-2),
    "sgd8bit": functools.partial(optax_lowbit.sgd8bit, 1e-2, momentum=0.9),
}
SHAPES = [(65, 196), (5000,), (3, 20, 128), (7,)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_fused_apply_rounds_as_the_two_step_path(name, backend):
    """In the same direction, but where the two ways of adding up lie on both sides of the noise."""
    if backend == "interpret":
        if name != "adamw4bit":
            pytest.skip("interpreted kernels take a second a leaf")
        shapes = [(256, 512)]
    else:
        shapes = SHAPES
    rng = np.random.default_rng(2)
    tx = TRANSFORMS[name](policy=optax_lowbit.Policy(min_size=0), backend=backend)
    params = {str(s): jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in shapes}
    state = tx.init(params)
    fused = jax.jit(functools.partial(optax_lowbit.fused_apply, tx))
    update = jax.jit(tx.update)
    differing, total = 0, 0
    for step in range(3):
        grads = {str(s): jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes}
        with jax.numpy_dtype_promotion("standard"):  # optax's decay of bfloat16 parameters
            updates, _ = update(grads, state, params)
        key = jax.random.key(step)
        expected = apply_updates_stochastic(params, updates, key)
        params, state = fused(grads, state, params, key=key)
        for ours, theirs in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
            assert ours.dtype == jnp.bfloat16
            differing += int((ours != theirs).sum())
            total += ours.size
    # Sums differ by 2**-22 of a value at most, and noise in steps of 2**-24 to 2**-23 decides.
    assert differing <= max(3, total * 2**-12), (differing, total)


def test_fused_rounding_does_not_depend_on_the_mesh():
    tx = optax_lowbit.adamw4bit(1e-2, policy=optax_lowbit.Policy(min_size=0))
    params = jnp.ones((64, 1024), jnp.bfloat16)
    grad = jnp.asarray(np.random.default_rng(3).normal(size=(64, 1024)), jnp.float32)
    fused = jax.jit(functools.partial(optax_lowbit.fused_apply, tx))
    expected, _ = fused(grad, tx.init(params), params, key=1)
    for axis_type in jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit:
        mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
        with jax.set_mesh(mesh):
            place = NamedSharding(mesh, PartitionSpec("x", "y"))
            spread, spread_grad = jax.device_put((params, grad), place)
            new, _ = fused(spread_grad, tx.init(spread), spread, key=1)
        np.testing.assert_array_equal(new, expected)


def test_fused_apply_refuses_a_wrong_key():
    tx = optax_lowbit.adamw4bit(1e-3)
    params = jnp.ones((64, 128), jnp.bfloat16)
    with pytest.raises(TypeError, match="key must be"):
        optax_lowbit.fused_apply(tx, params, tx.init(params), params, key="seed")
    with pytest.raises(ValueError, match="threefry2x32 key"):
        other = jax.random.key(0, impl="rbg")
        optax_lowbit.fused_apply(tx, params, tx.init(params), params, key=other)
