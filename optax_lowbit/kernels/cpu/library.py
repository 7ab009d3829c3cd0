"""The native library: found, registered with JAX, or missed with one warning."""

import ctypes
import functools
import importlib.util
import os
import warnings

import jax
import jax.extend.backend

# Handlers in native/handlers.cc by the names of their custom calls.
_HANDLERS = {
    "optax_lowbit_step": "LowbitStep",
    "optax_lowbit_rank1_maxima": "LowbitRank1Maxima",
    "optax_lowbit_square_sums": "LowbitSquareSums",
    "optax_lowbit_quantize": "LowbitQuantize",
    "optax_lowbit_dequantize": "LowbitDequantize",
}
# What native/targets.cc is compiled for.
_TARGETS = ("avx512", "avx2", "generic")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library with its custom calls registered; None, after a warning, if none can be.

    Raises:
      ValueError: If the environment variable ``LOWBIT_CPU_TARGET`` is none of its values.
    """
    _check_target()
    spec = importlib.util.find_spec("optax_lowbit.kernels.cpu._native")
    cause = "they were not built when it was installed"
    if spec is not None and spec.origin is not None:
        try:
            return _registered(ctypes.CDLL(spec.origin))
        # No such file format, no such symbol, or another version of XLA's foreign functions.
        except (OSError, AttributeError, RuntimeError, ValueError) as error:
            cause = f"{spec.origin} does not load: {type(error).__name__}: {error}"
    warnings.warn(
        "optax_lowbit goes without its native CPU kernels, and steps on a CPU are several times "
        f"slower: {cause}. Reinstall it, with a C++ compiler (g++ or clang), beside the JAX that "
        "it is to run with; `pip install -v` shows what goes wrong.",
        stacklevel=2,
    )
    return None


def _check_target() -> None:
    target = os.environ.get("LOWBIT_CPU_TARGET")
    if target is not None and target not in _TARGETS:
        raise ValueError(f"LOWBIT_CPU_TARGET must be one of {_TARGETS} or unset, got {target!r}")


def _registered(native: ctypes.CDLL) -> ctypes.CDLL:
    jax.extend.backend.backends()  # Until there are some, handlers are noted, and not checked.
    for name, symbol in _HANDLERS.items():
        capsule = jax.ffi.pycapsule(getattr(native, symbol))
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    return native


def target_name() -> str | None:
    """The instruction set that the kernels were compiled for and use here: ``"avx512"``, say."""
    native = library()
    if native is None:
        return None
    native.lowbit_target.restype = ctypes.c_char_p
    return native.lowbit_target().decode()
