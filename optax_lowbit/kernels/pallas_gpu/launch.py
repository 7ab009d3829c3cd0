"""Launching kernels, and what every optimizer's kernel does with its update."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from optax_lowbit.kernels.pallas_gpu.tiles import Pair, Tile, Tiling

Refs = Mapping[str, Any]


def launch(
    kernel: Callable[[Refs, Refs], None],
    tiling: Tiling,
    inputs: Mapping[str, jax.Array],
    outputs: Mapping[str, jax.Array | jax.ShapeDtypeStruct],
    aliases: Mapping[str, str],
    *,
    interpret: bool,
) -> dict[str, jax.Array]:
    """Runs ``kernel(input refs, output refs)`` on flattened arrays, a program for each tile.

    Args:
      kernel: Reads and writes refs by the names of the arrays.
      tiling: Of the leaf.
      inputs: The operands.
      outputs: Arrays or descriptions with the shape and dtype of each result.
      aliases: Outputs by name, and the inputs whose buffers they take over.
      interpret: Whether to interpret the kernel rather than to lower it.

    Returns:
      The results, in the shapes of ``outputs``.
    """
    # Dictionaries are flattened in the order of their keys.
    positions = {name: i for i, name in enumerate(sorted(inputs))}
    results = {name: i for i, name in enumerate(sorted(outputs))}
    flat = pl.pallas_call(
        kernel,
        out_shape={
            name: jax.ShapeDtypeStruct((math.prod(out.shape),), out.dtype)
            for name, out in outputs.items()
        },
        grid=tiling.grid,
        input_output_aliases={positions[aliases[name]]: results[name] for name in aliases},
        compiler_params=triton.CompilerParams(num_warps=tiling.warps, num_stages=1),
        interpret=interpret,
    )({name: x.reshape(-1) for name, x in inputs.items()})
    return {name: flat[name].reshape(outputs[name].shape) for name in outputs}


def launch_step(
    kernel: Callable[[Refs, Refs], None],
    tiling: Tiling,
    scalars: Sequence[jax.Array],
    inputs: Mapping[str, jax.Array],
    moments: Mapping[str, jax.Array],
    descent: Any,
    *,
    interpret: bool,
) -> dict[str, jax.Array]:
    """:func:`launch` of an optimizer's step, with everything written over what it replaces.

    Args:
      kernel: Writes its update with :func:`store_result`.
      tiling, interpret: As in :func:`launch`.
      scalars: What the step multiplies and adds, float32; the kernel's operand ``"scalars"``.
      inputs: The other operands, ``"grad"`` among them.
      moments: Those of the operands that the kernel writes anew.
      descent: Parameters, learning rate and weight decay; or None.

    Returns:
      The new moments, and ``"result"``: the update, or the new parameters.
    """
    replaced = "grad"
    if descent is not None:
        replaced = "params"
        scalars = [*scalars, descent.learning_rate, descent.weight_decay]
        inputs = {**inputs, "params": descent.params}
    inputs = {**inputs, "scalars": jnp.stack(scalars)}
    outputs = {**moments, "result": inputs[replaced]}
    aliases = {**{name: name for name in moments}, "result": replaced}
    return launch(kernel, tiling, inputs, outputs, aliases, interpret=interpret)


def store_result(refs: Refs, out: Refs, tile: Tile, updates: Pair) -> None:
    """Writes the float32 ``updates``, or the parameters after a descent along them."""
    if "params" in refs:
        scalars = refs["scalars"]
        learning_rate, weight_decay = (scalars[scalars.size - i] for i in (2, 1))
        params = (half.astype(jnp.float32) for half in tile.load(refs["params"]))
        low, high = (p + (-learning_rate) * (u + weight_decay * p) for p, u in zip(params, updates))
        updates = low, high
    tile.store(out["result"], updates)
