"""The native library: found, registered with JAX, and missed with one warning."""

import ctypes
import functools
import importlib.util
import warnings

import jax

# Handlers in native/handlers.cc by the names of their custom calls.
_HANDLERS = {
    "optax_lowbit_step": "LowbitStep",
    "optax_lowbit_rank1_maxima": "LowbitRank1Maxima",
    "optax_lowbit_square_sums": "LowbitSquareSums",
    "optax_lowbit_quantize": "LowbitQuantize",
    "optax_lowbit_dequantize": "LowbitDequantize",
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library with its custom calls registered; None, after a warning, if it was not built."""
    spec = importlib.util.find_spec("optax_lowbit.kernels.cpu._native")
    if spec is None or spec.origin is None:
        warnings.warn(
            "optax_lowbit was installed without its native CPU kernels, as no C++ compiler was "
            "found; steps on a CPU are several times slower. Reinstall it with one (g++ or clang).",
            stacklevel=2,
        )
        return None
    native = ctypes.CDLL(spec.origin)
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
