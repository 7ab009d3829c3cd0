"""A small run with a log, that the tests of replays share."""

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit import QuantSpec, zo
from optax_lowbit.kernels.steps import FusedMomentum
from optax_lowbit.moments.storage import Moment
from optax_lowbit.zo.updates import Stepped

SPEC = QuantSpec(codebook="dynamic_exponent", bits=4, signed=True, scaling="block")
X = np.random.default_rng(0).normal(size=(4, 34)).astype(np.float32)


def tree(dtype=jnp.float32):
    """Leaves large enough for 4-bit moments, odd, and none that trains."""
    rng = np.random.default_rng(1)
    return {
        "kernel": jnp.asarray(rng.normal(size=(34, 136)), dtype),
        "bias": jnp.asarray(rng.normal(size=33), dtype),
        "ids": jnp.arange(3, dtype=jnp.int32),
    }


def loss(params, x):
    kernel, bias = (params[name].astype(jnp.float32) for name in ("kernel", "bias"))
    return jnp.mean((x @ kernel)[:, :33] * bias[None])


def _momentum(count):
    del count

    def step(estimate, moments, constants):
        del constants
        trace = estimate + jnp.float32(0.9) * moments["trace"]
        return trace, {"trace": trace}

    return step


def sgd(**options):
    return zo.zo_sgd(
        1e-2, 1e-2, 2, weight_decay=0.5, weight_decay_mask=lambda path, leaf: leaf.ndim > 1,
        **options,
    )  # fmt: skip


def lozo():
    """Momentum in a space of low rank, that changes on the way."""
    return zo.lozo(1e-2, 1e-2, 2, interval=2, momentum=0.9, weight_decay=0.5)


def momentum():
    """Momentum in 4 bits, by a kernel where there is one."""
    rule = Stepped(moments={"trace": Moment(SPEC)}, step=_momentum, fused=FusedMomentum(0.9, False))
    return zo.ZeroOrderOptimizer(rule=rule, learning_rate=1e-3, eps=1e-2, weight_decay=0.5)


def logged_run(path, opt, base, steps, **options):
    """Parameters and state after steps of which each is donated to the next."""
    state = opt.init(base, 7)
    with zo.replay.Writer(path, opt, base, state, **options) as log:
        params, state = jax.tree.map(jnp.copy, (base, state))
        step = jax.jit(opt.step, static_argnums=0, donate_argnums=(1, 2))
        for _ in range(steps):
            params, state, info = step(loss, params, state, X)
            log.append(params, state, info)
    return params, state


def assert_same_bits(found, expected):
    def check(x, y):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

    jax.tree.map(check, found, expected)
