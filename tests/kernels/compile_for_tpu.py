"""Compiles the kernels for the TPU topology given and prints a JSON report: a program, no test."""

import dataclasses
import functools
import json
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from optax_lowbit.kernels import pallas_tpu as kernels
from optax_lowbit.kernels.adam import Coefficients, adam_step
from optax_lowbit.kernels.quantized_matrix import NF4
from optax_lowbit.moments.presets import (
    FIRST_MOMENT_4BIT,
    FIRST_MOMENT_8BIT,
    SECOND_MOMENT_4BIT,
    SECOND_MOMENT_8BIT,
)
from optax_lowbit.quant import dequantize, quantize
from optax_lowbit.quant.array import abstract_quantized

BLOCKS = FIRST_MOMENT_4BIT, dataclasses.replace(SECOND_MOMENT_4BIT, scaling="block")
RANK1 = FIRST_MOMENT_4BIT, SECOND_MOMENT_4BIT
EIGHT = FIRST_MOMENT_8BIT, SECOND_MOMENT_8BIT
WIDE = tuple(dataclasses.replace(spec, block_size=256) for spec in BLOCKS)
LARGE = (4096, 4096)


class Descent(NamedTuple):
    params: Any
    learning_rate: Any
    weight_decay: Any


def floats(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def moment(shape, spec):
    return abstract_quantized(shape, jnp.float32, spec)


def adam_arguments(shape, specs, dtype=jnp.float32, params_dtype=None):
    mu_spec, nu_spec = specs
    if nu_spec is None:
        *lead, rows, columns = shape
        nu: Any = floats(*lead, rows, 1), floats(*lead, 1, columns)
    else:
        nu = moment(shape, nu_spec)
    coefficients = Coefficients(*[floats()] * len(Coefficients._fields))
    descent = None
    if params_dtype is not None:
        descent = Descent(floats(*shape, dtype=params_dtype), floats(), floats())
    return floats(*shape, dtype=dtype), moment(shape, mu_spec), nu, coefficients, descent


def adam(grad, mu, nu, c, descent):
    is_rank1 = isinstance(getattr(nu, "scales", None), tuple)
    scales = kernels.adam_rank1_maxima(grad, nu, c) if is_rank1 else None
    return kernels.adam(grad, mu, nu, c, nu_scales=scales, descent=descent)


def plain_adam(grad, mu, nu, c, descent):
    """The same step as XLA fuses it, without tiles: what the kernels are compared with."""
    del descent
    update, new_mu, new_nu = adam_step(grad, dequantize(mu), dequantize(nu), c)
    return update, quantize(new_mu, mu.spec), quantize(new_nu, nu.spec)


def momentum(grad, trace, decay):
    return kernels.momentum(grad, trace, decay, nesterov=True)


def momentum_arguments(shape, spec):
    return floats(*shape), moment(shape, spec), floats()


def product(batch, shape, dtype=jnp.bfloat16, block_size=64, is_transposed=False):
    spec = dataclasses.replace(NF4, block_size=block_size, double_quant=False)
    x = floats(batch, shape[0] if is_transposed else shape[1], dtype=dtype)
    kernel = functools.partial(kernels.quantized_dot, is_transposed=is_transposed)
    return kernel, (x, moment(shape, spec))


BFLOAT16 = {"dtype": jnp.bfloat16, "params_dtype": jnp.bfloat16}
CASES = {
    "block": (adam, adam_arguments(LARGE, BLOCKS)),
    "rank1": (adam, adam_arguments(LARGE, RANK1)),
    "factored": (adam, adam_arguments(LARGE, (FIRST_MOMENT_4BIT, None))),
    "8 bits": (adam, adam_arguments(LARGE, EIGHT)),
    "momentum": (momentum, momentum_arguments(LARGE, FIRST_MOMENT_4BIT)),
    "descent": (adam, adam_arguments(LARGE, RANK1, **BFLOAT16)),
    "ragged": (adam, adam_arguments((3, 1000, 1301), RANK1, dtype=jnp.bfloat16)),
    "ragged 8 bits": (adam, adam_arguments((1000, 2301), EIGHT)),
    "blocks of 256": (adam, adam_arguments((40, 4173), WIDE)),
    "few rows": (adam, adam_arguments((3, 300), BLOCKS)),
    "vector": (adam, adam_arguments((5001,), BLOCKS)),
    "quantize": (
        lambda x: kernels.quantize(x, FIRST_MOMENT_8BIT),
        (floats(1000, 1300, dtype=jnp.bfloat16),),
    ),
    "dequantize": (kernels.dequantize, (moment((1000, 1300), FIRST_MOMENT_4BIT),)),
    "product": product(2048, LARGE),
    "product, transposed": product(2048, LARGE, is_transposed=True),
    # The widths of Llama-7B, whose tiles are the smallest.
    "product in float32": product(999, (4096, 11008), jnp.float32, 128),
    "product in float32, transposed": product(999, (4096, 11008), jnp.float32, 128, True),
    "product of a row": product(1, (384, 768), block_size=32),
    "product of a row, transposed": product(1, (384, 768), block_size=256, is_transposed=True),
    "plain": (plain_adam, adam_arguments(LARGE, BLOCKS)),
}
# What is written in place: the gradient or the parameters, and the moments.
DONATED = {adam: (0, 1, 2), plain_adam: (0, 1, 2), momentum: (0, 1)}


def compiled(function, arguments, sharding):
    donated = DONATED.get(function, ())
    if function is adam and arguments[-1] is not None:
        donated = (1, 2, 4)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    program = jax.jit(function, donate_argnums=donated, keep_unused=True).lower(*arguments)
    program = program.compile()
    memory, text = program.memory_analysis(), program.as_text()
    return {
        "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliases": text.partition("\n")[0].count("may-alias"),
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
    }


def main():
    device = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices[0]
    sharding = SingleDeviceSharding(device)
    report = {name: compiled(*case, sharding) for name, case in CASES.items()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
