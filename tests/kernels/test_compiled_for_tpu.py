"""The kernels compiled for TPUs, ahead of time, by libtpu: no TPU is needed, and nothing is run."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.tpu_compiler import ENVIRONMENT

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
ELEMENTS = 4096 * 4096
# Seen on a v5p, for leaves of any size; why is not known.
RESERVED = {"v5p": 2**19}


def report_of(script, *arguments, flags=""):
    """What a program beside this file prints, with flags for libtpu."""
    process = subprocess.run(
        [sys.executable, pathlib.Path(__file__).with_name(script), *arguments],
        env={**os.environ, **ENVIRONMENT, "LIBTPU_INIT_ARGS": flags},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_kernels_compile_write_in_place_and_need_no_temporaries(generation):
    # For each case: bytes, aliases and kernels of the program.
    report = report_of("compile_for_tpu.py", TOPOLOGIES[generation])

    # An update or new parameters, and for each low-bit moment codes and scales, of which rank-1
    # scales are two. Every one of them lies where its predecessor did.
    buffers = {
        "block": 5, "rank1": 6, "8 bits": 5, "descent": 6, "ragged": 6,
        "ragged 8 bits": 5, "blocks of 256": 5, "few rows": 5, "vector": 5, "momentum": 3,
    }  # fmt: skip
    for case, count in buffers.items():
        assert report[case]["aliases"] == count, case
        # Beside the results there is only the tuple that holds them.
        assert report[case]["outputs"] - report[case]["aliased"] <= 1024, case

    # Rank-1 scales are a first pass, and a vector has a last row of its own.
    two = {"rank1", "descent", "ragged", "vector"}
    kernels = {case: program["kernels"] for case, program in report.items()}
    assert kernels == {case: 2 if case in two else int(case != "plain") for case in report}

    for case in ("block", "rank1", "factored", "8 bits", "momentum", "descent"):
        assert report[case]["temporaries"] <= RESERVED.get(generation, 0), case
    for case in [case for case in report if case.startswith("product")]:
        # For a v5p the scales, of blocks of 128, are copied where four of them are a tile.
        copied = 4 * 4096 * 11008 // 128 if generation == "v5p" and "float32" in case else 0
        assert report[case]["temporaries"] <= copied, case
    # One moment in float32 at the least, were XLA left to itself.
    assert report["plain"]["temporaries"] >= 4 * ELEMENTS


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(
    ("batch", "flags"),
    # What is in the fast memory is not counted: of small activations that is most. See the program.
    [("8192", ""), ("2048", "--xla_vf_vmem_memory_space_assignment=false")],
    ids=["8192 rows", "2048 rows, no fast memory"],
)
def test_a_step_on_adapters_keeps_no_dequantized_matrix(batch, flags):
    sizes = "6", "4096", batch  # layers, width
    found = report_of("compile_products_for_memory.py", "v5e:2x2", *sizes, flags=flags)
    for model, bytes_of in found.items():
        most = 1.1 * bytes_of["plain LoRA"] + 2 * 4096**2  # and a layer in bfloat16
        assert bytes_of["by kernels"] <= most, model
        if "checkpointed" not in model:
            # Written with `dequantize`, matrices are kept for the backward pass.
            assert bytes_of["naive"] > most, model
