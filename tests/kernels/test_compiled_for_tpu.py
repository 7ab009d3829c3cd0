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


def report_of(generation):
    """For each case of `compile_for_tpu.py`: bytes, aliases and kernels of the program."""
    script = pathlib.Path(__file__).with_name("compile_for_tpu.py")
    process = subprocess.run(
        [sys.executable, script, TOPOLOGIES[generation]],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_kernels_compile_write_in_place_and_need_no_temporaries(generation):
    report = report_of(generation)

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
    # One moment in float32 at the least, were XLA left to itself.
    assert report["plain"]["temporaries"] >= 4 * ELEMENTS
