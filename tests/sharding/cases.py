"""Meshes, trees and their placement, for the tests of states that are sharded."""

import jax
import numpy as np
from jax.sharding import NamedSharding

from optax_lowbit import QuantSpec

NU_BLOCK = QuantSpec(codebook="linear", bits=4, signed=False, scaling="block")
COLUMN = QuantSpec(
    codebook="dynamic_exponent", bits=4, signed=True, scaling="column", signed_scale=True
)


def mesh_of(axis_type, shape=(2, 4), names=("a", "b")):
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))


def normal(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_t(3, size=s).astype(np.float32) for n, s in shapes.items()}


def place(tree, mesh, specs):
    return {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in tree.items()}
