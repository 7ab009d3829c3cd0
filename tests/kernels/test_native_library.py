"""The native library where it was not built, cannot be loaded, or is asked for what it has not."""

import ctypes
import functools
import importlib.machinery
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_lowbit
from optax_lowbit.kernels.cpu import library, ops

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def found(monkeypatch):
    """Makes another file, or None, the library that is found; it is looked for once more."""

    def find(origin):
        spec = origin and importlib.machinery.ModuleSpec("_native", None, origin=str(origin))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        monkeypatch.setattr(ops, "library", functools.cache(library.library.__wrapped__))

    return find


def assert_reference_after_one_warning(cause):
    params = jnp.asarray(np.random.default_rng(0).normal(size=(64, 256)), jnp.float32)
    results = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for backend in ("auto", "reference"):
            tx = optax_lowbit.sgd4bit(0.1, momentum=0.9, backend=backend)
            state = tx.init(params)
            results.append([tx.update(params, state, params) for _ in range(2)])
    jax.tree.map(np.testing.assert_array_equal, *results)
    (warning,) = caught
    assert "goes without its native CPU kernels" in str(warning.message)
    assert cause in str(warning.message)
    tx = optax_lowbit.sgd4bit(0.1, momentum=0.9)
    (kernel,) = optax_lowbit.describe(tx, params).kernels
    assert (kernel.backend, kernel.reason) == ("reference", "no native library that loads")
    with pytest.raises(ValueError, match=r"backend='cpu' cannot take .* no native library"):
        optax_lowbit.sgd4bit(0.1, momentum=0.9, backend="cpu").init(params)


def test_a_library_that_was_not_built_is_one_warning(found):
    found(None)
    assert_reference_after_one_warning("they were not built")


def test_a_library_that_is_none_is_one_warning(found, tmp_path):
    path = tmp_path / "_native.so"
    path.write_bytes(b"no library")
    found(path)
    assert_reference_after_one_warning(f"{path} does not load: OSError")


def test_a_library_without_the_handlers_is_one_warning(found):
    found(np.random.bit_generator.__file__)
    assert_reference_after_one_warning("does not load: AttributeError")


def test_a_library_of_another_version_of_xla_is_one_warning(found, monkeypatch):
    """Handlers that do not tell their version, as they are asked to when they are registered."""
    silent = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda frame: None)
    found("other.so")
    monkeypatch.setattr(ctypes, "CDLL", lambda path: path)
    monkeypatch.setattr(library, "getattr", lambda native, symbol: silent, raising=False)
    names = {f"{name}_of_another_version": s for name, s in library._HANDLERS.items()}
    monkeypatch.setattr(library, "_HANDLERS", names)
    assert_reference_after_one_warning("other.so does not load: JaxRuntimeError: INVALID")


@pytest.mark.parametrize("target", ["sse4", "AVX2", ""])
def test_unknown_instruction_sets_are_refused(target, monkeypatch):
    """The library would run its slowest kernels."""
    monkeypatch.setenv("LOWBIT_CPU_TARGET", target)
    monkeypatch.setattr(ops, "library", functools.cache(library.library.__wrapped__))
    message = (
        f"LOWBIT_CPU_TARGET must be one of ('avx512', 'avx2', 'generic') or unset, got {target!r}"
    )
    with pytest.raises(ValueError) as caught:
        optax_lowbit.adamw4bit(1e-3).init(jnp.ones((64, 256)))
    assert str(caught.value) == message


def test_without_a_compiler_the_package_is_built_without_the_library(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    fails = shutil.which("false")
    done = subprocess.run(
        [
            *(sys.executable, "setup.py", "-q", "build_ext"),
            *("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")),
        ],
        cwd=REPOSITORY, env={**os.environ, "CC": fails, "CXX": fails},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "optional" in done.stderr or "failed" in done.stderr
    assert not list(tmp_path.rglob("*.so"))
