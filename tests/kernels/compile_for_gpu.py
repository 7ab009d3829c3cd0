"""Compiles the Triton kernels for an H100 (sm_90), of which none is needed: a program, no test.

Prints what they take of a multiprocessor as a table in Markdown, or with the argument `json` all
that the compiler says, in one line. Needs the CUDA wheels of the jax at hand: jax-cuda12-plugin,
jax-cuda12-pjrt and nvidia-{cuda-nvcc,cuda-runtime,cuda-cupti,cuda-nvrtc,nvjitlink}-cu12.
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
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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


def compile_all() -> dict[str, Any]:
    """What the compiler says about each program."""
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
        lowered = jitted(program).trace(*args).lower(lowering_platforms=("cuda",))
        with tempfile.TemporaryDirectory() as dumps:
            compiled = lowered.compile(compiler_options={"xla_dump_to": dumps})
            kernels = usage(pathlib.Path(dumps))
        memory = compiled.memory_analysis()
        found[name] = {
            "temporaries": memory.temp_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "kernels": kernels,
        }
    return found


def usage(dumps: pathlib.Path) -> list[dict[str, Any]]:
    """Of each kernel its name, registers, bytes spilled, threads, and bytes of shared memory."""
    (launches,) = dumps.glob("*.thunk_sequence.txt")
    pattern = r"(\w+) grid: \[[\d, ]+\] threads: \[(\d+), 1, 1\] +shared_memory: (\d+) bytes"
    launched = {
        name: {"threads": int(threads), "shared": int(shared)}
        for name, threads, shared in re.findall(pattern, launches.read_text())
    }
    assembled = [kernel for ptx in dumps.glob("*.ptx") for kernel in assembled_kernels(ptx)]
    return [{**kernel, **launched[kernel["name"]]} for kernel in assembled]


def assembled_kernels(ptx: pathlib.Path) -> list[dict[str, Any]]:
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


def table(found: dict[str, Any]) -> str:
    """Our own kernels; those that XLA makes around them have other names."""
    lines = [
        "| program | kernel | threads | registers | bytes spilled | shared memory, bytes |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for program, report in found.items():
        for kernel in sorted(report["kernels"], key=lambda kernel: kernel["name"], reverse=True):
            if kernel["name"].startswith("_"):
                numbers = (kernel[key] for key in ("threads", "registers", "spilled", "shared"))
                cells = f"`{program}`", f"`{kernel['name']}`", *(f"{x:,}" for x in numbers)
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    # Before JAX starts its backends: that no GPU is at hand is no reason to stop.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    jax.config.update("jax_platforms", None)
    report = compile_all()
    print(json.dumps(report) if sys.argv[1:] == ["json"] else table(report))
