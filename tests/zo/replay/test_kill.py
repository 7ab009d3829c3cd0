"""A run that is killed loses at most the step in flight, and goes on from its log."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import warnings

import numpy as np

from optax_lowbit import zo
from tests.zo.replay.test_log import made_up

ROOT = pathlib.Path(__file__).resolve().parents[3]
KILLS = 8

# Imports and compiles once, and forks one run after the other. A run makes its records up, and
# writes down, in place, how many steps the log was given.
RUNS = """
import os, sys, warnings
from optax_lowbit import zo
from tests.zo.replay.test_log import BASE, OPT, made_up

path, told = sys.argv[1:]
state = OPT.init(BASE, 7)
for line in sys.stdin:
    with zo.replay.Writer(path, OPT, BASE, state) as log, open(told, "r+b", 0) as file:
        child = os.fork()
        while not child:
            info = zo.StepInfo(None, None, made_up(log.steps), None)
            log.append(BASE, state._replace(count=log.steps + 1), info)
            os.pwrite(file.fileno(), b"%10d" % log.steps, 0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("killed", flush=True)
"""


def test_kills_lose_no_step_that_the_log_was_given(tmp_path):
    random.seed(0)
    path, told = tmp_path / "log", tmp_path / "told"
    told.write_bytes(b"%10d" % 0)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", RUNS, str(path), str(told)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdin and process.stdout
    before = 0
    for _ in range(KILLS):
        process.stdin.write("\n")
        process.stdin.flush()
        child = int(process.stdout.readline())
        while int(told.read_bytes()) < before + 2:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert process.stdout.readline() == "killed\n"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a torn record, if one is
            log = zo.replay.read(path)
        assert before + 2 <= int(told.read_bytes()) <= log.steps <= int(told.read_bytes()) + 1
        np.testing.assert_array_equal(log.records, [made_up(step) for step in range(log.steps)])
        before = log.steps
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    process.stdout.close()
