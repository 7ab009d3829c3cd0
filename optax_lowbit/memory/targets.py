"""What a step is compiled for, ahead of time: CPUs, TPUs of a topology, H100s."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optax_lowbit.memory.layout import abstracted

# Of each generation the topology of one host; a step for one device uses its first.
TPUS = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2"}
TARGETS = ("cpu", *(f"tpu {generation}" for generation in TPUS), "h100")
# What XLA wants to know of a GPU that is not at hand.
H100 = pathlib.Path(__file__).with_name("h100_target_config.txtpb")


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What one device needs to run a compiled step, in bytes, as its compiler says.

    Attributes:
      target: What it was compiled for.
      devices: How many devices the step runs on.
      arguments: Parameters, state and whatever else the step is given, as they are laid out there:
        TPUs fill the last two axes up to whole tiles.
      outputs: What it returns.
      aliased: Those of the outputs that are written over donated arguments.
      temporaries: Activations, gradients, and what the compiler copies.
      program: The program itself.
    """

    target: str
    devices: int
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    program: int

    @property
    def nbytes(self) -> int:
        """All of it: what is aliased counts once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.program


def compile_step(step: Any, arguments: Sequence[Any], target: str) -> CompiledStep:
    """Compiles a jitted step for a target that need not be at hand. Nothing is run.

    Args:
      step: What `jax.jit` returned.
      arguments: The step's, as a tuple of trees of arrays or `jax.ShapeDtypeStruct`. Those with a
        `NamedSharding` are laid out so over the target's devices, whatever the devices of its mesh
        (an `AbstractMesh` has none); others are on every device of that mesh.
      target: A name, as in :func:`plan`.

    Raises:
      ValueError, ModuleNotFoundError: As :func:`target_devices`; or the mesh has more devices than
        the target.
    """
    if not hasattr(step, "lower"):
        raise TypeError(f"step must be what jax.jit returns, got {type(step).__name__}")
    arguments = abstracted(tuple(arguments))
    mesh = _mesh_on(target_devices(target), arguments, target)
    placed = jax.tree.map(lambda leaf: _placed(leaf, mesh), arguments)
    with jax.set_mesh(mesh):
        memory = step.trace(*placed).lower(lowering_platforms=(platform_of(target),)).compile()
    memory = memory.memory_analysis()
    return CompiledStep(
        target=target,
        devices=mesh.size,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        program=memory.generated_code_size_in_bytes,
    )


def meshes(tree: Any) -> list[Any]:
    """The distinct meshes that the leaves of an abstract tree are laid out over."""
    shardings = [leaf.sharding for leaf in jax.tree.leaves(tree)]
    return list(dict.fromkeys(sharding.mesh for sharding in shardings if sharding is not None))


def _mesh_on(devices: Sequence[Any], arguments: Any, target: str) -> Mesh:
    layouts = {(mesh.axis_names, mesh.axis_sizes, mesh.axis_types) for mesh in meshes(arguments)}
    if not layouts:
        return Mesh(np.array(devices[:1]), ("devices",))
    if len(layouts) > 1:
        raise ValueError(f"arguments must be laid out over one mesh, got {sorted(layouts)}")
    ((names, sizes, types),) = layouts
    count = math.prod(sizes)
    if count > len(devices):
        raise ValueError(
            f"the arguments are laid out over {count} devices, and target {target!r} has "
            f"{len(devices)}; name a larger topology, such as 'tpu v5e:4x4'"
        )
    return Mesh(np.array(devices[:count]).reshape(sizes), names, axis_types=types)


def _placed(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
    return leaf.update(sharding=NamedSharding(mesh, spec))


def platform_of(target: str) -> str:
    """What JAX calls the platform of a target."""
    return {"cpu": "cpu", "h100": "cuda"}.get(target.partition(":")[0], "tpu")


def check_target(target: str) -> None:
    """Raises ValueError if there is no target of that name."""
    name, _, topology = target.partition(":")
    if name not in TARGETS or (topology and name == "cpu"):
        raise ValueError(
            f"target must be one of {', '.join(TARGETS)}, TPUs with a topology if there are more "
            f"devices, as in 'tpu v5e:2x2', H100s with their number, as in 'h100:2'; got {target!r}"
        )


def target_devices(target: str) -> Sequence[Any]:
    """The devices of a target, which cannot be run on if they are not at hand.

    Raises:
      ValueError: If there is no such target or topology.
      ModuleNotFoundError: If its compiler is not installed; the message says how to.
    """
    check_target(target)
    name, _, topology = target.partition(":")
    if name == "cpu":
        return jax.devices("cpu")
    if name == "h100":
        return _h100s(topology or "1")
    generation = name.removeprefix("tpu ")
    return _tpus(f"{generation}:{topology or TPUS[generation]}")


def _tpus(topology: str) -> Sequence[Any]:
    _require("libtpu", f'pip install "jax[tpu]=={jax.__version__}"')
    # That nobody looks for TPUs in a cloud, and that a process with TPUs is no hindrance.
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    with _environment(settings), _named_topology(topology):
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def _h100s(number: str) -> Sequence[Any]:
    if not re.fullmatch("[1-8]", number):
        raise ValueError(f"target must be h100 or h100:2 to h100:8, got 'h100:{number}'")
    _require("jax_plugins.xla_cuda12", f'pip install "jax[cuda12]=={jax.__version__}"')
    with _environment({"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}):
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name="h100",
            target_config=H100.read_text(),
            topology=f"1x1x{number}",
        ).devices


def _require(module: str, command: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package around it
        found = None
    if found is None:
        raise ModuleNotFoundError(f"compiling for this target needs {module}: {command}")


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextlib.contextmanager
def _named_topology(topology: str) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"libtpu gives no topology {topology!r}: {error}") from error
