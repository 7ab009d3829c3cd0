"""A loss that is computed without any rounding at first, so no order of sums changes it."""

import jax.numpy as jnp
import numpy as np

from optax_lowbit import zo

OPT = zo.zo_sgd(2**-6, eps=1 / 8, num_probes=4, weight_decay=0.1)
COLUMNS = 36  # over four devices: 9, no multiple of the 32 signs of a word


def exact_case():
    """Parameters and a batch on the host: multiples of 1/8, and -1, 0 and 1."""
    rng = np.random.default_rng(0)
    params = {
        "kernel": (rng.integers(-4, 5, (8, COLUMNS)) / 8).astype(np.float32),
        "bias": (rng.integers(-4, 5, COLUMNS) / 8).astype(np.float32),
    }
    return params, rng.integers(-1, 2, (8, 8)).astype(np.float32)


def loss(params, x):
    """Of 23 bits, as long as parameters are multiples of 1/8 of at most 5/8."""
    hidden = x @ params["kernel"] + params["bias"][None]
    return jnp.sum(hidden**2) / (x.shape[0] * 32)
