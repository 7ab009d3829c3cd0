"""A state becomes that of another transform, and training goes on as far as few bits allow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowbit
from optax_lowbit import QuantSpec, checkpoint, convert_state, dequantize, is_quantized, quantize
from optax_lowbit.checkpoint import conversion, states
from tests.optimizers.cases import (
    assert_bit_equal,
    assert_same_types,
    normal_tree,
    standard_promotion,
)

LR = 1e-2
BLOCK = QuantSpec(codebook="linear", bits=4, signed=False, scaling="block")
TRANSFORMS = {
    "adamw": optax.adamw(LR),
    "adamw4bit": optax_lowbit.adamw4bit(LR),
    "adamw4bit-block": optax_lowbit.adamw4bit(LR, nu_spec=BLOCK),
    "adamw8bit": optax_lowbit.adamw8bit(LR),
    "factor4bit": optax_lowbit.factor4bit(LR),
}


@functools.cache
def updated(name, steps=3):
    """Parameters, a gradient and the state after a few steps."""
    params, tx = normal_tree(seed=0), TRANSFORMS[name]
    state, update = tx.init(params), jax.jit(tx.update)
    with standard_promotion():
        for seed in range(1, steps + 1):
            grads = normal_tree(seed=seed)
            _, state = update(grads, state, params)
    return params, grads, state


def floats(moment):
    return np.asarray(dequantize(moment) if is_quantized(moment) else moment)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("adamw", "adamw4bit"),
        ("adamw", "adamw"),
        ("adamw4bit", "adamw"),
        ("adamw4bit", "adamw4bit-block"),
        ("adamw4bit", "adamw8bit"),
        ("adamw4bit", "adamw4bit"),
        ("adamw4bit", "factor4bit"),
        ("factor4bit", "adamw8bit"),
        ("factor4bit", "factor4bit"),
    ],
)
def test_one_adam_becomes_another(before, after):
    params, _, state = updated(before)
    tx = TRANSFORMS[after]
    new = convert_state(state, to=tx, params=params)
    assert_same_types(new, tx.init(params))
    assert int(new[0].count) == 3
    np.testing.assert_array_equal(floats(new[0].mu["bias"]), floats(state[0].mu["bias"]))
    if before == after:
        assert_bit_equal(new, state)


def half_gap(spec):
    """The farthest that a number within the table can be from its nearest value."""
    values = np.sort(np.asarray(spec.values, np.float64))
    low = max(values[0] - (-1 if spec.signed else 0), 0)  # numbers below the least value
    return max(low, 1 - values[-1], np.diff(values).max() / 2)


def error_bounds(moment):
    """Elementwise bounds of the error of quantizing, from scales and the table alone."""
    spec, scales = moment.spec, moment.scales
    if isinstance(scales, tuple):
        scale = np.minimum(*map(np.asarray, scales))
    else:
        scale = np.repeat(np.asarray(scales), spec.block_size, axis=-1)[..., : moment.shape[-1]]
    return scale * (half_gap(spec) + 2.0**-22)  # a quotient and a product, rounded


@pytest.mark.parametrize("name", ["adamw4bit", "adamw4bit-block", "adamw8bit"])
def test_moments_are_as_close_as_the_table_allows(name):
    params, _, state = updated("adamw")
    new = convert_state(state, to=TRANSFORMS[name], params=params)
    for field in ("mu", "nu"):
        exact, stored = getattr(state[0], field)["matrix"], getattr(new[0], field)["matrix"]
        error = np.abs(floats(stored) - floats(exact))
        assert (error <= error_bounds(stored)).all()
        assert error.max() > 0


@pytest.mark.parametrize("name", ["adamw4bit", "adamw8bit"])
def test_next_update_is_within_the_bounds_of_its_moments(name):
    """u = m' / (sqrt(v') + eps) is monotone in m' and in v', so bounds of m and v bound it."""
    b1, b2, eps, decay, count = 0.9, 0.999, 1e-8, 1e-4, 4
    params, grads, state = updated("adamw")
    tx = TRANSFORMS[name]
    new = convert_state(state, to=tx, params=params)
    updates, _ = jax.jit(tx.update)(grads, new, params)
    g, p = (np.asarray(tree["matrix"], np.float64) for tree in (grads, params))

    def after(m, v):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        return m / (1 - b1**count) / (np.sqrt(v / (1 - b2**count)) + eps)

    m, v = (np.asarray(getattr(state[0], f)["matrix"], np.float64) for f in ("mu", "nu"))
    dm, dv = (error_bounds(getattr(new[0], f)["matrix"]) for f in ("mu", "nu"))
    corners = [
        after(m + sign * dm, np.maximum(v + other * dv, 0)) for sign in (1, -1) for other in (1, -1)
    ]
    directions = -np.asarray(updates["matrix"], np.float64) / LR - decay * p
    slack = 1e-5 * (1 + np.abs(directions))  # float32
    assert (directions <= np.max(corners, axis=0) + slack).all()
    assert (directions >= np.min(corners, axis=0) - slack).all()
    # A state that starts anew is not within them.
    fresh, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    directions = -np.asarray(fresh["matrix"], np.float64) / LR - decay * p
    assert (np.abs(directions - np.clip(directions, np.min(corners, 0), np.max(corners, 0))) > slack
            ).mean() > 0.1  # fmt: skip


def test_training_goes_on_in_4_bits_and_back():
    """The loss stays as near to that of float32 as that of a run in 4 bits from the start."""
    x = jax.random.normal(jax.random.key(0), (256, 64))
    target = x @ jax.random.normal(jax.random.key(1), (64, 128))

    def loss_fn(params):
        return jnp.mean((x @ params["w"] - target) ** 2)

    def trainer(tx):
        @jax.jit
        def step(params, state):
            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        def train(params, state, steps):
            losses = []
            with standard_promotion():
                for _ in range(steps):
                    params, state, loss = step(params, state)
                    losses.append(float(loss))
            return params, state, np.asarray(losses)

        return train

    float32, low = TRANSFORMS["adamw"], TRANSFORMS["adamw4bit"]
    in_float32, in_4_bits = trainer(float32), trainer(low)
    start = {"w": jnp.zeros((64, 128))}
    params, state, _ = in_float32(start, float32.init(start), 40)
    _, _, expected = in_float32(params, state, 20)
    converted = convert_state(state, to=low, params=params)
    params, state, losses = in_4_bits(params, converted, 10)
    back = convert_state(state, to=float32, params=params)
    assert int(back[0].count) == 50
    losses = np.concatenate([losses, in_float32(params, back, 10)[2]])
    _, _, low_all_along = in_4_bits(start, low.init(start), 60)
    deviation, usual = (np.abs(x - expected).max() for x in (losses, low_all_along[40:]))
    assert (np.diff(losses) < 0).all()
    assert 0 < deviation <= usual


def test_few_bits_survive_float32():
    """The same codes and scales, wherever a block's largest value is one of the table's."""
    params, _, state = updated("adamw4bit")
    through = convert_state(state, to=TRANSFORMS["adamw"], params=params)
    again = convert_state(through, to=TRANSFORMS["adamw4bit"], params=params)
    before, after = state[0].nu["matrix"], again[0].nu["matrix"]
    assert_bit_equal(after, before)
    # The signed table has +1 and no -1: a block whose largest value is negative shrinks.
    before, after = state[0].mu["matrix"], again[0].mu["matrix"]
    keeps = floats(before).max(-1) == np.asarray(before.scales)[:, 0]
    assert 0 < keeps.sum() < 64
    np.testing.assert_array_equal(np.asarray(after.codes)[keeps], np.asarray(before.codes)[keeps])
    np.testing.assert_array_equal(np.asarray(after.scales)[keeps], np.asarray(before.scales)[keeps])
    assert (np.asarray(after.scales)[~keeps] < np.asarray(before.scales)[~keeps]).all()


def test_means_are_those_of_the_dequantized_second_moment():
    params, _, state = updated("adamw4bit")
    new = convert_state(state, to=TRANSFORMS["factor4bit"], params=params)
    nu, means = floats(state[0].nu["matrix"]), new[0].nu["matrix"]
    np.testing.assert_allclose(means.rows, nu.mean(1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(means.columns, nu.mean(0, keepdims=True), rtol=1e-6)
    assert_bit_equal(new[0].mu, state[0].mu)
    full = convert_state(new, to=TRANSFORMS["adamw"], params=params)[0].nu["matrix"]
    outer = nu.mean(1, keepdims=True) * nu.mean(0, keepdims=True) / nu.mean()
    np.testing.assert_allclose(full, outer, rtol=2e-6)


def test_stochastic_specs_are_converted_to_nearest():
    spec = QuantSpec(codebook="dynamic_exponent", bits=8, signed=True, scaling="block",
                     block_size=256, rounding="stochastic")  # fmt: skip
    params, _, state = updated("adamw")
    tx = optax_lowbit.scale_by_adam8bit(mu_spec=spec, key=0)
    new = convert_state(state[0], to=tx, params=params)
    assert new.mu["matrix"].spec == spec
    nearest = convert_state(state, to=TRANSFORMS["adamw8bit"], params=params)[0].mu["matrix"]
    np.testing.assert_array_equal(new.mu["matrix"].codes, nearest.codes)
    # Where only the rounding differs codes are kept.
    back = convert_state(new, to=optax_lowbit.scale_by_adam8bit(), params=params)
    assert back.mu["matrix"].codes is new.mu["matrix"].codes


# Chains, masks and wrappers.


def test_position_in_a_chain_does_not_matter():
    params, _, state = updated("adamw")
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax_lowbit.scale_by_adam4bit(),
        optax.scale_by_schedule(lambda count: 1.0),
    )
    new = convert_state(state, to=tx, params=params)
    assert int(new[1].count) == 3 and int(new[2].count) == 3
    assert_bit_equal(convert_state(new, to=tx, params=params), new)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(new)]
    assert len(set(buffers)) == len(buffers)  # or the state could not be donated
    assert_bit_equal(new[1], convert_state(state, to=TRANSFORMS["adamw4bit"], params=params)[0])


def test_masks_and_partitions():
    params, _, state = updated("adamw")
    labels = {"matrix": "low", "bias": "full"}
    tx = optax.partition({"low": TRANSFORMS["adamw4bit"], "full": TRANSFORMS["adamw"]}, labels)
    new = convert_state(state, to=tx, params=params)
    low, full = (new.inner_states[label].inner_state[0] for label in ("low", "full"))
    assert is_quantized(low.mu["matrix"]) and int(low.count) == int(full.count) == 3
    np.testing.assert_array_equal(full.nu["bias"], state[0].nu["bias"])
    back = convert_state(new, to=TRANSFORMS["adamw"], params=params)
    assert int(back[0].count) == 3
    np.testing.assert_array_equal(back[0].mu["matrix"], floats(low.mu["matrix"]))
    counts = iter([3, 4])
    differ = jax.tree.map(lambda x: jnp.int32(next(counts)) if x.dtype == jnp.int32 else x, new)
    with pytest.raises(ValueError, match=r"\[0\].count could be made from each of .*differ"):
        convert_state(differ, to=TRANSFORMS["adamw"], params=params)


def test_injected_hyperparameters():
    params, _, state = updated("adamw")
    tx = optax.inject_hyperparams(optax_lowbit.adamw4bit)(learning_rate=0.5)
    new = convert_state(state, to=tx, params=params)
    assert int(new.count) == int(new.inner_state[0].count) == 3
    assert float(new.hyperparams["learning_rate"]) == 0.5
    new.hyperparams["learning_rate"] = jnp.float32(0.25)
    other = optax.inject_hyperparams(optax_lowbit.adamw8bit)(learning_rate=0.5, b1=0.8)
    carried = convert_state(new, to=other, params=params)
    assert float(carried.hyperparams["learning_rate"]) == 0.25
    back = convert_state(carried, to=TRANSFORMS["adamw"], params=params)
    assert int(back[0].count) == 3


def test_momentum():
    params = normal_tree()
    tx = optax.sgd(LR, momentum=0.9)
    _, state = tx.update(normal_tree(seed=1), tx.init(params), params)
    low = optax_lowbit.sgd4bit(LR, momentum=0.9)
    new = convert_state(state, to=low, params=params)
    assert_bit_equal(
        new[0].trace["matrix"], quantize(state[0].trace["matrix"], new[0].trace["matrix"].spec)
    )
    back = convert_state(new, to=tx, params=params)
    np.testing.assert_array_equal(back[0].trace["bias"], state[0].trace["bias"])


def test_two_optimizers_in_one_state():
    params, _, state = updated("adamw")
    other = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state)

    class Pair:
        @staticmethod
        def init(params):
            return {
                "a": TRANSFORMS["adamw4bit"].init(params),
                "b": TRANSFORMS["adamw"].init(params),
            }

    new = convert_state({"a": state, "b": other}, to=Pair, params=params)
    assert_bit_equal(new["b"], other)
    assert_bit_equal(new["a"], convert_state(state, to=TRANSFORMS["adamw4bit"], params=params))
    with pytest.raises(ValueError, match=r"could be made from each of \['x'\].*, \['y'\]"):
        convert_state({"x": state, "y": other}, to=Pair, params=params)
    with pytest.raises(
        ValueError, match=r"more than one leaf would be made from \[0\].mu\['bias'\]"
    ):
        convert_state(state, to=Pair, params=params)


def test_flax_variables():
    nnx = pytest.importorskip("flax.nnx")
    params, _, state = updated("adamw")
    variables = {name: nnx.Param(x) for name, x in params.items()}
    new = convert_state(state, to=TRANSFORMS["adamw4bit"], params=variables)
    assert isinstance(new[0].mu["bias"], nnx.Param) and is_quantized(new[0].mu["matrix"])
    back = convert_state(new, to=TRANSFORMS["adamw"], params=params)
    np.testing.assert_array_equal(back[0].nu["bias"], state[0].nu["bias"])


@pytest.mark.parametrize("params", [{}, {"a": None}, {"s": jnp.float32(1), "e": jnp.zeros((0, 3))}])
def test_empty_trees_and_odd_leaves(params):
    state = TRANSFORMS["adamw"].init(params)
    new = convert_state(state, to=TRANSFORMS["adamw4bit"], params=params)
    assert_bit_equal(new, TRANSFORMS["adamw4bit"].init(params))


# What is refused.


def refused(state, tx, params=None):
    with pytest.raises(ValueError) as caught:
        convert_state(state, to=tx, params=updated("adamw")[0] if params is None else params)
    return str(caught.value)


def test_moments_without_counterpart_are_named():
    _, _, state = updated("adamw")
    message = refused(state, optax_lowbit.sgd4bit(LR, momentum=0.9))
    assert "nothing to make [0].trace['bias'], [0].trace['matrix'] from" in message
    assert "no place for [0].mu['bias'], [0].mu['matrix'], [0].nu" in message
    lion = optax.scale_by_lion()
    assert "no place for [0].nu['bias'], [0].nu['matrix']" in refused(state, lion)
    message = refused(state, optax.MultiSteps(TRANSFORMS["adamw"], 2))
    assert "make .mini_step, .gradient_step, .acc_grads['bias'], " in message


def test_other_parameters_and_shapes_are_named():
    _, _, state = updated("adamw")
    tx = TRANSFORMS["adamw4bit"]
    message = refused(state, tx, {"matrix": jnp.ones((128, 64)), "bias": jnp.ones(64)})
    assert (
        "[0].mu['matrix'] has shape (64, 128), and [0].mu['matrix'] must have (128, 64)" in message
    )
    message = refused(state, tx, {"kernel": jnp.ones((64, 128)), "bias": jnp.ones(64)})
    assert "[0].mu['kernel'], [0].nu['kernel'] from and there is no place for" in message


def test_counts_that_differ_have_no_common_value():
    params, _, state = updated("adamw")
    state = (*state, optax.ScaleByScheduleState(jnp.int32(9)))
    tx = optax.inject_hyperparams(optax_lowbit.adamw4bit)(learning_rate=LR)
    assert ".count could be made from each of [0].count, " in refused(state, tx, params)


# Memory.


def test_one_leaf_at_a_time(monkeypatch):
    """Live arrays never exceed the two states and a leaf; nor do temporaries of a conversion."""
    params = {f"w{i}": jnp.ones((256, 256)) for i in range(6)}
    state = TRANSFORMS["adamw4bit"].init(params)
    leaf = 256 * 256 * 4
    seen = []

    def watched(source, like):
        value = conversion.converted(source, like)
        seen.append(sum(x.nbytes for x in jax.live_arrays()))
        return value

    monkeypatch.setattr(states, "converted", watched)
    before = sum(x.nbytes for x in jax.live_arrays())
    new = convert_state(state, to=TRANSFORMS["adamw"], params=params)
    assert max(seen) - before <= 12 * leaf + 2 * leaf
    assert len(seen) == 13
    moment = new[0].mu["w0"]
    spec = state[0].mu["w0"].spec
    compiled = conversion._converted.lower(moment, (spec, np.dtype(np.float32))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= leaf * 1.1


def test_states_on_the_host(tmp_path):
    """Of `offload`: saved, restored and converted, from and to."""
    params, _, state = updated("adamw4bit")
    tx = optax_lowbit.offload(TRANSFORMS["adamw4bit"], min_size=64)
    paged = tx.init(params)
    host = convert_state(state, to=tx, params=params)
    assert host[0].mu["matrix"].codes.sharding.memory_kind == "pinned_host"
    assert_bit_equal(jax.tree.map(np.asarray, host), jax.tree.map(np.asarray, state))
    checkpoint.save(tmp_path / "0", host)
    restored = checkpoint.restore(tmp_path / "0", paged)
    assert restored[0].mu["matrix"].codes.sharding.memory_kind == "pinned_host"
    assert_bit_equal(jax.tree.map(np.asarray, restored), jax.tree.map(np.asarray, state))
    eight = TRANSFORMS["adamw8bit"]
    assert_bit_equal(
        convert_state(host, to=eight, params=params), convert_state(state, to=eight, params=params)
    )
