"""Adapters as PEFT has them, to write and to read."""

import numpy as np

from optax_lowbit import qlora


def pair(rank=2, n=6, m=4, seed=0, **more):
    rng = np.random.default_rng(seed)
    arrays = {"a": rng.random((rank, n), np.float32), "b": rng.random((rank, m), np.float32)}
    return arrays | more


def write(folder, matrices, others=None, **config):
    config = qlora.AdapterConfig(**{"r": 2, **config})
    adapter = qlora.Adapter(config=config, matrices=matrices, others=others or {})
    qlora.write_adapter(folder, adapter)
    return adapter
