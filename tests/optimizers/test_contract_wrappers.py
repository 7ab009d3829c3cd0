"""Low-bit optimizers inside optax's wrappers and JAX's transformations."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowbit
from optax_lowbit import is_quantized
from tests.optimizers.cases import (
    FAMILIES,
    SHAPES,
    SMALL_SHAPES,
    assert_bit_equal,
    assert_equal_up_to_rounding,
    assert_same_types,
    each_case,
    each_family,
    jitted_update,
    normal_tree,
    quantized_leaves,
    run_steps,
    standard_promotion,
    trained,
)


@each_family
def test_chain_with_clipping_scales_the_gradient_first(case):
    params, grads, state = trained(case)
    chained = optax.chain(optax.clip_by_global_norm(1.0), case.make())
    norm = optax.tree.norm(grads)
    clipped = jax.tree.map(lambda g: g / norm, grads)
    updates, new_state = jax.jit(chained.update)(grads, (optax.EmptyState(), state), params)
    _, update = jitted_update(case)
    expected, expected_state = update(clipped, state, params)
    for name in params:
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-4, atol=1e-6)
    assert_same_types(new_state[1], expected_state)


@each_family
def test_a_schedule_may_stand_for_the_learning_rate(case):
    params, grads, _ = trained(case)
    tx, update = jitted_update(case)
    constant, _ = run_steps(update, tx.init(params), params, [grads, grads])
    rate = dict(case.arguments)["learning_rate"]
    tx = case.make(learning_rate=lambda count: rate * 0.5**count)
    with standard_promotion():
        scheduled, _ = run_steps(jax.jit(tx.update), tx.init(params), params, [grads, grads])
    np.testing.assert_allclose(scheduled[0]["matrix"], constant[0]["matrix"], rtol=1e-6)
    np.testing.assert_allclose(scheduled[1]["matrix"], 0.5 * constant[1]["matrix"], rtol=1e-6)


@each_family
def test_masked_leaves_pass_through(case):
    params, grads = normal_tree(), normal_tree(seed=1)
    tx = optax.masked(case.make(), {"matrix": False, "bias": True})
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(grads, state, params)
    assert not quantized_leaves(state)
    assert_bit_equal(updates["matrix"], grads["matrix"])
    assert (updates["bias"] != grads["bias"]).all()


def test_partition_gives_each_group_its_own_optimizer():
    shapes = {"first": (64, 128), "second": (32, 256), "bias": (64,)}
    params, grads = normal_tree(shapes), normal_tree(shapes, seed=1)
    four, eight = optax_lowbit.adamw4bit(1e-2), optax_lowbit.sgd8bit(1e-3, momentum=0.9)
    labels = {"first": "four", "second": "eight", "bias": "four"}
    tx = optax.partition({"four": four, "eight": eight}, labels)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert [q.spec.bits for q in quantized_leaves(state.inner_states["four"])] == [4, 4]
    assert [q.spec.bits for q in quantized_leaves(state.inner_states["eight"])] == [8]
    for name, alone in {"first": four, "second": eight, "bias": four}.items():
        expected, _ = jax.jit(alone.update)(
            {name: grads[name]}, alone.init({name: params[name]}), {name: params[name]}
        )
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-6)


@each_family
def test_apply_if_finite_skips_a_nan_gradient(case):
    params, grads, state = trained(case)
    tx = optax.apply_if_finite(case.make(), max_consecutive_errors=3)
    wrapped = tx.init(params)._replace(inner_state=state)
    update = jax.jit(tx.update)
    broken = {**grads, "bias": grads["bias"].at[3].set(jnp.nan)}
    updates, after_nan = update(broken, wrapped, params)
    assert_bit_equal(updates, jax.tree.map(jnp.zeros_like, params))
    assert_bit_equal(after_nan.inner_state, state)
    assert not after_nan.last_finite
    updates, after_finite = update(grads, after_nan, params)
    assert (updates["matrix"] != 0).all()
    for before, after in zip(quantized_leaves(state), quantized_leaves(after_finite)):
        assert any((x != y).any() for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after)))


@each_case
def test_tree_get_finds_moments_and_count(case):
    params = normal_tree()
    state = optax.chain(optax.clip(1.0), case.make()).init(params)
    if case.has_count:
        assert optax.tree.get(state, "count") == 0
    for name in case.moments:
        moment = optax.tree.get(state, name)
        assert set(moment) == {"matrix", "bias"}
        assert moment["matrix"].shape == (64, 128)
    assert is_quantized(optax.tree.get(state, case.moments[0])["matrix"])


@each_family
def test_vmap_over_an_ensemble_equals_separate_runs(case):
    members = [(normal_tree(seed=i), normal_tree(seed=10 + i)) for i in range(3)]
    tx, update = jitted_update(case)
    params, grads = jax.tree.map(lambda *x: jnp.stack(x), *members)
    vmapped_update = jax.jit(jax.vmap(tx.update))
    results = run_steps(vmapped_update, jax.vmap(tx.init)(params), params, [grads] * 2)
    assert quantized_leaves(results[1])[0].shape == (3, 64, 128)
    # XLA sums the rows of a batch of matrices in another order, which factored moments show.
    compare = assert_equal_up_to_rounding if case.name == "factor4bit" else assert_bit_equal
    for i, (member_params, member_grads) in enumerate(members):
        expected = run_steps(update, tx.init(member_params), member_params, [member_grads] * 2)
        compare(jax.tree.map(lambda x, i=i: x[i], results), expected)


@each_family
def test_scan_over_steps_equals_a_loop(case):
    tx, update = jitted_update(case)
    params = normal_tree()
    grads = [normal_tree(seed=seed) for seed in range(3)]

    @jax.jit
    def scanned(state, grads):
        def step(state, step_grads):
            updates, state = tx.update(step_grads, state, params)
            return state, updates

        return jax.lax.scan(step, state, grads)

    state, updates = scanned(tx.init(params), jax.tree.map(lambda *x: jnp.stack(x), *grads))
    looped_updates, looped_state = run_steps(update, tx.init(params), params, grads)
    assert_equal_up_to_rounding(state, looped_state)
    assert_equal_up_to_rounding(updates, jax.tree.map(lambda *x: jnp.stack(x), *looped_updates))


ODD_TREES = {
    "none": {"a": None, "b": (64,)},
    "empty": {},
    "empty-list": [],
    "shapes": {
        "scalar": (),
        "one": (1,),
        "ones": (1, 1, 1),
        "no-elements": (0, 8),
        "odd": (65, 131),
        "short-last-axis": (4096, 3),
        "thin": (1, 8193),
    },
}


@pytest.mark.parametrize("tree", ODD_TREES)
@each_family
def test_odd_trees_keep_their_structure(case, tree):
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        ODD_TREES[tree],
        is_leaf=lambda x: isinstance(x, tuple),
    )
    tx = case.make()
    state = tx.init(params)
    updates, new_state = jax.jit(tx.update)(params, state, params)
    assert_same_types(updates, params)
    assert_same_types(new_state, state)
    for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params)):
        assert (jnp.sign(update) == -jnp.sign(param)).all()


def test_python_numbers_are_parameters_as_in_optax():
    params, grads = {"a": 1.0, "b": jnp.ones((96, 128))}, {"a": 2.0, "b": jnp.ones((96, 128))}
    theirs, ours = optax.adamw(0.1), optax_lowbit.adamw4bit(0.1)
    with jax.numpy_dtype_promotion("standard"):  # optax's bias correction needs it
        expected, _ = theirs.update(grads, theirs.init(params), params)
    updates, _ = ours.update(grads, ours.init(params), params)
    assert updates["a"] == expected["a"]


def test_a_single_array_is_a_tree_too():
    param = normal_tree()["matrix"]
    tx = optax_lowbit.adamw4bit(1e-2)
    updates, state = jax.jit(tx.update)(param, tx.init(param), param)
    assert updates.shape == param.shape
    assert is_quantized(state[0].mu)


@each_case
def test_buffers_of_a_fresh_state_are_distinct(case):
    leaves = jax.tree.leaves(case.make().init(normal_tree(SHAPES)))
    pointers = {leaf.unsafe_buffer_pointer() for leaf in leaves}
    assert len(pointers) == len(leaves)


def aliased_parameters(compiled) -> set[int]:
    """Numbers of the arguments whose buffers an output takes over."""
    header = compiled.as_text().split("\n", 1)[0]
    aliases = header.split("input_output_alias={", 1)[1].split("}, entry", 1)[0]
    return {int(number) for number in re.findall(r"\((\d+), \{\}", aliases)}


TILED_SHAPES = {"matrix": (1024, 512), "bias": (64,)}


@pytest.mark.parametrize("shapes", [SMALL_SHAPES, TILED_SHAPES], ids=["whole", "tiled"])
@each_family
def test_donated_state_is_updated_in_place(case, shapes):
    tx = case.make()
    params, grads = normal_tree(shapes), normal_tree(shapes, seed=1)
    state = tx.init(params)
    update = jax.jit(tx.update, donate_argnums=(1,)).lower(grads, state, params).compile()
    first = len(jax.tree.leaves(grads))
    expected = set(range(first, first + len(jax.tree.leaves(state))))
    assert expected <= aliased_parameters(update)
    old_leaves = jax.tree.leaves(state)
    _, state = update(grads, state, params)
    assert all(leaf.is_deleted() for leaf in old_leaves)
    updates, state = update(grads, state, params)
    assert jnp.isfinite(updates["matrix"]).all()
    assert optax.tree.get(state, "count") == 2


def decay_mask(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


ADAM_OFF = {"mu_spec": None, "nu_spec": None}
COUNTERPARTS = {
    "adam4bit": (optax.adam, optax_lowbit.adam4bit, ADAM_OFF, {"b1": 0.8}),
    "adam8bit": (optax.adam, optax_lowbit.adam8bit, ADAM_OFF, {"eps_root": 1e-3}),
    "adam4bit-nesterov": (optax.adam, optax_lowbit.adam4bit, ADAM_OFF, {"nesterov": True}),
    "adamw4bit": (optax.adamw, optax_lowbit.adamw4bit, ADAM_OFF, {"weight_decay": 0.1}),
    "adamw8bit-mask-nesterov": (
        optax.adamw,
        optax_lowbit.adamw8bit,
        ADAM_OFF,
        {"weight_decay": 0.1, "mask": decay_mask, "nesterov": True},
    ),
    "sgd4bit": (optax.sgd, optax_lowbit.sgd4bit, {"trace_spec": None}, {"momentum": 0.9}),
    "sgd8bit-nesterov": (
        optax.sgd,
        optax_lowbit.sgd8bit,
        {"trace_spec": None},
        {"momentum": 0.9, "nesterov": True},
    ),
    "sgd4bit-plain": (optax.sgd, optax_lowbit.sgd4bit, {}, {}),
}


def counterpart_cases():
    for name in COUNTERPARTS:
        yield pytest.param(name, {"matrix": (64, 128)}, id=f"{name}-one-leaf")
        yield pytest.param(name, {**SMALL_SHAPES, "scalar": ()}, id=f"{name}-tree")


@pytest.mark.parametrize(("name", "shapes"), list(counterpart_cases()))
def test_without_quantization_it_is_optax_to_the_bit(name, shapes):
    reference, factory, off, arguments = COUNTERPARTS[name]
    params = normal_tree(shapes)
    grads = [normal_tree(shapes, seed=seed) for seed in range(1, 6)]
    tx, expected_tx = factory(1e-2, **off, **arguments), reference(1e-2, **arguments)
    state = tx.init(params)
    assert not quantized_leaves(state)
    updates, _ = run_steps(jax.jit(tx.update), state, params, grads)
    with standard_promotion():
        expected, _ = run_steps(
            jax.jit(expected_tx.update), expected_tx.init(params), params, grads
        )
    for step_updates, step_expected in zip(updates, expected):
        for leaf in params:
            assert (step_updates[leaf] == step_expected[leaf]).all(), leaf


def test_families_store_moments_in_different_ways():
    stored = set()
    for case in FAMILIES:
        state = jax.eval_shape(case.make().init, normal_tree())
        leaves = [optax.tree.get(state, moment)["matrix"] for moment in case.moments]
        stored.add(tuple(getattr(leaf, "spec", type(leaf)) for leaf in leaves))
    assert len(stored) == len(FAMILIES)
