"""Strict JAX settings for all tests, eight virtual CPU devices, and where data is found."""

import os
import pathlib
import sys

# Before JAX starts its backends: no look-out for accelerators, eight CPU devices.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))


@pytest.fixture(scope="session")
def golden():
    """Loads `tests/golden/NAME.npz` as a dict of arrays."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(REPOSITORY / "tests" / "golden" / f"{name}.npz") as archive:
            return dict(archive)

    return load


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path:
    """The folder of real models and texts beside the checkout, which most tests do without."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared folder with models and texts beside the checkout")
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
