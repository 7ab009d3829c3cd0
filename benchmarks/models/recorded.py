"""Tiny checkpoints whose weights follow from their names, and what transformers computes.

They are in `tests/golden/models.json` and `models.npz`, which `benchmarks.models.record` writes.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 tensor of numbers that bfloat16 has, too, the same on every machine."""
    generator = np.random.RandomState(zlib.crc32(name.encode()))
    whole = generator.randint(-128, 129, shape).astype(np.float32)
    if len(shape) == 2:
        return whole / 256
    is_scale = "norm" in name.lower() and name.endswith(".weight")
    return 1 + np.round(whole / 4) / 128 if is_scale else whole / 512


class Recorded:
    """All variants, by their names."""

    def __init__(self):
        self._checkpoints = json.loads((GOLDEN / "models.json").read_text())
        with np.load(GOLDEN / "models.npz") as archive:
            self._arrays = dict(archive)

    @property
    def variants(self) -> list[str]:
        """The names."""
        return list(self._checkpoints)

    def shapes(self, variant: str) -> dict[str, list[int]]:
        """The shapes of the tensors that transformers saves."""
        return self._checkpoints[variant]["shapes"]

    def write(self, variant: str, folder: Path, dtype: Any = np.float32) -> Path:
        """Write a variant as Hugging Face's folder."""
        from safetensors.numpy import save_file

        shapes = self.shapes(variant).items()
        tensors = {name: weight(name, tuple(shape)).astype(dtype) for name, shape in shapes}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self._checkpoints[variant]["config"]))
        return folder

    def arrays(self, variant: str) -> dict[str, np.ndarray]:
        """What went in, int32 `input_ids`, `attention_mask`, perhaps `token_type_ids`, and out.

        `logits` are of float32, and `logits_bfloat16` of a computation in that, as float32.
        """
        found = {
            name.removeprefix(f"{variant}/"): array
            for name, array in self._arrays.items()
            if name.startswith(f"{variant}/")
        }
        return {
            name: array.view(ml_dtypes.bfloat16).astype(np.float32)
            if array.dtype == np.uint16
            else array
            for name, array in found.items()
        }
