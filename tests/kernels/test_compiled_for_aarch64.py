"""The C++ kernels compiled for aarch64, with the flags of setup.py, where Zig is at hand.

The wheel `ziglang` has a Clang for any target: `pip install ziglang`.
"""

import importlib.util
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def the_extension(monkeypatch):
    """What setup.py would build."""
    setuptools = pytest.importorskip("setuptools", minversion="77")
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(REPOSITORY / "setup.py"))
    (extension,) = given["ext_modules"]
    return extension


def instructions(assembly):
    """Of each function, by its mangled name: pairs of an instruction and its operands."""
    functions, found = {}, None
    for line in assembly.splitlines():
        if label := re.match(r"(_Z\w+):", line):
            found = functions.setdefault(label[1], [])
        elif found is not None and (match := re.match(r"\s+([a-z]\w*)\s+(.*)", line)):
            found.append(match.groups())
    return functions


def test_steps_are_vector_code(monkeypatch, tmp_path):
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("no ziglang: the wheel with a compiler for aarch64 is not installed")
    extension = the_extension(monkeypatch)
    command = [
        *(sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu", "-fPIC", "-S"),
        *(f"-I{folder}" for folder in extension.include_dirs),
        *extension.extra_compile_args,
    ]
    for source in extension.sources:
        done = subprocess.run(
            [*command, source, "-o", str(tmp_path / pathlib.Path(source).with_suffix(".s").name)],
            cwd=REPOSITORY, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    functions = instructions((tmp_path / "targets.s").read_text())
    # Elements in the order of memory, blocks of 128: no second moment (0), in blocks (1), of
    # rank 1 (2), factored (3); updates (0) or parameters (1).
    steps = {
        kind: code
        for name, code in functions.items()
        for kind in re.findall(r"step_vectorsILNS_6SecondE(\dELb[01])ELb1ELi4ELl128E", name)
    }
    assert len(steps) == 8
    for kind, code in steps.items():
        vectors = [name for name, operands in code if re.match(r"v\d+\.4s", operands)]
        assert vectors.count("fmla") >= 16
        assert not any(name == "bl" for name, _ in code)
        roots = [operands for name, operands in code if name == "fsqrt"]
        assert len(roots) == 8 * (kind[0] != "0") == vectors.count("fsqrt")
