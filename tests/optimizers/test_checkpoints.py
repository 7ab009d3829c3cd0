"""A state that was written and read back is the same to the bit, and so is the step after it."""

import pickle

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.optimizers.cases import (
    FAMILIES,
    assert_bit_equal,
    each_case,
    each_family,
    jitted_update,
    normal_tree,
    quantized_leaves,
    trained,
)


def through_orbax(state, target, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", target)


def through_pickle(state, target, path):
    (path / "state.pkl").write_bytes(pickle.dumps(state))
    restored = pickle.loads((path / "state.pkl").read_bytes())
    assert jax.tree.structure(restored) == jax.tree.structure(target)
    return restored


def through_msgpack(state, target, path):
    (path / "state.msgpack").write_bytes(flax.serialization.to_bytes(state))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), target)
    return flax.serialization.from_bytes(zeros, (path / "state.msgpack").read_bytes())


FORMATS = {"orbax": through_orbax, "pickle": through_pickle, "msgpack": through_msgpack}


@pytest.mark.parametrize("kind", FORMATS)
@each_family
def test_training_goes_on_from_a_checkpoint_to_the_bit(case, kind, tmp_path):
    tx, update = jitted_update(case)
    params, grads, state = trained(case)
    target = jax.eval_shape(tx.init, params)
    restored = FORMATS[kind](state, target, tmp_path)
    assert_bit_equal(restored, state)
    assert_bit_equal(update(grads, restored, params), update(grads, state, params))


def test_orbax_restores_a_sharded_state_onto_another_mesh(tmp_path):
    tx, _ = jitted_update(FAMILIES[0])
    params, _, state = trained(FAMILIES[0])
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def target(leaf):
        spec = PartitionSpec("x") if leaf.ndim == 2 and leaf.shape[0] == 64 else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    abstract = jax.tree.map(target, jax.eval_shape(tx.init, params))
    restored = through_orbax(state, abstract, tmp_path)
    assert_bit_equal(restored, state)
    codes = quantized_leaves(restored)[0].codes
    assert codes.sharding.spec == PartitionSpec("x")


@each_case
def test_pickle_keeps_the_static_parts(case):
    tx, _ = jitted_update(case)
    state = tx.init(normal_tree())
    restored = pickle.loads(pickle.dumps(state))
    assert_bit_equal(restored, state)
    for before, after in zip(quantized_leaves(state), quantized_leaves(restored)):
        assert (after.spec, after.shape, after.dtype) == (before.spec, before.shape, before.dtype)


def test_msgpack_refuses_a_state_of_other_leaves():
    tx, _ = jitted_update(FAMILIES[0])
    _, _, state = trained(FAMILIES[0])
    written = flax.serialization.to_state_dict(state)
    other = tx.init({"matrix": jnp.ones((64, 128)), "another": jnp.ones((64, 128))})
    with pytest.raises(ValueError, match="another"):
        flax.serialization.from_state_dict(other, written)


@each_family
def test_chex_compares_states(case):
    _, _, state = trained(case)
    copy = jax.tree.map(lambda x: x + jnp.zeros((), x.dtype), state)
    chex.assert_trees_all_equal(copy, state)
    chex.assert_trees_all_close(copy, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(copy, state)
    chex.assert_tree_all_finite(state)
    fresh = jitted_update(case)[0].init(normal_tree())
    chex.assert_trees_all_equal_shapes_and_dtypes(fresh, state)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(fresh, state)
    wider = jax.tree.map(lambda x: x.astype(jnp.int32) if x.dtype == np.uint8 else x, state)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal_shapes_and_dtypes(wider, state)
