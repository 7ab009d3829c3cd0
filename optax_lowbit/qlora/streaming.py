"""Float checkpoints to matrices in few bits, tensor by tensor."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit.kernels.quantized_matrix import (
    NF4,
    QuantizedMatrix,
    check_spec,
    quantize_matrix,
)
from optax_lowbit.moments.policy import compiled_pattern
from optax_lowbit.qlora.bnb_matrices import DTYPES, assembled
from optax_lowbit.qlora.safetensors_files import TensorFiles, config_beside
from optax_lowbit.quant import QuantizedArray, QuantSpec, offset_scales, packing

# The output head stays as it is, as in Transformers. Of PyTorch's names, joined by dots.
HEAD = r"(^|\.)(lm_)?head\."
# Elements that are quantized at a time; what that takes beside the tensor follows from it.
PIECE = 2**16


class QuantizedCheckpoint(Mapping[str, np.ndarray | QuantizedMatrix]):
    """The tensors of a float model, some in few bits; what :func:`quantize_checkpoint` gives.

    Attributes:
      config: What is in ``config.json``; empty if there is none.
    """

    def __init__(self, files: TensorFiles, quantized: frozenset[str], spec: QuantSpec):
        self.config = config_beside(files)
        self._files, self._quantized, self._spec = files, quantized, spec

    def __getitem__(self, name: str) -> np.ndarray | QuantizedMatrix:
        tensor = self._files[name]
        return quantize_weight(tensor, self._spec) if name in self._quantized else tensor

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def quantize_checkpoint(
    path: Any, spec: QuantSpec = NF4, *, targets: str, exclude: str = HEAD
) -> QuantizedCheckpoint:
    """A float model from safetensors files, its matrices in few bits.

    Args:
      path: A folder with ``model.safetensors``, or several files and their index, and perhaps
        ``config.json``; or one safetensors file.
      spec: How to store a matrix.
      targets: A regular expression, searched for in names such as
        ``model.layers.0.self_attn.q_proj.weight``. What it finds is quantized if it has two axes
        and is of float32, float16 or bfloat16. Embeddings, which are looked up, are to be left out.
      exclude: A regular expression; what it finds stays. By default the output head.

    Returns:
      A mapping from PyTorch names to NumPy arrays and :class:`QuantizedMatrix`; as of
      :func:`read_bitsandbytes`, and equal to :func:`quantize_matrix` bit for bit. **Memory:** a
      tensor is read and quantized when it is asked for, and not kept: of floats, there are never
      more than those of one tensor and a few MiB.

    Raises:
      TypeError: If ``spec`` is no :class:`QuantSpec`, or ``targets`` or ``exclude`` no string.
      ValueError: If the spec does not fit, nothing is found, or a file is not what it has to be.
      FileNotFoundError: If there is no such file.
      ImportError: Without safetensors.

    Examples:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> from safetensors.numpy import save_file
      >>> from optax_lowbit import qlora
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> weights = {"a.q_proj.weight": np.ones((8, 64), np.float32), "norm.weight": np.ones(8)}
      >>> save_file(weights, folder / "model.safetensors")
      >>> model = qlora.quantize_checkpoint(folder, targets=r"_proj\\.weight$")
      >>> model["a.q_proj.weight"].shape, model["norm.weight"].shape
      ((64, 8), (8,))
      >>> qlora.write_bitsandbytes(folder / "in 4 bits", model)
    """
    check_spec(spec)
    chosen, left = (compiled_pattern("targets", targets), compiled_pattern("exclude", exclude))
    files = TensorFiles(path)
    quantized = {
        name
        for name in files
        if chosen.search(name) and not left.search(name) and _is_matrix(files.abstract(name))
    }
    if not quantized:
        raise ValueError(
            f"{targets=} must be found in the name of a matrix of {files.path}, and {exclude=} "
            f"not; it has {str([*files])[:1000]}"
        )
    return QuantizedCheckpoint(files, frozenset(quantized), spec)


def quantize_weight(weight: np.ndarray, spec: QuantSpec) -> QuantizedMatrix:
    """What :func:`quantize_matrix` gives of a PyTorch weight transposed, a piece at a time."""
    flat, block = weight.reshape(-1), spec.block_size
    plain = dataclasses.replace(spec, double_quant=False)
    full = flat.size // block * block
    codes = np.empty(packing.packed_size(flat.size, 4), np.uint8)
    absmax = np.empty(-(-flat.size // block), np.float32)
    step = min(max(PIECE // block, 1) * block, full)
    for start in range(0, full, step or 1):
        piece = flat[start : min(start + step, full)]
        # The last piece is filled up, so that one program serves all.
        rows = _piece_rows(np.pad(piece, (0, step - piece.size)), plain)
        end = start + piece.size
        codes[start // 2 : end // 2] = np.asarray(rows.codes).reshape(-1)[: piece.size // 2]
        absmax[start // block : end // block] = np.asarray(rows.scales).reshape(-1)[
            : piece.size // block
        ]
    if full < flat.size:
        rows = _piece_rows(flat[full:], plain)
        codes[full // 2 :], absmax[-1:] = rows.codes, rows.scales
    return assembled(codes, absmax, weight.shape, weight.dtype, spec, _coded)


def _coded(absmax: np.ndarray) -> Any:
    return jax.tree.map(np.asarray, _offset_scales(absmax))


_offset_scales = jax.jit(offset_scales.offset_scales)


def _piece_rows(flat: np.ndarray, spec: QuantSpec) -> QuantizedArray:
    return quantize_matrix(jnp.asarray(flat[:, None]), spec).rows


def _is_matrix(like: jax.ShapeDtypeStruct) -> bool:
    return like.ndim == 2 and like.size > 0 and like.dtype.name in DTYPES
