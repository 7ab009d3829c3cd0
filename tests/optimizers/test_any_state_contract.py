"""`quantize_state` and `muon4bit` among wrappers, meshes, checkpoints, dtypes; what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_lowbit
from optax_lowbit import (
    Policy,
    QuantSpec,
    adamw4bit,
    dequantize,
    describe,
    is_quantized,
    muon4bit,
    quantize,
    quantize_state,
)
from tests.optimizers.cases import (
    abstract_tree,
    assert_bit_equal,
    assert_same_types,
    normal_tree,
    quantized_leaves,
    run_steps,
    standard_promotion,
)

TILED = {"matrix": (512, 256), "bias": (64,)}
STOCHASTIC = QuantSpec(
    codebook="linear", bits=4, signed=False, scaling="block", rounding="stochastic"
)


def test_adamw_has_the_codes_of_adamw4bit():
    """The states to the bit; updates up to the rounding of one sum.

    There the decay is added and the rate multiplied after all tiles, here within each, where the
    compiler contracts a product and a sum.
    """
    params = normal_tree(TILED)
    grads = [normal_tree(TILED, seed=seed) for seed in (1, 2, 3)]
    ours, theirs = quantize_state(optax.adamw(1e-2)), adamw4bit(1e-2, backend="reference")
    assert_bit_equal(ours.init(params), theirs.init(params))
    updates, state = run_steps(jax.jit(ours.update), ours.init(params), params, grads)
    expected, expected_state = run_steps(jax.jit(theirs.update), theirs.init(params), params, grads)
    assert_bit_equal(state, expected_state)
    for name in params:
        np.testing.assert_allclose(updates[-1][name], expected[-1][name], rtol=1e-6, atol=1e-8)


def test_stochastic_rounding_draws_the_numbers_of_adamw4bit():
    policy = Policy(rules=[("", {"nu": STOCHASTIC})])
    params, grads = normal_tree(), normal_tree(seed=1)
    ours = quantize_state(optax.adamw(1e-2), policy, key=7)
    theirs = adamw4bit(1e-2, policy=policy, key=7, backend="reference")
    states = []
    for tx in (ours, theirs):
        states.append(run_steps(jax.jit(tx.update), tx.init(params), params, [grads, grads])[1])
    assert_bit_equal(*states)


def test_stochastic_rounding_needs_a_key_and_a_counter():
    policy = Policy(rules=[("", {"nu": STOCHASTIC, "sum_of_squares": STOCHASTIC})])
    with pytest.raises(ValueError, match="key must be given"):
        quantize_state(optax.adam(1e-2), policy)
    with pytest.raises(ValueError, match="needs a state with a field 'count'"):
        quantize_state(optax.adagrad(1e-2), policy, key=0).init(normal_tree())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tx": 3}, TypeError, "tx must be an optax.GradientTransformation, got int"),
        ({"policy": 0}, TypeError, "policy must be a Policy"),
        ({"fields": ["mu"]}, TypeError, "fields must be a mapping"),
        ({"fields": {1: "signed"}}, TypeError, "fields must be a mapping"),
        ({"fields": {"z": "positive"}}, ValueError, r"fields\['z'\] must be 'signed', 'nonneg"),
        ({"policy": Policy(rules=[("", {"z": None})])}, ValueError, r"name the moments \['z'\]"),
        ({"key": "seed"}, TypeError, "key"),
    ],
)
def test_wrong_arguments_are_refused_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize_state(**{"tx": optax.adam(1e-2), **arguments})


def test_a_key_that_nothing_needs_changes_nothing():
    params = normal_tree()
    states = []
    for key in (0, None):
        tx = quantize_state(optax.adagrad(1e-2), key=key)
        states.append(jax.jit(tx.update)(params, tx.init(params), params))
    assert_bit_equal(*states)


def test_a_state_in_few_bits_is_not_quantized_again():
    with pytest.raises(ValueError, match="in few bits already"):
        quantize_state(adamw4bit(1e-2)).init(normal_tree())


def test_fields_extend_and_override():
    tx = optax.chain(optax.adam(1e-2), optax.scale_by_rprop(1e-2))
    state = quantize_state(tx, fields={"mu": None, "prev_updates": "signed"}).init(normal_tree())
    assert not is_quantized(state[0][0].mu["matrix"]) and is_quantized(state[0][0].nu["matrix"])
    assert is_quantized(state[1].prev_updates["matrix"])


def test_policy_decides_by_path_and_field_and_describe_tells():
    eight = QuantSpec(codebook="dynamic_exponent", bits=8, signed=True, scaling="block")
    shapes = {"embed": (64, 128), "norm": (8192,), "thin": (4096, 3)}
    policy = Policy(rules=[("embed", eight), ("norm", {"nu": None})])
    tx = quantize_state(optax.contrib.schedule_free_adamw(1e-2, b1=0.9), policy)
    description = describe(tx, abstract_tree(shapes, jnp.float32))
    found = {(d.path, d.moment): (d.spec and d.spec.bits, d.reason) for d in description.decisions}
    thin = "last axis of 3 is too short for scales to pay"
    assert found == {
        ("embed", "nu"): (8, ""), ("norm", "nu"): (None, "rule 1"), ("thin", "nu"): (None, thin),
        **{(path, "z"): (None, "field 'z' is no moment") for path in shapes},
    }  # fmt: skip
    assert [choice.path for choice in description.kernels] == ["embed"]
    state = tx.init(normal_tree(shapes))
    assert description.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_two_moments_of_one_name_are_numbered():
    tx = quantize_state(optax.chain(optax.trace(0.9), optax.trace(0.5)))
    decisions = describe(tx, normal_tree({"matrix": (64, 128)})).decisions
    assert [decision.moment for decision in decisions] == ["trace", "trace 2"]


def test_initial_values_are_kept():
    """Adagrad's accumulator starts at 0.1, of which every element is the largest of its row."""
    params = normal_tree({"matrix": (64, 128), "bias": (3,)})
    state = quantize_state(optax.adagrad(1e-2, 0.25)).init(params)
    np.testing.assert_array_equal(dequantize(state[0].sum_of_squares["matrix"]), 0.25)
    np.testing.assert_array_equal(state[0].sum_of_squares["bias"], 0.25)
    tx = quantize_state(optax.contrib.schedule_free_sgd(1e-2), fields={"z": "signed"})
    z = optax.tree.get(tx.init(params), "z")["matrix"]
    assert_bit_equal(z, quantize(params["matrix"], z.spec))


def test_init_is_the_same_abstract_and_under_jit():
    tx = quantize_state(optax.lamb(1e-2))
    params = normal_tree(TILED)
    state = tx.init(params)
    assert_bit_equal(jax.jit(tx.init)(params), state)
    assert_same_types(jax.eval_shape(tx.init, params), state)
    assert_same_types(tx.init(abstract_tree(TILED, jnp.float32)), state)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}
    assert len(pointers) == len(jax.tree.leaves(state))


def test_bfloat16_parameters_are_stepped_in_float32():
    params, grads = normal_tree(dtype=jnp.bfloat16), normal_tree(seed=1, dtype=jnp.bfloat16)
    tx = quantize_state(optax.adamw(1e-2))
    state = tx.init(params)
    assert_same_types(state, adamw4bit(1e-2).init(params))
    updates, new_state = jax.jit(tx.update)(grads, state, params)
    assert_same_types(updates, grads)
    assert_same_types(new_state, state)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (grads, params))
    expected, _ = jax.jit(tx.update)(wide[0], tx.init(wide[1]), wide[1])
    for name in params:
        np.testing.assert_array_equal(updates[name], expected[name].astype(jnp.bfloat16))


@pytest.mark.parametrize("tree", [{}, [], {"a": None}, {"a": {"b": 1.0}}], ids=str)
def test_odd_trees(tree):
    tx = quantize_state(optax.lion(1e-2))
    with standard_promotion():
        updates, state = tx.update(tree, tx.init(tree), tree)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    assert not quantized_leaves(state)


def test_map_params_sees_the_moments():
    tx = quantize_state(optax.chain(optax.clip(1.0), optax.lion(1e-2)))
    state = tx.init(normal_tree())
    floats = optax.tree.map_params(
        tx, lambda x: dequantize(x) if is_quantized(x) else x, state, is_leaf=is_quantized
    )
    assert_same_types(floats, optax.chain(optax.clip(1.0), optax.lion(1e-2)).init(normal_tree()))
    assert is_quantized(optax.tree.get(state, "mu")["matrix"])


def test_outside_of_wrappers():
    params, grads = normal_tree(), normal_tree(seed=1)
    mask = {"matrix": True, "bias": False}

    def make(learning_rate):
        return quantize_state(optax.lion(learning_rate))

    alone, _ = jax.jit(make(1e-2).update)(grads, make(1e-2).init(params), params)
    wrapped = {
        "masked": optax.masked(make(1e-2), mask),
        "partition": optax.partition(
            {"a": make(1e-2), "b": optax.sgd(1.0)}, {"matrix": "a", "bias": "b"}
        ),
        "inject": optax.inject_hyperparams(make)(learning_rate=1e-2),
        "steps": optax.MultiSteps(make(1e-2), 1).gradient_transformation(),
        "finite": optax.apply_if_finite(make(1e-2), 2),
    }
    for name, tx in wrapped.items():
        with standard_promotion():
            state = tx.init(params)
            updates, new_state = jax.jit(tx.update)(grads, state, params)
        assert_same_types(new_state, state)
        assert len(quantized_leaves(new_state)) == 1, name
        np.testing.assert_allclose(updates["matrix"], alone["matrix"], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("make", [lambda tx: optax.MultiSteps(tx, 3), lambda tx: optax.MultiSteps(
    tx, 3).gradient_transformation()], ids=["object", "transform"])  # fmt: skip
def test_moments_do_not_fade_while_multisteps_accumulates(make):
    tx = quantize_state(make(optax.trace(0.9)))
    params, grads = normal_tree(), normal_tree(seed=1)
    with standard_promotion():
        update = jax.jit(tx.update)
        _, states = None, [tx.init(params)]
        for _ in range(6):
            states.append(update(grads, states[-1], params)[1])
    trace = [optax.tree.get(state, "trace")["matrix"] for state in states]
    assert_bit_equal(trace[4], trace[3])
    assert_bit_equal(trace[5], trace[3])
    assert (trace[3].scales != trace[0].scales).any() and (trace[6].scales != trace[3].scales).any()


def test_moments_do_not_fade_where_a_transform_of_ones_own_holds_them():
    """An elementwise step on a leaf large enough for tiles."""
    trace: optax.GradientTransformation = optax.trace(0.9)

    def update_fn(updates, state, params=None):
        del params
        _, new = trace.update(updates, state)
        is_on = updates["matrix"][0, 0] > 0
        return updates, jax.tree.map(lambda a, b: jnp.where(is_on, a, b), new, state)

    tx = quantize_state(optax.GradientTransformation(trace.init, update_fn))
    grads = normal_tree({"matrix": (1024, 512)}, seed=1)
    grads = {"matrix": grads["matrix"].at[0, 0].set(1)}
    update = jax.jit(tx.update)
    _, first = update(grads, tx.init(grads))
    _, second = update({"matrix": -grads["matrix"]}, first)
    assert_bit_equal(second, first)
    _, third = update(grads, second)
    assert (third.trace["matrix"].codes != first.trace["matrix"].codes).any()


def test_vmap_equals_separate_runs():
    tx = quantize_state(optax.lamb(1e-2))
    members = [(normal_tree(seed=i), normal_tree(seed=10 + i)) for i in range(2)]
    params, grads = jax.tree.map(lambda *x: jnp.stack(x), *members)
    _, state = jax.jit(jax.vmap(tx.update))(grads, jax.vmap(tx.init)(params), params)
    update = jax.jit(tx.update)
    for i, (member, member_grads) in enumerate(members):
        _, expected = update(member_grads, tx.init(member), member)
        assert_bit_equal(jax.tree.map(lambda x, i=i: x[i], state), expected)


def mesh_of(axis_type):
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    "core", [optax.scale_by_sign, optax.scale_by_trust_ratio], ids=["tiles", "leaf"]
)
def test_sharded_equals_unsharded(axis_type, core):
    """In tiles where the step is elementwise, and as a whole leaf where it takes a norm."""
    tx = quantize_state(optax.chain(optax.trace(0.9), core(), optax.add_decayed_weights(0.1)))
    mesh = mesh_of(axis_type)
    spread = NamedSharding(mesh, PartitionSpec("a", "b"))
    params = normal_tree({"matrix": (1024, 1024)})
    grads = normal_tree({"matrix": (1024, 1024)}, seed=1)
    expected, expected_state = jax.jit(tx.update)(grads, tx.init(params), params)
    with jax.set_mesh(mesh):
        params, grads = jax.device_put((params, grads), spread)
        state = tx.init(params)
        updates, new_state = jax.jit(tx.update)(grads, state, params)
        if axis_type == AxisType.Explicit:
            assert jax.tree.map(jax.typeof, new_state) == jax.tree.map(jax.typeof, state)
    assert state[0].trace["matrix"].codes.sharding.is_equivalent_to(spread, 2)
    assert new_state[0].trace["matrix"].codes.sharding.is_equivalent_to(spread, 2)
    for x, y in zip(jax.tree.leaves(new_state), jax.tree.leaves(expected_state)):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_allclose(updates["matrix"], expected["matrix"], rtol=1e-5, atol=1e-7)


def test_a_checkpoint_holds_it(tmp_path):
    import orbax.checkpoint as ocp

    tx = quantize_state(optax.contrib.ademamix(1e-2))
    state = tx.init(normal_tree())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
    )
    with ocp.StandardCheckpointer() as checkpointer:
        assert_bit_equal(checkpointer.restore(tmp_path / "state", target), state)


def test_flax_nnx():
    from flax import nnx

    model = nnx.Linear(128, 256, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, quantize_state(optax.lamb(1e-1)), wrt=nnx.Param)
    x = jnp.ones((4, 128))

    @nnx.jit
    def train_step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [train_step(model, optimizer) for _ in range(3)]
    assert losses[2] < losses[0]
    assert is_quantized(nnx.as_pure(optimizer.opt_state)[0].mu["kernel"])


def test_muon_has_the_state_and_the_steps_of_muon():
    params, grads = normal_tree({"m": (96, 64), "v": (8192,)}), normal_tree(
        {"m": (96, 64), "v": (8192,)}, seed=1
    )  # fmt: skip
    theirs = optax.contrib.muon(1e-2, weight_decay=0.1)
    tx = muon4bit(1e-2, weight_decay=0.1)
    floats = jax.tree.map(
        lambda x: dequantize(x) if is_quantized(x) else x, tx.init(params), is_leaf=is_quantized
    )
    assert_same_types(floats, theirs.init(params))
    assert len(quantized_leaves(tx.init(params))) == 3
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    off = muon4bit(1e-2, weight_decay=0.1, mu_spec=None, nu_spec=None)
    with standard_promotion():
        expected, _ = jax.jit(theirs.update)(grads, theirs.init(params), params)
        plain, _ = jax.jit(off.update)(grads, off.init(params), params)
    assert_bit_equal(plain, expected)
    for name in params:
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="mu_spec must be signed"):
        muon4bit(1e-2, mu_spec=STOCHASTIC)


def test_fields_of_states_that_are_dicts():
    """A transform of one's own, whose state is a dict."""

    def update(updates, state, params=None):
        mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["mu"], updates)
        return mu, {"mu": mu}

    own = optax.GradientTransformation(lambda p: {"mu": optax.tree.zeros_like(p)}, update)
    params = normal_tree()
    assert is_quantized(quantize_state(own).init(params)["mu"]["matrix"])


def test_impossible_arguments_of_a_known_state_are_refused_at_init():
    params = normal_tree()
    with pytest.raises(ValueError, match=r"fields names \['nus'\], and the state has .*'mu', 'nu'"):
        quantize_state(optax.adam(1e-3), fields={"nus": None}).init(params)
    corrected = optax.chain(optax.sgd(0.1), optax_lowbit.correct_bfloat16())
    bfloat16 = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    with pytest.raises(ValueError, match="correct_bfloat16 must be outside, last in a chain"):
        quantize_state(corrected).init(bfloat16)
