"""A replay gives the bits of the run, state and all, for every method that can be replayed.

Each under schedules and with weight decay, where it takes them, so that all of a record is used.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_lowbit import Policy, QuantSpec, dequantize, quantize, zo
from optax_lowbit.quant import is_quantized
from tests.zo.replay.runs import assert_same_bits

STEPS = 3
POLICY = Policy(min_size=100)
NF4 = QuantSpec(codebook="nf4", bits=4, signed=True, scaling="block", block_size=16)
HESSIAN = QuantSpec(
    codebook="linear", bits=8, signed=False, scaling="block", block_size=16, rounding="stochastic"
)


def rate(count):
    """Not a number that float32 has."""
    return 0.03 - 0.007 * count


def probes(count):
    """One more in each step."""
    return count + 1


DECAY = {"weight_decay": 0.3, "weight_decay_mask": "kernel"}
# Every rule and every noise, once.
METHODS = {
    "sgd": lambda: zo.zo_sgd(rate, 0.1, 3, active_probes=probes, clip=0.5, **DECAY),
    "momentum": lambda: zo.zo_sgd_momentum(
        rate, 0.1, noise=zo.RandomMask(zo.Rademacher(), 0.5, 2), policy=POLICY, **DECAY
    ),
    "adam of signs": lambda: zo.zo_adam(rate, 0.1, policy=POLICY, **DECAY),
    "adam": lambda: zo.zo_adam(rate, 0.1, 2, noise=zo.Gaussian(), policy=POLICY, **DECAY),
    "sign": lambda: zo.zo_sgd_sign(rate, 0.1, noise=zo.Sphere(), estimator=zo.OneSided(), **DECAY),
    "scalar sign": lambda: zo.zo_sgd_scalar_sign(
        rate, 0.1, noise=zo.MagnitudeMask(zo.Gaussian(), 0.5, 2), **DECAY
    ),
    "conservative": lambda: zo.zo_sgd_conservative(rate, 0.1),
    "forward gradient": lambda: zo.forward_grad(rate, noise=zo.Subspace(2, 2), **DECAY),
    "fzoo": lambda: zo.fzoo(rate, 0.1, 3, active_probes=probes, **DECAY),
    "lozo": lambda: zo.lozo(rate, 0.1, 3, interval=2, active_probes=probes, **DECAY),
    "lozo with momentum": lambda: zo.lozo(rate, 0.1, interval=2, momentum=0.9, **DECAY),
    "hizoo": lambda: zo.hizoo(
        rate, 0.1, 3, smoothing=lambda count: 0.3 / (count + 1), active_probes=probes, **DECAY
    ),
    "hizoo in 8 bits": lambda: zo.hizoo(
        rate, 0.1, curvature="difference", hessian_spec=HESSIAN, policy=POLICY, **DECAY
    ),
    "blocks in turn": lambda: zo.blockwise(
        zo.zo_adam(rate, 0.1, policy=POLICY, **DECAY), ["bias", "kernel"]
    ),
    "blocks at once": lambda: zo.blockwise(
        zo.zo_sgd(rate, 0.1, 2, **DECAY), lambda path: path, simultaneous=True
    ),
    "injected": lambda: zo.inject_hyperparams(zo.zo_adam)(
        optax.cosine_decay_schedule(0.03, 10), 0.1, policy=POLICY, **DECAY
    ),
    "injected blocks": lambda: zo.inject_hyperparams(
        lambda learning_rate: zo.blockwise(zo.zo_sgd(learning_rate, 0.1, **DECAY), lambda p: p)
    )(rate),
}
# Of parameters in few bits.
OF_CODES = {
    "scales": lambda: zo.qzo(rate, 0.1, weight_decay=0.3),
    "grid": lambda: zo.zo_sgd_grid(lambda count: 3e3 * rate(count), 0.5),
}
# Whose updates have functions in them that no log can say.
NEEDS_OPTIMIZER = {
    **dict.fromkeys(["sgd", "fzoo", "lozo", "hizoo"], r"function .*\.probes"),
    **dict.fromkeys(["injected", "injected blocks"], "hyperparameters"),
}


def floats():
    rng = np.random.default_rng(1)
    kernel, bias = rng.normal(size=(10, 36)), rng.normal(size=5)
    return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}


def loss(params, x):
    kernel = params["kernel"]
    kernel = dequantize(kernel) if is_quantized(kernel) else kernel
    return jnp.mean(jnp.tanh(x @ kernel)[:, :5] * params["bias"][None])


def logged(path, opt, base):
    """The run, whose hyperparameters are changed on the way if they are in its state."""
    params, state = base, opt.init(base, 7)
    step = jax.jit(opt.step, static_argnums=0)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 10)), jnp.float32)
    with zo.replay.Writer(path, opt, params, state) as log:
        for number in range(STEPS):
            params, state, info = step(loss, params, state, x)
            log.append(params, state, info)
            if number == 1 and "b1" in getattr(state, "hyperparams", ()):
                state.hyperparams.update(b1=jnp.float32(0.7), weight_decay=jnp.float32(0.9))
    return params, state


@pytest.mark.parametrize("name", [*METHODS, *OF_CODES])
def test_replay_has_the_bits_of_the_run(name, tmp_path):
    opt, base = {**METHODS, **OF_CODES}[name](), floats()
    if name in OF_CODES:
        base["kernel"] = quantize(base["kernel"], NF4)
    params, state = logged(tmp_path / "log", opt, base)
    found = zo.replay.resume(base, opt.init(base, 7), tmp_path / "log", opt)
    assert_same_bits(found, (params, state))
    pairs = zip(*map(jax.tree.leaves, (params, base)), strict=True)
    assert any(not np.array_equal(x, y) for x, y in pairs)
    if name in NEEDS_OPTIMIZER:
        with pytest.raises(ValueError, match=f"opt must be given: .*{NEEDS_OPTIMIZER[name]}"):
            zo.replay.apply(base, tmp_path / "log")
    else:
        assert_same_bits(zo.replay.apply(base, tmp_path / "log"), params)
