"""What optax asks of every optimizer: extra arguments, convergence, injection, dtypes, types."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_lowbit
from optax_lowbit import FactoredMoment, Policy, QuantSpec, dequantize, is_quantized
from tests.optimizers.cases import (
    FAMILIES,
    OPTIMIZERS,
    SHAPES,
    SMALL_SHAPES,
    abstract_tree,
    assert_bit_equal,
    assert_equal_up_to_rounding,
    assert_same_types,
    each_case,
    each_family,
    jitted_update,
    normal_tree,
    quantized_leaves,
    standard_promotion,
    trained,
)


@each_case
def test_two_steps_with_an_unexpected_argument(case):
    tx = case.make()
    shapes = SHAPES if case in FAMILIES else SMALL_SHAPES
    params, grads = normal_tree(shapes), normal_tree(shapes, seed=1)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grads, state, params, an_unexpected_argument=1)
        return optax.apply_updates(params, updates), state

    new_params, state = step(*step(params, tx.init(params)))
    assert quantized_leaves(state)
    for name, leaf in new_params.items():
        assert jnp.isfinite(leaf).all(), name
        assert (leaf != params[name]).any(), name
    if case.has_count:
        assert optax.tree.get(state, "count") == 2


@each_family
def test_the_second_update_does_not_compile(case, caplog):
    tx = case.make()
    params = normal_tree()
    update = jax.jit(tx.update)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        _, state = update(params, tx.init(params), params)
        if "Finished XLA compilation of jit(update_fn)" not in caplog.text:
            pytest.fail("JAX logs compilations in another way")
        caplog.clear()
        update(params, state, params)
    assert "Finished XLA compilation" not in caplog.text


TARGETS = {
    "parabola": (
        (np.array([-1.0, 10.0, 1.0]), np.zeros((2, 2))),
        (np.array([1.0, -1.0, 1.0]), np.array([[3.0, -2.0], [1.0, 4.0]])),
    ),
    "rosenbrock": (np.zeros(2), np.ones(2)),
}


def squared_distance(target):
    def loss(params):
        terms = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2), params, target)
        return sum(jax.tree.leaves(terms))

    return loss


def rosenbrock(params):
    x, y = params[..., 0], params[..., 1]
    return jnp.sum((1.0 - x) ** 2 + 100.0 * (y - x**2) ** 2)


def descend(tx, loss, params, steps):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    with standard_promotion():
        (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))(
            (params, tx.init(params))
        )
    return params


@pytest.mark.parametrize("target", TARGETS)
@each_case
def test_converges_on_a_small_target(case, target):
    start, end = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), TARGETS[target])
    loss = rosenbrock if target == "rosenbrock" else squared_distance(end)
    tx = case.make_descending(case.small_rate or (1e-3 if case.is_momentum else 1e-2))
    found = descend(tx, loss, start, 10_000)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(end)):
        np.testing.assert_allclose(x, y, rtol=3e-2, atol=3e-2)


@each_case
def test_converges_on_a_quantized_target(case):
    shapes = {"matrix": (64, 128)} if case.has("learning_rate") else {"vector": (8192,)}
    start, end = normal_tree(shapes, seed=0), normal_tree(shapes, seed=1)
    peak = 0.02 if case.is_momentum else 0.1
    if case.factory is optax_lowbit.adagrad8bit:
        peak = 1.0
    tx = case.make_descending(optax.schedules.cosine_decay_schedule(peak, 300))
    assert quantized_leaves(jax.eval_shape(tx.init, start))
    found = descend(tx, squared_distance(end), start, 300)
    for name in shapes:
        error = jnp.sqrt(jnp.mean((found[name] - end[name]) ** 2))
        assert error < 0.02, name  # of 1.4 at the start


@each_family
def test_converges_on_a_quantized_rosenbrock_valley(case):
    start = normal_tree({"points": (64, 128)}, scale=0.3)
    tx = case.make_descending(
        optax.schedules.cosine_decay_schedule(5e-4 if case.is_momentum else 2e-2, 2000)
    )

    def loss(params):
        return rosenbrock(params["points"].reshape(64, 64, 2))

    found = descend(tx, loss, start, 2000)
    assert loss(found) < 0.02 * loss(start)


@each_case
def test_map_params_without_a_change_is_the_identity(case):
    tx, update = jitted_update(case)
    params = normal_tree()
    _, state = update(params, tx.init(params), params)
    assert_bit_equal(optax.tree.map_params(tx, lambda x: x, state), state)


@each_family
def test_map_params_lays_out_a_state_by_partition_specs(case):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    specs = {"matrix": PartitionSpec("x", None), "bias": PartitionSpec()}

    def place(value, spec):
        def one(leaf):
            fits = leaf.ndim > 0 and leaf.shape[0] % 8 == 0
            return NamedSharding(mesh, spec if fits else PartitionSpec())

        return jax.tree.map(one, value)

    tx = case.make()
    params = normal_tree()
    shardings = optax.tree.map_params(
        tx,
        place,
        jax.eval_shape(tx.init, params),
        specs,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
        is_leaf=lambda x: is_quantized(x) or isinstance(x, FactoredMoment),
    )
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert_bit_equal(state, tx.init(params))
    for q in quantized_leaves(state):
        assert q.codes.sharding.spec == PartitionSpec("x", None)


def injected(case, **arguments):
    return optax.inject_hyperparams(case.factory)(**{**dict(case.arguments), **arguments})


@each_case
def test_inject_hyperparams_changes_nothing(case):
    params, grads = normal_tree(), normal_tree(seed=1)
    plain, update = jitted_update(case)
    wrapped = injected(case)
    updates, state = update(grads, plain.init(params), params)
    wrapped_state = jax.jit(wrapped.init)(params)
    wrapped_updates, wrapped_state = jax.jit(wrapped.update)(grads, wrapped_state, params)
    assert_equal_up_to_rounding(wrapped_updates, updates)
    assert_equal_up_to_rounding(wrapped_state.inner_state, state)


@each_family
def test_injected_hyperparams_take_effect_at_run_time(case):
    if case.is_momentum:
        values = {"learning_rate": 0.5, "momentum": 0.3}
    else:
        values = {"learning_rate": 0.5, "b1": 0.3, "b2": 0.6, "eps": 0.1}
    params, grads, state = trained(case)
    wrapped = injected(case)
    wrapped_state = wrapped.init(params)._replace(inner_state=state)

    @jax.jit
    def injected_step(state, values):
        state = state._replace(hyperparams={**state.hyperparams, **values})
        return wrapped.update(grads, state, params)

    expected, expected_state = jax.jit(case.make(**values).update)(grads, state, params)
    traced = {name: jnp.float32(value) for name, value in values.items()}
    updates, wrapped_state = injected_step(wrapped_state, traced)
    assert_equal_up_to_rounding(updates, expected)
    assert_equal_up_to_rounding(wrapped_state.inner_state, expected_state)


@each_case
def test_specs_and_policies_stay_static_under_inject_hyperparams(case):
    spec = QuantSpec(codebook="linear", bits=8, signed=True, scaling="block", block_size=64)
    first = case.moments[0]
    wrapped = injected(case, **{f"{first}_spec": spec}, policy=Policy(min_size=0))
    state = jax.jit(wrapped.init)(normal_tree())
    assert not any("spec" in name or name == "policy" for name in state.hyperparams)
    assert optax.tree.get(state, first)["matrix"].spec == spec


def dtypes(*names):
    return [pytest.param(jnp.dtype(name), id=name) for name in names]


@pytest.mark.parametrize("dtype", dtypes("bfloat16", "float16", "float32"))
@each_case
def test_updates_have_the_dtype_of_gradients(case, dtype):
    tx = case.make()
    params, grads = abstract_tree(SHAPES, jnp.float32), abstract_tree(SHAPES, dtype)
    updates, _ = jax.eval_shape(tx.update, grads, jax.eval_shape(tx.init, params), grads)
    assert_same_types(updates, grads)


@each_family
def test_multi_steps_accumulates(case):
    tx = optax.MultiSteps(case.make(), every_k_schedule=2)
    params, grads = normal_tree(dtype=jnp.bfloat16), normal_tree(seed=1, dtype=jnp.bfloat16)
    first_state = tx.init(params)
    update = jax.jit(tx.update)
    with standard_promotion():
        updates, state = update(grads, first_state, params)
        second_updates, second_state = update(grads, state, params)
    assert_bit_equal(updates, jax.tree.map(jnp.zeros_like, grads))
    assert_bit_equal(state.inner_opt_state, first_state.inner_opt_state)
    assert (second_updates["matrix"] != 0).all()
    assert_same_types(second_updates, grads)
    assert_same_types(second_state, first_state)


@pytest.mark.parametrize("dtype", dtypes("float16", "bfloat16", "float32", "float64"))
@each_case
def test_state_types_are_stable(case, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        tx = case.make()
        params = abstract_tree(SHAPES, dtype)

        def step(choice, params):
            state = tx.init(params)
            # A branch that steps and one that does not must agree on all types.
            return jax.lax.cond(
                choice,
                lambda: tx.update(params, state, params),
                lambda: (params, state),
            )

        state = jax.eval_shape(tx.init, params)
        updates, new_state = jax.eval_shape(step, jax.ShapeDtypeStruct((), bool), params)
        assert_same_types(new_state, state)
        assert_same_types(updates, params)


@pytest.mark.parametrize("case", OPTIMIZERS[:3:2], ids=lambda case: case.name)
def test_float64_leaves_keep_their_precision_unless_quantized(case):
    with jax.enable_x64(True):
        tx = case.make()
        params = normal_tree(dtype=jnp.float64)
        updates, state = jax.jit(tx.update)(params, tx.init(params), params)
        moment = optax.tree.get(state, case.moments[0])
        assert moment["bias"].dtype == jnp.float64
        assert dequantize(moment["matrix"]).dtype == jnp.float64
        assert updates["matrix"].dtype == jnp.float64


LAYOUTS = {
    "rows": PartitionSpec("x", None),
    "columns": PartitionSpec(None, "y"),
    "both": PartitionSpec("x", "y"),
}


def explicit_mesh_cases():
    for case in FAMILIES:
        for layout in LAYOUTS:
            yield pytest.param(case, layout, id=f"{case.name}-{layout}")


@pytest.mark.parametrize(("case", "layout"), list(explicit_mesh_cases()))
def test_state_types_are_stable_on_an_explicit_mesh(case, layout):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    tx = case.make()
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, LAYOUTS[layout])
        params = {
            "matrix": jnp.ones((64, 512), out_sharding=sharding),
            "bias": jnp.ones((64,)),
        }
        state = tx.init(params)
        updates, new_state = jax.jit(tx.update)(params, state, params)
        types = jax.tree.map(jax.typeof, state)
        assert jax.tree.map(jax.typeof, jax.jit(tx.init)(params)) == types
        assert jax.tree.map(jax.typeof, new_state) == types
        assert jax.typeof(updates["matrix"]) == jax.typeof(params["matrix"])
        codes = quantized_leaves(state)[0].codes
        assert jax.typeof(codes).sharding.spec == LAYOUTS[layout]


@each_case
def test_abstract_parameters_give_an_abstract_state(case):
    tx = case.make()
    params = abstract_tree(SHAPES, jnp.bfloat16)
    assert_same_types(tx.init(params), jax.eval_shape(tx.init, params))


def test_shapes_are_quantized_as_the_tests_assume():
    for case in OPTIMIZERS:
        state = jax.eval_shape(case.make().init, abstract_tree(SHAPES, jnp.float32))
        moment = optax.tree.get(state, case.moments[0])
        assert {n for n, x in moment.items() if is_quantized(x)} == {"matrix", "vector", "kernel"}
    assert set(SMALL_SHAPES) == {"matrix", "bias"}
