"""Which parameter a state's leaf belongs to, over optax's states and all kinds of trees."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import optax_lowbit
from optax_lowbit.optimizers.ownership import is_state_leaf, owners


def owned(tx, params):
    """{path of the state's leaf: index of its parameter} for `tx.init(params)`."""
    state = jax.eval_shape(tx.init, params)
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_state_leaf)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    return dict(zip(names, owners(state, params), strict=True))


def abstract(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


TREE = {"b": abstract(8), "w": abstract(8, 8)}


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (optax.adam(1e-3), [None, 0, 1, 0, 1]),
        (optax.adafactor(1e-3), [None, 0, 1, 0, 1, 0, 1]),
        (optax.sm3(1e-3), [0, 1, 1, 0, 1]),  # a list for each parameter, then momentum
        (optax.lbfgs(memory_size=2, linesearch=None), [None, 0, 1, 0, 1, 0, 1, 0, 1, None]),
        (optax.MultiSteps(optax.trace(0.9), 2), [None, None, 0, 1, 0, 1]),
        (optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9), [None, None, None, 0, 1]),
        (optax.masked(optax.trace(0.9), {"b": False, "w": True}), [1]),
        (optax.masked(optax.trace(0.9), {"b": True, "w": False}), [0]),
        (optax.identity(), []),
    ],
)
def test_leaves_of_optax_transforms(tx, expected):
    assert list(owned(tx, TREE).values()) == expected


def test_partition_whose_labels_bear_the_names_of_parameters():
    tx = optax.partition({"w": optax.trace(0.9), "b": optax.trace(0.5)}, {"w": "b", "b": "w"})
    assert owned(tx, TREE) == {
        ".inner_states['b'].inner_state.trace['w']": 1,
        ".inner_states['w'].inner_state.trace['b']": 0,
    }


class Layers(NamedTuple):
    first: jax.ShapeDtypeStruct
    mu: jax.ShapeDtypeStruct


@pytest.mark.parametrize(
    "params",
    [
        [abstract(8), abstract(8, 8)],
        (abstract(8), abstract(8, 8)),
        Layers(abstract(8), abstract(8, 8)),
        {"mu": abstract(8), "nu": abstract(8, 8)},
        {"count": abstract(8), "mu": {"mu": abstract(8, 8)}},
        {"a": abstract(8), "b": {"a": abstract(8, 8)}},
        {"0": abstract(8), "1": {"0": abstract(8, 8)}},
    ],
    ids=["list", "tuple", "named-tuple", "moments", "nested-moments", "suffix", "numbers"],
)
@pytest.mark.parametrize("low_bit", [False, True])
def test_trees_whose_keys_are_those_of_states(params, low_bit):
    policy = optax_lowbit.Policy(min_size=0)
    tx = optax_lowbit.adamw4bit(1e-3, policy=policy) if low_bit else optax.adamw(1e-3)
    assert list(owned(tx, params).values()) == [None, 0, 1, 0, 1]


def test_a_list_of_parameters_in_a_state_that_keeps_lists_of_arrays():
    found = owned(optax.sm3(1e-3), [abstract(8, 8), abstract(8, 8)])
    assert found == {
        "[0].mu[0][0]": 0, "[0].mu[0][1]": 0, "[0].mu[1][0]": 1, "[0].mu[1][1]": 1,
        "[0].nu[0]": 0, "[0].nu[1]": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "params",
    [[abstract(), abstract(8)], (abstract(8), abstract()), {"count": abstract(), "w": abstract(8)}],
    ids=["first", "second", "count"],
)
def test_a_counter_is_no_scalar_parameters(params):
    tx = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda count: 1.0))
    assert list(owned(tx, params).values()) == [None, 0, 1, 0, 1, None]


def test_none_leaves_masked_nodes_and_empty_trees():
    params = {"a": None, "b": abstract(8), "c": optax.MaskedNode(), "d": abstract(8, 8)}
    assert list(owned(optax.adam(1e-3), params).values()) == [None, 0, 1, 0, 1]
    assert list(owned(optax.adam(1e-3), {}).values()) == [None]
    assert list(owned(optax.adam(1e-3), None).values()) == [None]


def test_a_single_array():
    assert owned(optax.adam(1e-3), abstract(8, 8)) == {
        "[0].count": None, "[0].mu": 0, "[0].nu": 0,
    }  # fmt: skip


@pytest.mark.parametrize("tx", [optax.adamw(1e-3), optax_lowbit.adamw4bit(1e-3)])
def test_nnx_variables(tx):
    params = nnx.state(nnx.eval_shape(lambda: nnx.Linear(64, 128, rngs=nnx.Rngs(0))), nnx.Param)
    assert list(owned(tx, params).values()) == [None, 0, 1, 0, 1]
