"""The Triton kernels lowered for CUDA, and compiled for an H100 (sm_90) where no GPU is at hand.

Lowering needs nothing. Compiling needs the CUDA wheels of the jax at hand: jax-cuda12-plugin,
jax-cuda12-pjrt and nvidia-{cuda-nvcc,cuda-runtime,cuda-cupti,cuda-nvrtc,nvjitlink}-cu12. It happens
in a process of its own, this file as a program, as JAX may start its CUDA plugin only there.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from optax_lowbit.kernels import pallas_gpu
from optax_lowbit.kernels.adam import Coefficients
from optax_lowbit.kernels.parameters import Descent
from optax_lowbit.kernels.quantized_matrix import NF4
from optax_lowbit.memory.targets import H100
from optax_lowbit.moments.presets import (
    FIRST_MOMENT_4BIT,
    FIRST_MOMENT_8BIT,
    SECOND_MOMENT_4BIT,
    SECOND_MOMENT_8BIT,
)
from optax_lowbit.quant import QuantSpec, is_quantized
from optax_lowbit.quant.array import abstract_quantized

SECOND_MOMENT_BLOCKS = QuantSpec(codebook="linear", bits=4, signed=False, scaling="block")
# Two programs of eight warps, or four of four, share the 65536 registers of a multiprocessor.
MOST_REGISTERS = 128


class Program(NamedTuple):
    function: Any
    args: tuple[Any, ...]
    donated: tuple[int, ...]
    # Bytes of temporaries: the coefficients in one array, and a rank-1 moment's partial maxima.
    most_temporaries: int = 512


def floats(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def both_passes(grad, mu, nu, c, params, rates):
    descent = None if params is None else Descent(params, *rates)
    nu_scales = None
    if is_quantized(nu) and isinstance(nu.scales, tuple):
        nu_scales = pallas_gpu.adam_rank1_maxima(grad, nu, c)
    return pallas_gpu.adam(grad, mu, nu, c, nu_scales=nu_scales, descent=descent)


def adam(shape, mu_spec, nu_spec, dtype=jnp.float32, params=None, most_temporaries=512):
    scalar = floats(())
    mu = abstract_quantized(shape, jnp.float32, mu_spec)
    nu = floats((*shape[:-1], 1)), floats((*shape[:-2], 1, shape[-1]))
    if nu_spec is not None:
        nu = abstract_quantized(shape, jnp.float32, nu_spec)
    params = None if params is None else floats(shape, params)
    args = floats(shape, dtype), mu, nu, Coefficients(*[scalar] * 9), params, (scalar, scalar)
    donated = (0, 1, 2) if params is None else (1, 2, 4)
    return Program(both_passes, args, donated, most_temporaries)


def momentum(shape, spec, **options):
    trace = abstract_quantized(shape, jnp.float32, spec)
    function = functools.partial(pallas_gpu.momentum, **options)
    return Program(function, (floats(shape), trace, floats(())), (0, 1))


def product(batch, shape, *, is_transposed):
    rows = abstract_quantized(shape, jnp.float32, dataclasses.replace(NF4, double_quant=False))
    x = floats((batch, shape[0] if is_transposed else shape[1]), jnp.bfloat16)
    function = functools.partial(pallas_gpu.quantized_dot, is_transposed=is_transposed)
    return Program(function, (x, rows), ())


def programs():
    four, eight = FIRST_MOMENT_4BIT, FIRST_MOMENT_8BIT
    square, odd, vector = (2048, 2048), (3, 500, 1001), (100_001,)
    quantized = abstract_quantized(square, jnp.bfloat16, four)
    return {
        "adam-blocks": adam(square, four, SECOND_MOMENT_BLOCKS),
        "adam-blocks-odd": adam(odd, four, SECOND_MOMENT_BLOCKS, jnp.bfloat16),
        "adam-blocks-vector": adam(vector, four, SECOND_MOMENT_4BIT, params=jnp.float32),
        "adam-rank1": adam(square, four, SECOND_MOMENT_4BIT, most_temporaries=2**20),
        "adam-rank1-odd": adam(odd, four, SECOND_MOMENT_4BIT, most_temporaries=2**20),
        "adam-rank1-descent": adam(
            square, four, SECOND_MOMENT_4BIT, jnp.bfloat16, jnp.bfloat16, most_temporaries=2**20
        ),
        "adam-factored": adam(square, four, None),
        "adam-8bit": adam(square, eight, SECOND_MOMENT_8BIT),
        "adam-8bit-odd": adam(odd, eight, SECOND_MOMENT_8BIT),
        "momentum": momentum(square, four, nesterov=True),
        "momentum-8bit": momentum(odd, eight, nesterov=False),
        "quantize": Program(
            functools.partial(pallas_gpu.quantize, spec=four), (floats(square),), ()
        ),
        "dequantize": Program(pallas_gpu.dequantize, (quantized,), ()),
        "quantized_dot": product(2048, (4096, 4096), is_transposed=False),
        "quantized_dot-transposed": product(2048, (4096, 4096), is_transposed=True),
        "quantized_dot-odd": product(7, (25, 192), is_transposed=False),
        "quantized_dot-odd-transposed": product(7, (25, 192), is_transposed=True),
    }


def jitted(program):
    return jax.jit(program.function, donate_argnums=program.donated)


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


# --- compiled ---


def compile_all(folder: pathlib.Path) -> dict[str, Any]:
    """What the compiler says about each program; its dumps go to ``folder``."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=H100.read_text(), topology="1x1x1"
    )
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    found = {}
    for name, program in programs().items():
        args = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), program.args
        )
        dumps = folder / name
        lowered = jitted(program).trace(*args).lower(lowering_platforms=("cuda",))
        compiled = lowered.compile(compiler_options={"xla_dump_to": str(dumps)})
        memory = compiled.memory_analysis()
        found[name] = {
            "temporaries": memory.temp_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "kernels": [usage for ptx in dumps.glob("*.ptx") for usage in assembled(ptx)],
        }
    return found


def assembled(ptx: pathlib.Path) -> list[dict[str, Any]]:
    """Name, registers and bytes spilled of the kernels in a file; some hold constants only."""
    if ".entry" not in ptx.read_text():
        return []
    command = [ptxas(), "-v", "-arch=sm_90a", str(ptx), "-o", os.devnull]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    pattern = r"Function properties for (\w+)\n.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    return [
        {"name": name, "spilled": int(spilled), "registers": int(registers)}
        for name, spilled, registers in re.findall(pattern, report, re.DOTALL)
    ]


def ptxas() -> str:
    """The assembler in the wheel nvidia-cuda-nvcc-cu12."""
    spec = importlib.util.find_spec("nvidia.cuda_nvcc")
    assert spec is not None and spec.submodule_search_locations is not None
    return str(pathlib.Path(spec.submodule_search_locations[0]) / "bin" / "ptxas")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    for module in ("jax_plugins.xla_cuda12", "jax_cuda12_plugin", "nvidia.cuda_nvcc"):
        try:
            missing = importlib.util.find_spec(module) is None
        except ModuleNotFoundError:
            missing = True
        if missing:
            pytest.skip(f"no {module}: the wheels to compile for a GPU are not installed")
    environment = {**os.environ, "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    environment.pop("JAX_PLATFORMS", None)
    folder = tmp_path_factory.mktemp("compiled")
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


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


if __name__ == "__main__":
    output = pathlib.Path(sys.argv[1])
    (output / "found.json").write_text(json.dumps(compile_all(output), indent=1))
