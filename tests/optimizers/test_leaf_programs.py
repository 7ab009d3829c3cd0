"""Updates taken apart leaf by leaf give the bits of the whole update; so do pieces of a leaf."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_lowbit.optimizers.leaf_programs import results_of, split_by_leaf
from optax_lowbit.optimizers.ownership import owners, slots
from tests.optimizers.any_state_cases import without_keys
from tests.optimizers.cases import assert_bit_equal, normal_tree, standard_promotion

SHAPES = {"matrix": (12, 16), "other": (6, 16), "bias": (5,), "scalar": ()}


def chained(core):
    return optax.chain(
        optax.clip_by_global_norm(1.0), core, optax.add_decayed_weights(0.1), optax.scale(-1e-2)
    )


def matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


# Elementwise: of every leaf, or of those that are named.
ALL, VECTORS = tuple(SHAPES), ("bias", "scalar")
CASES = {
    "adam": (optax.adam(1e-2), ALL),
    "chain": (chained(optax.scale_by_adam()), ALL),
    "lion": (chained(optax.scale_by_lion()), ALL),
    "sgd-schedule": (optax.sgd(optax.cosine_decay_schedule(0.1, 9), 0.9, nesterov=True), ALL),
    "adagrad": (optax.adagrad(0.1), ALL),
    "radam": (optax.radam(1e-2), ALL),
    "masked": (chained(optax.masked(optax.scale_by_adam(), matrices)), ALL),
    "inject": (optax.inject_hyperparams(optax.adamw)(1e-2), ALL),
    "block-rms": (optax.chain(optax.clip_by_block_rms(0.1), optax.scale_by_adam()), ALL[:3]),
    "lamb": (optax.lamb(1e-2), ()),
    "noise": (optax.chain(optax.trace(0.9), optax.add_noise(0.1, 0.5, 0)), ("scalar",)),
    "muon": (optax.contrib.muon(1e-2), VECTORS),
}


@functools.cache
def flat(name):
    """The update of flat arguments, their values, their owners and which of them are heavy."""
    tx = optax.with_extra_args_support(CASES[name][0])
    params, grads = normal_tree(SHAPES), normal_tree(SHAPES, seed=1)
    with standard_promotion():
        state = tx.init(params)
    trees = grads, state, params
    values, treedef = jax.tree.flatten(trees)

    def update(*values):
        grads, state, params = treedef.unflatten(values)
        with standard_promotion():
            return jax.tree.leaves(tx.update(grads, state, params))

    state_owners = owners(state, params)
    belong = [*range(len(grads)), *state_owners, *range(len(params))]
    heavy = [False] * len(grads) + [i is not None for i in state_owners] + [False] * len(params)
    return update, values, belong, heavy


def in_parts(name, piece=None):
    """The update by leaf programs; elementwise leaves cut along the first axis into pieces."""
    update, values, belong, heavy = flat(name)
    programs = split_by_leaf(update, values, belong, heavy)
    cut = []

    def run(values):
        shared, outputs = programs.shared([values[i] for i in programs.shared_inputs])
        results = dict(zip(programs.shared_outputs, outputs))
        for program in programs.leaves.values():
            arguments = [values[i] for i in program.inputs]
            if piece and program.is_elementwise and program.shape:
                cut.append(program.shape)
                starts = range(0, program.shape[0], piece)
                pieces = [
                    program.run([a[start : start + piece] for a in arguments], shared)
                    for start in starts
                ]
                outputs = [jnp.concatenate(parts) for parts in zip(*pieces)]
            else:
                outputs = program.run(arguments, shared)
            results.update(zip(program.outputs, outputs))
        return [results[i] for i in range(len(results))]

    return programs, run, cut


@pytest.mark.parametrize("name", CASES)
def test_leaves_one_by_one_are_the_whole_update_to_the_bit(name):
    update, values, _, _ = flat(name)
    programs, run, _ = in_parts(name)
    elementwise = {sorted(SHAPES)[i] for i, p in programs.leaves.items() if p.is_elementwise}
    assert elementwise == set(CASES[name][1])
    expected = jax.jit(lambda values: update(*values))(values)
    assert_bit_equal(without_keys(jax.jit(run)(values)), without_keys(expected))


@pytest.mark.parametrize("name", ["chain", "masked", "inject"])
def test_pieces_of_a_leaf_are_the_leaf(name):
    update, values, _, _ = flat(name)
    _, run, cut = in_parts(name, piece=4)
    result = jax.jit(run)(values)
    assert sorted(cut) == [(5,), (6, 16), (12, 16)]  # two of them with a rest
    for piecewise, whole in zip(result, jax.jit(lambda values: update(*values))(values)):
        np.testing.assert_allclose(piecewise, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "tx",
    [
        optax.contrib.momo(),  # the step size needs all momenta
        optax.contrib.dadapt_adamw(),
        optax.apply_if_finite(optax.adam(1e-2), 3),  # a conditional over everything
        optax.chain(optax.trace(0.9), optax.clip_by_global_norm(1.0)),  # the norm of momenta
    ],
    ids=["momo", "dadapt", "conditional", "norm-of-momenta"],
)
def test_what_needs_moments_of_other_leaves_is_not_taken_apart(tx):
    params = normal_tree({"a": (4, 8), "b": (8,)})
    with standard_promotion():
        state = tx.init(params)
    values, treedef = jax.tree.flatten((params, state, params))

    def update(*values):
        grads, state, params = treedef.unflatten(values)
        extra = {"value": jnp.float32(1)} if "momo" in str(tx.update) else {}
        with standard_promotion():
            return jax.tree.leaves(tx.update(grads, state, params, **extra))

    state_owners = owners(state, params)
    belong = [0, 1, *state_owners, 0, 1]
    heavy = [False, False, *(i is not None for i in state_owners), False, False]
    assert split_by_leaf(update, values, belong, heavy) is None


def test_the_norm_of_one_leaf_is_shared_where_that_makes_its_program_elementwise():
    """With a single leaf the global norm depends on that leaf alone."""

    def update(grad, mu):
        return [grad / jnp.linalg.norm(grad) + mu]

    arguments = [jax.ShapeDtypeStruct((8, 4), jnp.float32)] * 2
    light = split_by_leaf(update, arguments, [0, 0], [False, True])
    assert light.leaves[0].is_elementwise and light.shared_inputs == (0,)
    heavy = split_by_leaf(update, arguments, [0, 0], [True, True])
    assert not heavy.leaves[0].is_elementwise and heavy.shared_inputs == ()


def test_a_result_that_needs_no_argument_is_shared():
    def update(grad, mu):
        return [jnp.zeros_like(grad), 0.5 * mu, jnp.int32(3)]

    leaf = jnp.ones((4, 2))
    programs = split_by_leaf(update, [leaf, leaf], [0, 0], [True, True])
    assert programs.shared_outputs == (0, 2)
    _, (zeros, three) = programs.shared([])
    assert_bit_equal((zeros, jnp.asarray(three)), (jnp.zeros((4, 2)), jnp.int32(3)))
    assert_bit_equal(programs.leaves[0].run([leaf], {}), [0.5 * leaf])


def test_explicit_mesh_keeps_types_and_bits():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    tx = chained(optax.scale_by_adam())
    with jax.set_mesh(mesh):
        put = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("x", "y")))
        params, grads = put(jnp.ones((8, 16))), put(jnp.arange(128.0).reshape(8, 16))
        state = tx.init(params)
        values, treedef = jax.tree.flatten((grads, state, params))

        def update(*values):
            with standard_promotion():
                return jax.tree.leaves(tx.update(*treedef.unflatten(values)))

        belong = [0, *owners(state, params), 0]
        heavy = [index in (2, 3) for index in range(len(values))]  # mu, nu
        programs = split_by_leaf(update, values, belong, heavy)

        @jax.jit
        def run(values):
            shared, outputs = programs.shared([values[i] for i in programs.shared_inputs])
            results = dict(zip(programs.shared_outputs, outputs))
            for program in programs.leaves.values():
                assert program.is_elementwise
                new = program.run([values[i] for i in program.inputs], shared)
                results.update(zip(program.outputs, new))
            return [results[i] for i in range(len(results))]

        result, expected = run(values), jax.jit(lambda values: update(*values))(values)
    assert jax.tree.map(jax.typeof, result) == jax.tree.map(jax.typeof, expected)
    for x, y in zip(result, expected):
        np.testing.assert_array_equal(x, y)


def test_results_one_by_one_are_the_function():
    def function(a, b):
        return [jnp.zeros_like(a), jnp.full(b.shape, 2.5), a + b, jnp.int32(7)]

    a, b = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3))
    results = results_of(function, [a, b])
    assert results.fill(0, [a, b]) == 0 and results.fill(1, [a, b]) == 2.5
    assert results.fill(2, [a, b]) is None and results.fill(3, [a, b]) is None
    assert_bit_equal([results.compute(i, [a, b]) for i in range(4)], function(a, b))


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"mu": {"w": jnp.ones(3), "b": jnp.ones(2)}}, [0, 1]),  # sorted: b, w
        ({"mu": {"w": [jnp.ones(3), jnp.ones(1)]}}, [1, 1]),  # a list for each parameter
        ({"w": jnp.float32(1)}, [None]),  # a hyperparameter of that name
        ({"count": jnp.int32(0), "b": {"b": jnp.ones(2)}}, [0, None]),
        ({"mu": jnp.ones(5)}, [None]),
        ({}, []),
    ],
)
def test_owners(state, expected):
    params = {"b": jnp.ones(2), "w": jnp.ones(3)}
    assert owners(state, params) == expected


def test_scalars_belong_to_scalar_parameters():
    params = {"s": jnp.float32(1)}
    assert owners(optax.adam(1e-3).init(params), params) == [None, 0, 0]


def test_slots_tell_the_innermost_named_tuple():
    params = {"mu": {"w": jnp.ones((2, 3))}}
    state = optax.chain(optax.sm3(1e-3), optax.scale_by_adam()).init(params)
    found = [(s.owner, s.state, s.field) for s in slots(state, params)]
    sm3, adam = "ScaleBySM3State", "ScaleByAdamState"
    assert found == [
        (0, sm3, "mu"), (0, sm3, "mu"), (0, sm3, "nu"),
        (None, adam, "count"), (0, adam, "mu"), (0, adam, "nu"),
    ]  # fmt: skip
    assert slots(state, params)[0].path == "0/0/mu/mu/w/0"


def test_a_single_array_owns_all_that_is_no_scalar():
    param = jnp.ones((2, 3))
    assert owners(optax.adam(1e-3).init(param), param) == [None, 0, 0]
    assert slots(optax.adam(1e-3).init(param), param)[1].field == "mu"
