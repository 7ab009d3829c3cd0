"""Where parameters, optimizer state and batches lie on a mesh of devices."""

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.llm.errors import UsageError
from optax_lowbit import qlora, state_shardings

# Examples of a batch are spread over the one, linear layers over the other.
DATA, MODEL = AXES = ("data", "model")
# Layers whose outputs are spread, and those whose inputs are what such a layer gives.
_COLUMNS, _ROWS = r"/(query|key|value|gate|up)/", r"/(output|down)/"
# From a path to the axis that is spread over `MODEL`, counted from the end.
_RULES = (
    (_COLUMNS + r"((base/)?(kernel|bias)|lora_b)$", -1),
    (_ROWS + r"lora_a$", -1),
    (_ROWS + r"(base/)?kernel$", -2),
    (r"^/embedding/embedding$", -2),
    (r"^/head/kernel$", -1),
)


def mesh_sizes(text: str) -> dict[str, int]:
    """Return the sizes in a text such as `data=2,model=4`; empty for an empty text.

    Raises:
      UsageError: it is no such text.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not re.fullmatch("[1-9][0-9]*", size):
            raise UsageError(f"--mesh: must be such as data=2,model=4, got {text}")
        sizes[name] = int(size)
    return sizes


@dataclass(frozen=True)
class Layout:
    """A mesh, and what is spread over it.

    Attributes:
      mesh: with the axes `AXES`.
      fully: whether parameters and state are spread over `DATA`, too (FSDP).
    """

    mesh: Mesh | AbstractMesh
    fully: bool = False

    def of_parameters(self, parameters: Any) -> Any:
        """Return the sharding of each leaf; of a matrix in few bits, of each of its arrays.

        Raises:
          UsageError: an axis is no multiple of the devices that it is spread over.
        """

        def sharding(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            whole = NamedSharding(self.mesh, self._spec(name, leaf.shape))
            if not isinstance(leaf, qlora.QuantizedMatrix):
                return whole
            try:
                return qlora.matrix_sharding(leaf, whole)
            except ValueError as error:
                raise UsageError(f"--mesh: {name}: {error}") from error

        return jax.tree_util.tree_map_with_path(
            sharding, parameters, is_leaf=lambda x: isinstance(x, qlora.QuantizedMatrix)
        )

    def of_state(self, init: Callable[[Any], Any], parameters: Any) -> Any:
        """Return the sharding of each array of `init(parameters)`."""
        # Of which only the state is asked for, whatever kind of optimizer it is of.
        transformation = optax.identity()._replace(init=init)
        with warnings.catch_warnings():
            # Narrow layers exchange codes in every step; results are the same.
            warnings.filterwarnings("ignore", "every step will exchange codes")
            return state_shardings(
                transformation, parameters, self.of_parameters(parameters), mesh=self.mesh
            )

    def of_batch(self, batch: Any, axis: int) -> Any:
        """Return the sharding of each array of a batch, whose examples are along `axis`."""
        spec = P(*[None] * axis, DATA)
        return jax.tree.map(
            lambda leaf: NamedSharding(self.mesh, spec if np.ndim(leaf) > axis else P()), batch
        )

    @property
    def everywhere(self) -> NamedSharding:
        """Of what is whole on every device."""
        return NamedSharding(self.mesh, P())

    def _spec(self, name: str, shape: tuple[int, ...]) -> P:
        axes: list[Any] = [()] * len(shape)
        for pattern, axis in _RULES:
            if re.search(pattern, f"/{name}"):
                self._check_divides(MODEL, name, shape, axis)
                axes[axis] = (MODEL,)
                if self.fully and len(shape) > 1:
                    # The last but one: quantizers keep groups along the last axis together.
                    axes[-2] = (*axes[-2], DATA)
                    self._check_divides(DATA, name, shape, -2)
        return P(*(axis[0] if len(axis) == 1 else axis or None for axis in axes))

    def _check_divides(self, mesh_axis: str, name: str, shape: tuple[int, ...], axis: int) -> None:
        size = self.mesh.shape[mesh_axis]
        if shape[axis] % size:
            raise UsageError(
                f"--mesh: {mesh_axis}={size} does not divide the {shape[axis]} of axis "
                f"{len(shape) + axis} of {name}, {shape}"
            )


def make_layout(sizes: dict[str, int], fully: bool) -> Layout:
    """Return a layout over the devices present, of all processes.

    Raises:
      UsageError: there are too few, or several processes have others, too.
    """
    sizes = {name: sizes.get(name, 1) for name in AXES}
    needed, devices = math.prod(sizes.values()), jax.devices()
    if needed > len(devices) or (needed < len(devices) and jax.process_count() > 1):
        words = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise UsageError(f"--mesh: {words} is for {needed} devices, there are {len(devices)}")
    mesh = jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices[:needed],
    )
    return Layout(mesh, fully)


def put(tree: Any, shardings: Any) -> Any:
    """Return global arrays of what every process has whole."""

    def one(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = one(jax.random.key_data(x), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)

    return jax.tree.map(one, tree, shardings)
