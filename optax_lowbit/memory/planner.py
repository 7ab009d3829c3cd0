"""What training needs: bytes of every part of it, from shapes and from the compiler."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_lowbit.memory.architectures import abstract_params
from optax_lowbit.memory.layout import Bytes, abstract_state, abstracted, bytes_of
from optax_lowbit.memory.sizes import Fit, parse_size
from optax_lowbit.memory.targets import CompiledStep, check_target, compile_step, meshes
from optax_lowbit.moments.storage import is_low_bit
from optax_lowbit.optimizers.ownership import is_state_leaf, owners


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """The memory of a training step, part by part; ``print`` it for a table.

    Each of the parts has ``total``, the bytes of all its elements, and ``device``, those that are
    on one device of the mesh; without a mesh they are equal.

    Attributes:
      count: Number of parameters, adapters among them.
      devices: Number of devices.
      parameters: Of the parameters.
      adapters: Of adapters, where only those are trained.
      gradients: Of all gradients at once, in the dtypes of what is trained.
      low_bit_moments: Of codes and scales, and of factored second moments.
      float_moments: Of other float arrays of the state that belong to a parameter.
      other_state: Of the rest of the state: counters, hyperparameters.
      step: What the compiled step needs; None if none was given.
    """

    count: int
    devices: int
    parameters: Bytes
    adapters: Bytes
    gradients: Bytes
    low_bit_moments: Bytes
    float_moments: Bytes
    other_state: Bytes
    step: CompiledStep | None

    @property
    def state(self) -> Bytes:
        """The whole optimizer state."""
        return self.low_bit_moments + self.float_moments + self.other_state

    @property
    def nbytes(self) -> int:
        """Bytes on one device: those of the compiled step, or of all parts without activations."""
        if self.step is not None:
            return self.step.nbytes
        return (self.parameters + self.adapters + self.gradients + self.state).device

    def fits(self, size: str | int) -> Fit:
        """Whether one device's share fits into a memory, and how much of that is left.

        Without a compiled step activations are not counted, and what is left must do for them.
        What a driver, a runtime and fragmentation take is not counted either.

        Args:
          size: Bytes, or a text such as ``"24GB"`` or ``"h100"``. GB and GiB both are 2^30 bytes:
            a graphics card that is sold with 24 GB has 24 GiB (25.8 GB of 10^9 bytes).

        Returns:
          A :class:`Fit`, which is true if it fits; ``left`` has the bytes that are left.

        Raises:
          ValueError: If ``size`` is no size.
        """
        return Fit(self.nbytes, parse_size(size))

    def __str__(self) -> str:
        return "\n".join([*_table(self._parts(), self.count, self.devices), *self._step_lines()])

    def _parts(self) -> list[tuple[str, Bytes]]:
        parts = [
            ("parameters", self.parameters),
            ("adapters", self.adapters),
            ("gradients", self.gradients),
            ("optimizer state", self.state),
            ("  low-bit moments", self.low_bit_moments),
            ("  float moments", self.float_moments),
            ("  other", self.other_state),
            ("total", self.parameters + self.adapters + self.gradients + self.state),
        ]
        return [(name, part) for name, part in parts if part.total or name != "adapters"]

    def _step_lines(self) -> list[str]:
        if self.step is None:
            return ["without activations: no step was compiled"]
        step = self.step
        rows = [
            ("arguments", step.arguments),
            ("outputs, not in place", step.outputs - step.aliased),
            ("temporaries", step.temporaries),
            ("program", step.program),
            ("total", step.nbytes),
        ]
        where = "" if step.devices == 1 else f", each of {step.devices} devices"
        header = [f"compiled for {step.target}{where}", "bytes", "GiB"]
        return _aligned([header, *([name, f"{n:,}", f"{n / 2**30:.2f}"] for name, n in rows)])


def plan(
    params: Any,
    tx: optax.GradientTransformation,
    *,
    adapters: Any = None,
    step: Any = None,
    arguments: Sequence[Any] = (),
    target: str = "cpu",
) -> MemoryPlan:
    """Tells what training needs before it is run: exact bytes, part by part and device by device.

    Parameters, gradients and state are counted from the shapes, dtypes and shardings that their
    buffers will have; nothing is allocated. Activations, temporaries and what a target's layouts
    add are what its compiler says of the step it is given, ahead of time: no accelerator is needed,
    and what is compiled is not run. Gradients then are among the temporaries.

    Args:
      params: Arrays or `jax.ShapeDtypeStruct`, with a `NamedSharding` each where they are spread
        over a mesh (an `AbstractMesh` will do); or a model that :func:`abstract_params` knows by
        name or path, in float32.
      tx: Any Optax transform. A state that :func:`optax_lowbit.offload` keeps on the host is
        counted as if it were on the device.
      adapters: The leaves that are trained, where ``params`` are frozen: gradients and state are
        those of this tree alone. None: ``params`` are trained.
      step: The training step, as `jax.jit` returned it, with its donated arguments and shardings;
        shardings of its own must be partition specs, as the mesh is that of the target.
      arguments: The arguments of ``step``: trees of arrays or `jax.ShapeDtypeStruct`, for the state
        from :func:`abstract_state`.
      target: What to compile for: ``"cpu"``, ``"h100"``, ``"tpu v4"``, ``"tpu v5e"``,
        ``"tpu v5p"`` or ``"tpu v6e"``; more devices as ``"h100:2"`` or ``"tpu v5e:4x4"``, a
        topology. Kernels of this library must be named for a target that is not at hand, as in
        ``adamw4bit(..., backend="pallas_tpu")``.

    Returns:
      A :class:`MemoryPlan`.

    Raises:
      TypeError: If ``step`` is not jitted.
      ValueError: If there is no such model or target, or it has too few devices.
      ModuleNotFoundError: If the compiler of the target is not installed.
      jax.errors.JaxRuntimeError: If the compiler gives up, as for a TPU without enough memory.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_lowbit
      >>> from optax_lowbit.memory import plan
      >>> print(plan("llama-7b", optax_lowbit.adamw4bit(1e-5)))
      part                        bytes    GiB  bytes a parameter
      parameters         26,953,662,464  25.10              4.000
      gradients          26,953,662,464  25.10              4.000
      optimizer state     6,959,310,852   6.48              1.033
        low-bit moments   6,959,278,080   6.48              1.033
        float moments            32,768   0.00              0.000
        other                         4   0.00              0.000
      total              60,866,635,780  56.69              9.033
      without activations: no step was compiled
      >>> bool(plan("llama-7b", optax.adamw(1e-5)).fits("80GB"))
      False

      A step's own temporaries:

      >>> params = {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
      >>> tx = optax.sgd(0.1)
      >>> def loss(params, x):
      ...     return jnp.mean((x @ params["w"]) ** 2)
      >>> def step(params, x):
      ...     updates, _ = tx.update(jax.grad(loss)(params, x), tx.init(params))
      ...     return optax.apply_updates(params, updates)
      >>> x = jax.ShapeDtypeStruct((64, 512), jnp.float32)
      >>> memory = plan(params, tx, step=jax.jit(step, donate_argnums=0), arguments=(params, x))
      >>> memory.step.arguments, memory.step.outputs - memory.step.aliased
      (1179648, 0)
    """
    check_target(target)
    if step is None and arguments:
        raise ValueError("arguments are those of a step: step must be given, got None")
    if isinstance(params, str | os.PathLike):
        params = abstract_params(params)
    params, adapters = abstracted(params), abstracted(adapters)
    trained = params if adapters is None else adapters
    state = abstract_state(tx, trained)
    low_bit, floats, other = _groups(state, trained)
    floating = [x for x in jax.tree.leaves(trained) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return MemoryPlan(
        count=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((params, adapters))),
        devices=max((mesh.size for mesh in meshes((params, adapters))), default=1),
        parameters=bytes_of(params),
        adapters=bytes_of(adapters),
        gradients=bytes_of(floating),
        low_bit_moments=bytes_of(low_bit),
        float_moments=bytes_of(floats),
        other_state=bytes_of(other),
        step=None if step is None else compile_step(step, arguments, target),
    )


def _groups(state: Any, trained: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Low-bit moments, float arrays of parameters, and the rest of the leaves of a state."""
    groups: tuple[list[Any], list[Any], list[Any]] = [], [], []
    leaves = jax.tree.leaves(state, is_leaf=is_state_leaf)
    for leaf, owner in zip(leaves, owners(state, trained), strict=True):
        if is_low_bit(leaf):
            groups[0].append(leaf)
        else:
            is_moment = owner is not None and jnp.issubdtype(leaf.dtype, jnp.inexact)
            groups[1 if is_moment else 2].append(leaf)
    return groups


def _table(parts: Sequence[tuple[str, Bytes]], count: int, devices: int) -> list[str]:
    header = ["part", "bytes", "GiB", "bytes a parameter"]
    rows = [
        [name, f"{part.total:,}", f"{part.total / 2**30:.2f}", f"{part.total / max(count, 1):.3f}"]
        for name, part in parts
    ]
    if devices > 1:
        header += [f"each of {devices} devices", "GiB"]
        for row, (_, part) in zip(rows, parts):
            row += [f"{part.device:,}", f"{part.device / 2**30:.2f}"]
    return _aligned([header, *rows])


def _aligned(rows: list[list[str]]) -> list[str]:
    """Lines with the first column to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in rows
    ]
