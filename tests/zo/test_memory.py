"""What a zeroth-order step needs beside the loss, as the compiler counts it."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.tpu_compiler import ENVIRONMENT
from tests.zo.compile_for_memory import OPTIMIZERS, report


@pytest.mark.slow
def test_no_direction_and_no_perturbed_tree_is_held():
    names = [name for name in OPTIMIZERS if name != "forward gradient"]
    shares = report(OPTIMIZERS)
    # A layer is 1/24 = 0.042 of the parameters.
    for model in ("unrolled", "scanned"):
        assert max(shares[f"{model}, {name}"] for name in names) <= 0.15
        assert shares[f"{model}, forward gradient"] <= 0.35
    # The measure sees it where they are.
    assert shares["unrolled, perturbed tree"] > 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_compiled_for_a_tpu():
    script = pathlib.Path(__file__).with_name("compile_for_memory.py")
    process = subprocess.run(
        [sys.executable, script, "v5e:2x2"],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    shares = json.loads(process.stdout.splitlines()[-1])
    within = {name: share for name, share in shares.items() if "perturbed" not in name}
    assert max(within.values()) <= 0.15
