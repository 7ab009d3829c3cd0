"""Trees for tests of a state on the host, and where it lies."""

import jax

from tests.optimizers.cases import normal_tree

HOST = "pinned_host"
SHAPES = {"bias": (64,), "first": (64, 128), "none": None, "second": (3, 32, 130)}
ONE_PAGED = {"bias": (64,), "first": (64, 128)}


def tree(seed=0, shapes=SHAPES):
    arrays = normal_tree({k: s for k, s in shapes.items() if s is not None}, seed)
    return {name: arrays.get(name) for name in shapes}


def kinds(state):
    return [x.sharding.memory_kind for x in jax.tree.leaves(state)]


def expected_kinds(state, min_size=4096):
    """Of a state whose large arrays all belong to parameters."""
    return [HOST if x.size > min_size else "device" for x in jax.tree.leaves(state)]
