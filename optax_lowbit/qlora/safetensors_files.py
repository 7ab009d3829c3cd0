"""Tensors in safetensors files, read one by one; what comes with them in JSON.

The files may be anybody's. The `safetensors` library checks a header against the length of its file
before it reads a tensor: offsets, shapes, dtypes. Here stands what is around that: which files, and
JSON. Whatever is wrong is a ValueError that names the file.
"""

import contextlib
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Bytes of a config, and of an index, which has a line for each tensor.
MAX_CONFIG, MAX_INDEX = 2**20, 2**26
# Objects and lists in JSON, each of which may take 64 bytes for two.
_MAX_CONTAINERS = 20_000

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# NumPy's limits, also of arrays without elements.
_MAX_AXES, _MAX_BYTES = 64, 2**63 - 1


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors of a safetensors file, or of a folder of them, by name.

    A folder holds ``model.safetensors`` or, if it does not, ``model.safetensors.index.json``, which
    says in which file each tensor is.

    A tensor is read when it is asked for, and not kept.

    Attributes:
      path: The file or the folder.
    """

    def __init__(self, path: Any):
        self.path = pathlib.Path(path)
        if not self.path.is_dir():
            self._open_one(self.path)
        elif (self.path / SINGLE).exists():
            self._open_one(self.path / SINGLE)
        elif (self.path / INDEX).exists():
            self._open_index(self.path / INDEX)
        else:
            raise ValueError(f"{self.path}: has neither {SINGLE} nor {INDEX}")

    def __getitem__(self, name: str) -> np.ndarray:
        file, path = self._files[name]
        self.abstract(name)
        with _naming(path, name):
            return file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def abstract(self, name: str) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a tensor, which is not read.

        Raises:
          ValueError: If NumPy has no such array.
        """
        file, path = self._files[name]
        piece = file.get_slice(name)
        dtype, shape = piece.get_dtype(), tuple(piece.get_shape())
        if dtype not in _DTYPES:
            raise ValueError(f"{path}: {name!r} must be of one of {sorted(_DTYPES)}, is {dtype}")
        if len(shape) > _MAX_AXES or 8 * math.prod(max(d, 1) for d in shape) > _MAX_BYTES:
            raise ValueError(f"{path}: {name!r} has an impossible shape: {str(shape)[:200]}")
        return jax.ShapeDtypeStruct(shape, _DTYPES[dtype])

    def where(self, name: str) -> pathlib.Path:
        """The file that a tensor is in."""
        return self._files[name][1]

    def _open_one(self, path: pathlib.Path) -> None:
        file = _open(path)
        self._files = {name: (file, path) for name in sorted(file.keys())}

    def _open_index(self, path: pathlib.Path) -> None:
        places = read_json(path, MAX_INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"{path}: 'weight_map' must map tensors to files, is {places!r:.100}")
        opened: dict[str, Any] = {}
        for file in {repr(file): file for file in places.values()}.values():
            opened[file] = _open(_beside(path, file))
        held = {file: set(handle.keys()) for file, handle in opened.items()}
        for name, file in places.items():
            if name not in held[file]:
                raise ValueError(f"{path}: 'weight_map' has {name!r} in {file}, which does not")
        self._files = {
            name: (opened[places[name]], path.parent / places[name]) for name in sorted(places)
        }


def write_tensors(
    folder: Any, groups: Iterable[Mapping[str, np.ndarray]], max_shard_bytes: int
) -> None:
    """Writes tensors into one ``model.safetensors``, or, if it were larger, into several.

    Args:
      folder: Without safetensors files.
      groups: Tensors that stay together. They are taken one group after the other, and what is in
        memory is what goes into one file.
      max_shard_bytes: What a file may hold, and one group at least.
    """
    folder = pathlib.Path(folder)
    places: dict[str, int] = {}
    shards = total = 0
    try:
        for shard in _shards(groups, max_shard_bytes):
            write_file(_part(folder, shards), shard)
            places.update(dict.fromkeys(shard, shards))
            total += sum(tensor.nbytes for tensor in shard.values())
            shards += 1
    except BaseException:
        for number in range(shards + 1):
            _part(folder, number).unlink(missing_ok=True)
        raise
    if shards == 1:
        _part(folder, 0).rename(folder / SINGLE)
        return
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for i, name in enumerate(names):
        _part(folder, i).rename(folder / name)
    weight_map = {tensor: names[i] for tensor, i in places.items()}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json_text(index, INDEX) + "\n")


def write_file(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one safetensors file; how depends on names and arrays, not on their order.

    Raises:
      OSError: It can't be written; the library has an error of its own for that.
    """
    error_type = _library().SafetensorError
    from safetensors.numpy import save_file

    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES.values():
            raise ValueError(f"{name!r} is of {tensor.dtype}, which safetensors files do not have")
    # It would write the memory of an array that is not contiguous, in the wrong order. And
    # `np.ascontiguousarray` gives a scalar an axis.
    ordered = {k: np.asarray(x, order="C") for k, x in tensors.items()}
    try:
        save_file(ordered, path, {"format": "pt"})
    except error_type as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


def new_folder(folder: Any) -> pathlib.Path:
    """The folder, made if need be; a ValueError if a model is there."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(path.name for path in folder.glob("*.safetensors*"))
    if found:
        raise ValueError(f"{folder}: must have no safetensors files yet, has {found[:3]}")
    return folder


def config_beside(files: TensorFiles) -> dict[str, Any]:
    """What is in ``config.json`` of a folder; empty if there is none."""
    path = files.path / "config.json"
    return read_json(path) if path.exists() else {}


def read_json(path: pathlib.Path, max_bytes: int = MAX_CONFIG) -> dict[str, Any]:
    """The object in a JSON file."""
    if not path.is_file():
        raise ValueError(f"{path}: is no file")
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{path}: must have at most {max_bytes} bytes, has {path.stat().st_size}")
    return parse_json(path.read_bytes(), str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object, whose keys differ; ``where`` it stands is for errors."""
    if data.count(b"[") + data.count(b"{") > _MAX_CONTAINERS:
        raise ValueError(f"{where}: must have at most {_MAX_CONTAINERS} JSON lists and objects")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be a JSON object, is {value!r:.100}")
    return value


def json_text(value: Mapping[str, Any], where: str) -> str:
    """JSON as transformers and PEFT write it; a TypeError says ``where`` something has none."""
    try:
        return json.dumps(value, indent=2, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{where} can't be written as JSON: {error}") from error


def _shards(
    groups: Iterable[Mapping[str, np.ndarray]], max_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    names: set[str] = set()
    for group in groups:
        if not names.isdisjoint(group):
            raise ValueError(f"tensors must have different names, got {sorted(group)} again")
        names.update(group)
        more = sum(tensor.nbytes for tensor in group.values())
        if shard and size + more > max_bytes:
            yield shard
            shard, size = {}, 0
        shard |= group
        size += more
    yield shard


def _part(folder: pathlib.Path, number: int) -> pathlib.Path:
    """Where a file is until it is known how many there are."""
    return folder / f"model-{number + 1:05}.safetensors.part"


def _beside(index: pathlib.Path, file: Any) -> pathlib.Path:
    """The file of that name in the folder of the index, and nowhere else."""
    is_name = isinstance(file, str) and not set(file) & set("/\\:\0")
    if not is_name or file.startswith(".") or not file.endswith(".safetensors"):
        raise ValueError(
            f"{index}: 'weight_map' must have names of safetensors files beside it, "
            f"has {file!r:.100}"
        )
    path = index.parent / file
    if not path.is_file():
        raise ValueError(f"{index}: 'weight_map' has {file}, which is no file")
    return path


def _open(path: pathlib.Path) -> Any:
    safetensors = _library()
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no file")
    with _naming(path):
        return safetensors.safe_open(path, framework="np")


@contextlib.contextmanager
def _naming(path: pathlib.Path, name: str | None = None) -> Iterator[None]:
    """The library's errors as ValueErrors that name the file and the tensor."""
    error_type = _library().SafetensorError
    try:
        yield
    except error_type as error:
        at = f"{path}: " if name is None else f"{path}: {name!r}: "
        raise ValueError(f"{at}{error}") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"keys must differ, got {str(sorted(key for key, _ in pairs))[:100]}")
    return found


def _library() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError("this needs `pip install safetensors`") from error
    return safetensors
