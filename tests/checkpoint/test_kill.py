"""A process killed while it saves leaves the checkpoints before it whole, and found as before."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from optax_lowbit import QuantizedArray, QuantSpec, checkpoint
from tests.optimizers.cases import assert_bit_equal

ROOT = pathlib.Path(__file__).resolve().parents[2]
KILLS = 20

# Imports once, and forks one saver after the other: a kill then costs no imports.
SAVERS = """
import itertools, os, pathlib, sys
import orbax.checkpoint as ocp
from optax_lowbit import checkpoint
from tests.checkpoint.test_kill import state_at

def save_forever(folder, kind):
    first = 1 + max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0)
    if kind == "alone":
        for step in itertools.count(first):
            checkpoint.save(folder / str(step), state_at(step))
    options = ocp.CheckpointManagerOptions(max_to_keep=3)
    with ocp.CheckpointManager(folder, options=options) as manager:
        for step in itertools.count(first):
            manager.save(step, args=checkpoint.save_args(state_at(step)))

for line in sys.stdin:
    child = os.fork()
    if not child:
        folder, kind = line.split()
        save_forever(pathlib.Path(folder), kind)
    print(child, flush=True)
    os.waitpid(child, 0)
"""


def state_at(step):
    """A state that is known from its step."""
    rng = np.random.default_rng(step)
    spec = QuantSpec(codebook="linear", bits=8, signed=True, scaling="row")
    codes: Any = rng.integers(0, 256, (256, 512), np.uint8)
    moment = QuantizedArray(codes, rng.random((256, 1), np.float32), spec, 0, np.dtype(np.float32))
    return {"mu": moment, "params": rng.random((256, 512), np.float32), "step": step}


def steps_in(folder):
    return {int(path.name) for path in folder.iterdir() if path.name.isdigit()}


def in_progress(folder):
    return {path.name for path in folder.iterdir() if not path.name.isdigit()}


def wait_for(condition, timeout=60):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def savers():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SAVERS],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env=environment,
    )  # fmt: skip
    yield process
    process.stdin.close()
    process.wait(timeout=30)
    process.stdout.close()


def test_kills_leave_the_latest_checkpoint_whole(savers, tmp_path):
    """Half of the savers use `save`, half an asynchronous manager that also deletes."""
    random.seed(0)
    folders = {kind: tmp_path / kind for kind in ("alone", "manager")}
    for folder in folders.values():
        folder.mkdir()
    like = state_at(0)
    hits = 0
    for kill in range(KILLS):
        kind = ("alone", "manager")[kill % 2]
        folder = folders[kind]
        before, left_over = steps_in(folder), in_progress(folder)
        savers.stdin.write(f"{folder} {kind}\n")
        savers.stdin.flush()
        child = int(savers.stdout.readline())
        # One save at least; then at any moment of those that follow.
        wait_for(lambda folder=folder, before=before: steps_in(folder) - before)
        time.sleep(random.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        wait_for(lambda child=child: not is_alive(child))
        hits += bool(in_progress(folder) - left_over)
        assert set(ocp.utils.checkpoint_steps(folder)) == steps_in(folder)
        latest = max(steps_in(folder))
        assert latest > max(before, default=0)
        assert_bit_equal(checkpoint.restore(folder / str(latest), like), state_at(latest))
    assert hits >= 5


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
