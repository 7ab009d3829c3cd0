"""What a zeroth-order step needs beside the loss, as the compiler counts it."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.tpu_compiler import ENVIRONMENT
from tests.zo.compile_for_memory import OPTIMIZERS


def printed(environment, target):
    script = pathlib.Path(__file__).with_name("compile_for_memory.py")
    process = subprocess.run(
        [sys.executable, script, target],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
def test_no_direction_and_no_perturbed_tree_is_held():
    names = [name for name in OPTIMIZERS if name != "forward gradient"]
    # Where there are several devices, tiles are for each of them.
    environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    shares = printed(environment, "cpu")
    # A layer is 1/24 = 0.042 of the parameters.
    for model in ("unrolled", "scanned"):
        assert max(shares[f"{model}, {name}"] for name in names) <= 0.15
        assert shares[f"{model}, forward gradient"] <= 0.35
    # The measure sees it where they are.
    assert shares["unrolled, perturbed tree"] > 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_compiled_for_a_tpu():
    shares = printed({**os.environ, **ENVIRONMENT}, "v5e:2x2")
    within = {name: share for name, share in shares.items() if "perturbed" not in name}
    assert max(within.values()) <= 0.15
