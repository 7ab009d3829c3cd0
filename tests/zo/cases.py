"""Trees, losses and materialized directions that the tests of zeroth-order steps share."""

import jax
import jax.numpy as jnp

from optax_lowbit.zo.directions import directions_of, probe_keys
from optax_lowbit.zo.noise import Probe
from optax_lowbit.zo.rows import whole
from optax_lowbit.zo.slices import Slice


def odd_tree(dtype=jnp.float32):
    """Leaves of many shapes: a stack, odd columns, a vector, a scalar, no float, None."""
    keys = jax.random.split(jax.random.key(7), 5)
    return {
        "stack": (jax.random.normal(keys[0], (3, 20, 20)) * 0.2).astype(dtype),
        "embedding": jax.random.normal(keys[1], (11, 20)).astype(dtype),
        "kernel": (jax.random.normal(keys[2], (20, 33)) * 0.2).astype(dtype),
        "bias": jax.random.normal(keys[3], (33,)).astype(dtype),
        "scale": jnp.asarray(1.5, dtype),
        "steps": jnp.arange(3, dtype=jnp.int32),
        "none": None,
    }


def loss(params, tokens):
    """A loss that looks rows up, scans over a stack and rematerializes."""
    x = params["embedding"][tokens].astype(jnp.float32)

    @jax.checkpoint
    def layer(x, weight):
        return jnp.tanh(x @ weight.astype(jnp.float32)) + x, None

    x, _ = jax.lax.scan(layer, x, params["stack"])
    kernel, bias = (params[name].astype(jnp.float32) for name in ("kernel", "bias"))
    return jnp.mean((x @ kernel + bias[None]) ** 2) * params["scale"].astype(jnp.float32)


TOKENS = jnp.array([0, 3, 3, 10, 7])


def drawn(opt, params, state, probe=0):
    """The direction of one probe of a step, as a tree."""
    ours = opt.split(params)
    run = state.key[0], state.key[1]
    keys = probe_keys(run, state.count, opt.num_probes, ours.paths)[probe : probe + 1]
    prepared = opt.noise.prepare(state.prepared, ours, run, state.count)
    origin = Probe(run, run, state.count, prepared)
    one = directions_of(opt.noise, origin, keys, ours.leaves)
    rows = [ours.opened(whole(i, leaf)) for i, leaf in enumerate(ours.leaves)]
    return ours.tree([one.sum(jnp.ones(1), each, 0) for each in rows])


class Given:
    """Directions that a test gives: ``draw(slopes, rows, each)`` is what their sum is."""

    keys = (None,)  # made where they are added, as that of one probe

    def __init__(self, draw):
        self.draw = draw

    def sum(self, slopes, rows, zero, each=None):
        return self.draw(slopes, rows, each or (lambda z: z))


def moved(params, direction, s):
    """``params + s * direction`` where there is one, in the parameters' dtypes."""

    def add(param, z):
        if not jnp.issubdtype(param.dtype, jnp.floating):
            return param
        return (param.astype(jnp.float32) + jnp.float32(s) * z).astype(param.dtype)

    return jax.tree.map(add, params, direction)


def probed(opt, params, state, observe, s=1.0):
    """What ``observe`` gives of the tree that the first probe of a step evaluates at ``s``."""
    ours = opt.split(params)
    run = state.key[0], state.key[1]
    keys = probe_keys(run, state.count, opt.num_probes, ours.paths)
    prepared = opt.noise.prepare(state.prepared, ours, run, state.count)
    phi = Slice(observe, ours, opt.noise, Probe(run, run, state.count, prepared))
    return phi.at(keys[0], s)


def moved_by(opt, params, state, slope=1.0):
    """Parameters after ``slope`` times the first direction is added, and the state after that."""
    slopes = jnp.zeros(opt.num_probes).at[0].set(slope)
    return opt.apply(params, state, jnp.append(slopes, 0.0))
