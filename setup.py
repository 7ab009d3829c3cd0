"""The native CPU kernels: built where there is a C++ compiler, left out where there is none."""

import pathlib

from setuptools import Extension, setup

NATIVE = pathlib.Path("optax_lowbit/kernels/cpu/native")
# -O3 whatever the interpreter was built with; -w: the warnings are GCC's own headers'. A root that
# sets errno is a call for each element.
FLAGS = ["-O3", "-g0", "-std=c++17", "-w", "-fno-math-errno"]


def extensions() -> list[Extension]:
    """The extension, or nothing where the headers of XLA's foreign functions are missing."""
    try:
        import jax.ffi
    except ImportError:
        return []
    return [
        Extension(
            "optax_lowbit.kernels.cpu._native",
            sources=[str(NATIVE / "targets.cc"), str(NATIVE / "handlers.cc")],
            depends=[str(path) for path in [*NATIVE.glob("*.h"), *NATIVE.glob("*.inc")]],
            include_dirs=[jax.ffi.include_dir()],
            extra_compile_args=FLAGS,
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=extensions())
