"""Checkpoints: the arrays of a training state, and a manifest that says how to read them."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from optax_lowbit.checkpoint import manifest
from optax_lowbit.checkpoint.conversion import check_convertible, converted, is_same_form
from optax_lowbit.checkpoint.leaves import (
    Leaf,
    is_on_host,
    leaves_of,
    structure_of,
)
from optax_lowbit.checkpoint.manifest import Piece, StoredLeaf
from optax_lowbit.checkpoint.matching import matched
from optax_lowbit.kernels.checksums import checksum
from optax_lowbit.moments.placement import divisible

ARRAYS, MANIFEST = "state", "manifest"
# Arrays that are to be converted are read in portions of this many bytes, and at least a leaf.
PORTION = 2**28

Sharding = jax.sharding.Sharding
# A leaf to read, what it is to be like, and the number of the leaf that it becomes.
Job = tuple[StoredLeaf, Any, int]


def save(path: Any, state: Any) -> None:
    """Writes a training state as one checkpoint.

    The folder appears under its name only when all is written: a process that dies before leaves
    nothing there, and checkpoints beside it as they were.

    **Memory.** As in Orbax, every process copies its shards to its host's memory; nothing is
    gathered.

    Args:
      path: A folder that is not there yet.
      state: A tree of arrays, numbers and low-bit arrays; say, a dict of parameters, optimizer
        state and step.

    Returns:
      Nothing, when all is written.

    Raises:
      ValueError: If the folder exists.
      ImportError: Without orbax-checkpoint.

    Examples:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp, optax_lowbit
      >>> from optax_lowbit import checkpoint
      >>> params = {"w": jnp.ones((128, 128))}
      >>> state = {"params": params, "opt": optax_lowbit.adamw4bit(1e-3).init(params), "step": 0}
      >>> folder = pathlib.Path(tempfile.mkdtemp()) / "0"
      >>> checkpoint.save(folder, state)
      >>> checkpoint.restore(folder, state)["step"]
      0

    .. seealso:: :func:`save_args`, for asynchronous checkpoints and for several in one folder.
    """
    ocp = _orbax()

    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(_absolute(path), args=save_args(state))


def save_args(state: Any) -> Any:
    """What :func:`save` writes, for an Orbax checkpointer or manager to write.

    Checksums are computed here, on the devices, where shards lie; the arrays are read by Orbax.

    Args:
      state: As in :func:`save`.

    Returns:
      An `orbax.checkpoint.args.Composite` of two items, ``state`` (the arrays, by name) and
      ``manifest`` (JSON).

    Examples:
      >>> import tempfile
      >>> import jax.numpy as jnp, optax_lowbit
      >>> import orbax.checkpoint as ocp
      >>> from optax_lowbit import checkpoint
      >>> state = optax_lowbit.adamw4bit(1e-3).init(jnp.ones((128, 128)))
      >>> with ocp.CheckpointManager(tempfile.mkdtemp()) as manager:
      ...     saved = manager.save(100, args=checkpoint.save_args(state))
      ...     manager.wait_until_finished()
      ...     latest = manager.directory / str(manager.latest_step())
      ...     restored = checkpoint.restore(latest, state)
    """
    ocp = _orbax()

    leaves = leaves_of(state)
    arrays = {}
    for index, leaf in enumerate(leaves):
        arrays |= manifest.storable_pieces(index, leaf)
    sums = jax.device_get({name: checksum(x) for name, x in arrays.items()})
    stored = manifest.stored_leaves(leaves, {name: int(value) for name, value in sums.items()})
    items: dict[str, Any] = {MANIFEST: ocp.args.JsonSave(manifest.to_json(stored))}
    # Orbax has neither arrays without elements nor trees without arrays; the manifest has.
    arrays = {name: x for name, x in arrays.items() if x.size}
    if arrays:
        items[ARRAYS] = ocp.args.PyTreeSave(arrays)
    return ocp.args.Composite(**items)


def restore(path: Any, like: Any) -> Any:
    """Reads a checkpoint into the structure, the storage and the places of another state.

    Every leaf comes out as it is in ``like``: in its bits or floats, on its devices, whatever they
    were when it was saved. Leaves and forms match as in :func:`convert_state`; a state that was
    saved with the same optimizer comes back to the bit.

    **Memory.** Beside the result, and what is given as ``like``, at most 256 MiB or one leaf of
    what is to be converted, as it was stored, and one leaf in float32.

    Args:
      path: A checkpoint: what :func:`save` was given, or the folder of a step of an Orbax manager.
      like: A tree of the structure that was saved, or the same with the state of another
        transform; of arrays, or of `jax.ShapeDtypeStruct` with shardings. Without a sharding an
        array goes to the first device.

    Returns:
      A tree like ``like``, of which numbers and NumPy arrays stay on the host.

    Raises:
      FileNotFoundError: If there is no such folder.
      ValueError: If it is no such checkpoint, of a newer version, or damaged; or if leaves are
        missing or left over, or have other shapes. Nothing is returned then.
      ImportError: Without orbax-checkpoint.

    Examples:
      Saved with one optimizer, continued with another:

      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp, optax, optax_lowbit
      >>> from optax_lowbit import checkpoint
      >>> params = {"w": jnp.ones((128, 128))}
      >>> folder = pathlib.Path(tempfile.mkdtemp()) / "0"
      >>> checkpoint.save(folder, optax.adamw(1e-3).init(params))
      >>> state = checkpoint.restore(folder, optax_lowbit.adamw4bit(1e-3).init(params))
      >>> state[0].mu["w"].nbytes
      8704
    """
    path = _absolute(path)
    try:
        stored = _read_manifest(path)
        targets = leaves_of(like)
        values = _restored(path, stored, targets)
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from error
    return jax.tree.unflatten(structure_of(like), values)


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ModuleNotFoundError as error:
        raise ImportError("checkpoints need Orbax: pip install orbax-checkpoint") from error
    return orbax.checkpoint


def _absolute(path: Any) -> Any:
    return pathlib.Path(path).absolute() if isinstance(path, str) else path


def _read_manifest(path: Any) -> list[StoredLeaf]:
    ocp = _orbax()

    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if not (path / MANIFEST).exists():
        raise ValueError(
            f"it has no {MANIFEST!r}: optax_lowbit did not write it. What Orbax wrote without it, "
            "Orbax restores"
        )
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            content = checkpointer.restore(path / MANIFEST)
    except (ValueError, OSError) as error:
        raise ValueError(f"its manifest cannot be read: {error}") from error
    return manifest.from_json(content)


def _restored(path: Any, stored: list[StoredLeaf], targets: list[Leaf]) -> list[Any]:
    sources = [each.leaf for each in stored]

    def read_count(index):
        (piece,) = stored[index].pieces
        return int(_read(path, {piece: None})[piece.name])

    has_values = all(hasattr(x, "__array__") or is_on_host(x) for x in _arrays(targets))
    chosen = matched(sources, targets, read_count, has_values)
    for index, target in zip(chosen, targets):
        if index is not None:
            check_convertible(sources[index], target)
    values = [target.value for target in targets]
    for portion in _portions(stored, targets, chosen):
        for number, value in _read_like(path, portion):
            values[number] = value
    return values


def _read_like(path: Any, portion: list[Job]) -> Iterator[tuple[int, Any]]:
    """What leaves become, with the number of each."""
    places: dict[Piece, Any] = {}
    for source, like, _ in portion:
        for piece, place in zip(source.pieces, _places(source, like), strict=True):
            places.setdefault(piece, place)
    arrays = _read(path, places)
    for source, like, number in portion:
        value = manifest.assembled(source, [arrays[piece.name] for piece in source.pieces])
        yield number, converted(value, like)


def _arrays(targets: list[Leaf]) -> list[Any]:
    return jax.tree.leaves([target.value for target in targets])


def _portions(
    stored: list[StoredLeaf], targets: list[Leaf], chosen: list[int | None]
) -> Iterator[list[Job]]:
    """What to read at a time."""
    direct, indirect = [], []
    for number, (index, target) in enumerate(zip(chosen, targets)):
        if index is not None:
            is_direct = is_same_form(stored[index].leaf.value, target.value)
            (direct if is_direct else indirect).append((stored[index], target.value, number))
    yield direct
    portion, total = [], 0
    for job in indirect:
        nbytes = sum(piece.nbytes for piece in job[0].pieces)
        if portion and total + nbytes > PORTION:
            yield portion
            portion, total = [], 0
        portion.append(job)
        total += nbytes
    yield portion


def _places(stored: StoredLeaf, like: Any) -> Sequence[Sharding | None]:
    """Where to put each array of a stored leaf: as in ``like``, as far as shapes allow."""
    if is_on_host(like):
        return [None] * len(stored.pieces)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = [getattr(x, "sharding", None) or default for x in jax.tree.leaves(like)]
    if any(isinstance(getattr(sharding, "mesh", None), AbstractMesh) for sharding in shardings):
        raise ValueError(
            f"like has no devices for {stored.leaf.name}, as its mesh is abstract: give it arrays, "
            "or shardings of a mesh of devices"
        )
    if is_same_form(stored.leaf.value, like):
        return shardings
    return [_spread(shardings[0], piece.shape) for piece in stored.pieces]


def _spread(sharding: Sharding, shape: tuple[int, ...]) -> Sharding:
    """The sharding for an array of another shape, which a conversion may compute with."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    # Compilers may move parts of arrays whose types do not say where they lie.
    devices: Any = sharding.mesh.devices
    names = sharding.mesh.axis_names
    mesh = jax.sharding.Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))
    return divisible(jax.sharding.NamedSharding(mesh, sharding.spec), shape)


def _read(path: Any, places: Mapping[Piece, Sharding | None]) -> dict[str, Any]:
    """Arrays by name, on the host where the place is None.

    Raises:
      ValueError: If one cannot be read, or is not what was written.
    """
    ocp = _orbax()

    arrays = {piece.name: piece.zeros() for piece in places if not piece.nbytes}
    item, arguments = {}, {}
    for piece, place in places.items():
        if not piece.nbytes:
            continue
        item[piece.name] = piece.abstract()
        arguments[piece.name] = (
            ocp.RestoreArgs(restore_type=np.ndarray)
            if place is None
            else ocp.ArrayRestoreArgs(sharding=place, global_shape=piece.shape)
        )
    if item:
        restore_args = ocp.args.PyTreeRestore(item, restore_args=arguments, partial_restore=True)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                arrays |= checkpointer.restore(path / ARRAYS, args=restore_args)
        except Exception as error:  # of many kinds, from Orbax and from TensorStore
            raise ValueError(f"its arrays cannot be read: {error}") from error
    sums = jax.device_get({name: checksum(x) for name, x in arrays.items()})
    for piece in places:
        piece.check(arrays[piece.name], int(sums[piece.name]))
    return arrays
