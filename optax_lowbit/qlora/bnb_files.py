"""4-bit models of bitsandbytes in safetensors files, as transformers reads and writes them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from optax_lowbit.kernels.quantized_matrix import QuantizedMatrix
from optax_lowbit.qlora.bnb_matrices import STATE, STORAGES, matrix_tensors, parts_of, read_matrix
from optax_lowbit.qlora.safetensors_files import (
    TensorFiles,
    config_beside,
    json_text,
    new_folder,
    write_tensors,
)


class BitsAndBytesFiles(Mapping[str, np.ndarray | QuantizedMatrix]):
    """The tensors of a model by their PyTorch names; what :func:`read_bitsandbytes` gives.

    Attributes:
      config: What is in ``config.json``; empty if there is none.
    """

    def __init__(self, path: Any):
        self._files = TensorFiles(path)
        self.config = config_beside(self._files)
        self._states: dict[str, str] = {}
        for state in self._files:
            name, is_state, _ = state.partition(STATE)
            if is_state:
                if name in self._states or name not in self._files:
                    raise ValueError(f"{self._files.where(state)}: {state!r} must be of one tensor")
                self._states[name] = state
        _check_config(self.config, self._states, f"{path}/config.json")
        parts = {f"{name}.{part}" for name in self._states for part in parts_of(1, is_nested=True)}
        self._names = dict.fromkeys(self._files.keys() - parts - set(self._states.values()))

    def __getitem__(self, name: str) -> np.ndarray | QuantizedMatrix:
        if name not in self._names:
            raise KeyError(name)
        if name in self._states:
            return read_matrix(self._files, name, self._states[name])
        return self._files[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def read_bitsandbytes(path: Any) -> BitsAndBytesFiles:
    """A model whose matrices bitsandbytes has quantized, from safetensors files.

    Args:
      path: A folder with ``model.safetensors``, or several files and their index, and perhaps
        ``config.json``; or one safetensors file.

    Returns:
      A mapping from PyTorch names to NumPy arrays and, of NumPy arrays, too,
      :class:`QuantizedMatrix`. **Memory:** a tensor is read when it is asked for, and not kept;
      ``dict(...)`` reads all. A matrix is ``(in, out)``, to be used as ``x @ w``; other tensors are
      as they are in the file. ``config`` is what is in ``config.json``.

    Raises:
      ValueError: If a file is not what it has to be: it, and the tensor or field, are named. What
        is wrong with one matrix is found when that is read.
      FileNotFoundError: If there is no such file.
      ImportError: Without safetensors.

    Examples:
      >>> import pathlib, tempfile
      >>> import jax, jax.numpy as jnp
      >>> from optax_lowbit import qlora
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> w = qlora.quantize_matrix(jax.random.normal(jax.random.key(0), (128, 64)))
      >>> qlora.write_bitsandbytes(folder, {"query.weight": w, "norm.weight": jnp.ones(64)})
      >>> model = qlora.read_bitsandbytes(folder)
      >>> sorted(model), model["query.weight"].shape
      (['norm.weight', 'query.weight'], (128, 64))
      >>> model.config["quantization_config"]["bnb_4bit_quant_type"]
      'nf4'

    References:
      `bitsandbytes <https://github.com/bitsandbytes-foundation/bitsandbytes>`_ 0.50,
      ``functional.QuantState`` and ``nn.Linear4bit``. A file with tables other than its nf4 and fp4
      is refused.
    """
    return BitsAndBytesFiles(path)


def write_bitsandbytes(
    folder: Any,
    tensors: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model as transformers and bitsandbytes write it, byte for byte.

    Args:
      folder: Made if need be; without safetensors files.
      tensors: By their PyTorch names, arrays ``(out, in)`` and :class:`QuantizedMatrix`
        ``(in, out)``; say, what :func:`read_bitsandbytes` or :func:`quantize_checkpoint` gives.
        They are taken one after the other. **Memory:** what goes into one file.
      config: What ``config.json`` is to have. Its ``quantization_config`` may have
        ``bnb_4bit_quant_storage``, the dtype under which codes are stored ("uint8"),
        ``bnb_4bit_compute_dtype`` ("float32") and ``llm_int8_skip_modules`` (modules of which
        there are two-dimensional floats, and "lm_head" if it is not in 4 bits). The others follow
        from the matrices.
      max_shard_bytes: A model that is larger goes into several files, with an index.

    Returns:
      Nothing, when all is written.

    Raises:
      TypeError: If ``max_shard_bytes`` is no int, or ``config`` can't be written as JSON.
      ValueError: If a matrix is a stack, or bitsandbytes has nothing like it; if ``config`` says
        otherwise than the matrices do; if the folder holds a model.
      OSError: If a file can't be written.
      ImportError: Without safetensors.

    Examples:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> from optax_lowbit import qlora
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> tensors = {"query.weight": qlora.quantize_matrix(jnp.ones((128, 64)))}
      >>> qlora.write_bitsandbytes(folder, tensors, config={"model_type": "llama"})
      >>> sorted(path.name for path in folder.iterdir())
      ['config.json', 'model.safetensors']
    """
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise TypeError(f"max_shard_bytes must be an int of at least 1, got {max_shard_bytes!r}")
    json_text(config or {}, "config")
    folder = new_folder(folder)
    described = _Description(config or {})
    groups = (described.written(name, tensors[name]) for name in tensors)
    write_tensors(folder, groups, max_shard_bytes)
    (folder / "config.json").write_text(json_text(described.config(), "config") + "\n")


class _Description:
    """What is in ``config.json`` of tensors that are written."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = dict(config)
        _check_config(self._config, (), "config")
        self._given: dict[str, Any] = dict(self._config.get("quantization_config") or {})
        self._storage = self._given.setdefault("bnb_4bit_quant_storage", "uint8")
        if str(self._storage) not in STORAGES:
            raise ValueError(
                f"config: 'bnb_4bit_quant_storage' must be one of {sorted(STORAGES)}, "
                f"got {self._storage!r}"
            )
        self._floats: list[str] = []
        self._quantized: list[str] = []

    def written(self, name: str, tensor: Any) -> dict[str, np.ndarray]:
        """The tensors that stand for one."""
        if not isinstance(tensor, QuantizedMatrix):
            if np.ndim(tensor) == 2:
                self._floats.append(name.removesuffix(".weight"))
            return {name: np.asarray(tensor)}
        spec = tensor.spec
        known = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": spec.codebook,
            "bnb_4bit_use_double_quant": bool(spec.double_quant),
        }
        for field, value in known.items():
            if self._given.setdefault(field, value) != value:
                raise ValueError(
                    f"{name!r}: config and other matrices have {field!r} {self._given[field]!r}, "
                    f"this one has {value!r}"
                )
        _check_skipped([name], self._given, "config")
        self._quantized.append(name)
        return matrix_tensors(name, tensor, self._storage)

    def config(self) -> dict[str, Any]:
        if not self._quantized:
            return self._config
        skipped = sorted({*map(self._exactly, self._floats), *self._free("lm_head")})
        rest = {"bnb_4bit_compute_dtype": "float32", "llm_int8_skip_modules": skipped}
        return {**self._config, "quantization_config": {**rest, **self._given}}

    def _free(self, name: str) -> list[str]:
        """The name, unless it stands for a matrix in 4 bits."""
        return [] if any(_is_skipped(each, name) for each in self._quantized) else [name]

    def _exactly(self, name: str) -> str:
        """What stands for the module and no matrix; to Transformers it is a regular expression."""
        return name if self._free(name) else f"^{re.escape(name)}$"


def _check_config(config: Mapping[str, Any], quantized: Any, where: str) -> None:
    given = config.get("quantization_config")
    if given is None:
        return
    if not isinstance(given, Mapping) or given.get("quant_method", "bitsandbytes") != (
        "bitsandbytes"
    ):
        raise ValueError(f"{where}: 'quantization_config' must be bitsandbytes, is {given!r:.200}")
    if given.get("load_in_4bit", True) is not True:
        raise ValueError(f"{where}: 'load_in_4bit' must be true, is {given['load_in_4bit']!r:.100}")
    _check_skipped(quantized, given, where)


def _check_skipped(quantized: Any, given: Mapping[str, Any], where: str) -> None:
    skipped = given.get("llm_int8_skip_modules") or []
    if not isinstance(skipped, list) or not all(isinstance(x, str) and x for x in skipped):
        raise ValueError(f"{where}: 'llm_int8_skip_modules' must be names, is {skipped!r:.100}")
    for name in quantized:
        if any(_is_skipped(name, each) for each in skipped):
            raise ValueError(f"{where}: 'llm_int8_skip_modules' names {name!r}, which is in 4 bits")


def _is_skipped(name: str, skipped: str) -> bool:
    """Whether Transformers takes a tensor for one of a module that is not in 4 bits."""
    module = name.removesuffix(".weight")
    return f"{module}.".startswith(f"{skipped}.") or module.endswith(skipped)
