"""A step of a small model compiled for TPUs and GPUs that are not at hand, in other processes."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import dataclasses, json, sys
from optax_lowbit.memory.architectures import ARCHITECTURES
from optax_lowbit.memory.training import plan_training

# Small, with leaves that kernels take and leaves that they do not.
model = dataclasses.replace(
    ARCHITECTURES["smollm2-135m"], vocabulary=1024, width=512, layers=2, heads=4,
    key_value_heads=2, inner=1024,
)
target, devices = sys.argv[1], int(sys.argv[2])
plan = plan_training(
    model, "adamw4bit", dtype="bfloat16", devices=devices, batch=devices, length=128,
    target=target,
)
print(json.dumps([dataclasses.asdict(plan), plan.parameters.device + plan.state.device]))
"""


def installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


needs_libtpu = pytest.mark.skipif(not installed("libtpu"), reason="libtpu is not installed")
needs_cuda = pytest.mark.skipif(
    not installed("jax_plugins.xla_cuda12"), reason="jax's CUDA plugin is not installed"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "devices"),
    [
        pytest.param("tpu v5e", 1, marks=needs_libtpu),
        pytest.param("tpu v5e:2x2", 4, marks=needs_libtpu),
        pytest.param("h100", 1, marks=needs_cuda),
        pytest.param("h100:2", 2, marks=needs_cuda),
    ],
)
def test_step_with_kernels_of_the_target(target, devices):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, target, str(devices)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    plan, kept = json.loads(run.stdout.splitlines()[-1])
    step = plan["step"]
    assert (step["target"], step["devices"]) == (target, devices)
    # Layouts add to what is kept, and it is all written in place but for the loss.
    assert kept <= step["arguments"] <= 1.1 * kept + 10_000
    assert 0 <= step["outputs"] - step["aliased"] <= 10_000
