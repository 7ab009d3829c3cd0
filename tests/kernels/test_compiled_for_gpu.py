"""The Triton kernels lowered for CUDA, and compiled for an H100 (sm_90) where no GPU is at hand.

Lowering needs nothing. Compiling happens in a process of its own, compile_for_gpu.py, as JAX may
start its CUDA plugin only there; it says what that needs.
"""

import importlib.util
import json
import re
import subprocess
import sys

import jax
import pytest

from tests.kernels import compile_for_gpu
from tests.kernels.compile_for_gpu import jitted, programs

# Two programs of eight warps, or four of four, share the 65536 registers of a multiprocessor.
MOST_REGISTERS = 128


def donated_bytes(program):
    donated = [program.args[i] for i in program.donated]
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(donated))


@pytest.mark.parametrize("name", programs())
def test_lowered_for_cuda(name):
    program = programs()[name]
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="cuda")
    mesh = jax.sharding.AbstractMesh(
        (1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device
    )
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jitted(program).trace(*program.args).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    passes = 2 if "rank1" in name else 1
    assert len(re.findall(r"custom_call @__gpu\$xla\.gpu\.triton", text)) == passes
    # Every result of a step is written over an operand.
    calls = [line for line in text.splitlines() if "xla.gpu.triton" in line]
    results = calls[-1].split(") -> ")[-1].count("tensor<")
    aliases = calls[-1].count("output_operand_alias<")
    is_step = not name.startswith(("quantize", "dequantize"))
    assert aliases == (results if is_step else 0)


@pytest.fixture(scope="module")
def compiled():
    for module in ("jax_plugins.xla_cuda12", "jax_cuda12_plugin", "nvidia.cuda_nvcc"):
        try:
            missing = importlib.util.find_spec(module) is None
        except ModuleNotFoundError:
            missing = True
        if missing:
            pytest.skip(f"no {module}: the wheels to compile for a GPU are not installed")
    command = [sys.executable, compile_for_gpu.__file__, "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", programs())
def test_compiled_in_place_and_without_spills(compiled, name):
    program, found = programs()[name], compiled[name]
    assert found["temporaries"] <= program.most_temporaries
    assert found["aliased"] == donated_bytes(program)
    kernels = {usage["name"]: usage for usage in found["kernels"]}
    assert f"_{name.split('-')[0]}_kernel" in kernels
    for usage in kernels.values():
        assert usage["spilled"] == 0
        assert usage["registers"] <= MOST_REGISTERS
