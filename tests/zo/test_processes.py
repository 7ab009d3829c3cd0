"""Steps of two processes over gloo are those of one, and so is their log."""

import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit import zo
from tests.zo import worker
from tests.zo.exact import OPT, exact_case

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_two_processes_have_the_bits_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.zo.worker", str(rank), str(port), tmp_path],
            cwd=ROOT, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(worker.PROCESSES)
    ]  # fmt: skip
    try:
        for process in processes:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    base = jax.tree.map(jnp.asarray, exact_case()[0])
    # One process replays the log of two.
    params = zo.replay.apply(base, tmp_path / "log", OPT)
    with np.load(tmp_path / "result.npz") as found:
        for name in base:
            assert found[name].tobytes() == np.asarray(params[name]).tobytes()
            assert np.mean(found[name] != base[name]) > 0.9
    # And makes the first step of it: that loss is exact.
    info = jax.jit(OPT.estimate, static_argnums=0)(
        worker.loss, base, OPT.init(base, 3), exact_case()[1]
    )
    np.testing.assert_array_equal(info.record, zo.replay.read(tmp_path / "log").records[0])
