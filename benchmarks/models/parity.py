"""How far the example's models are from transformers, with the same weights.

``python -m benchmarks.models.parity`` prints the table of docs/models.md: of each recorded variant
the largest difference of a logit, in float32 and bfloat16, with layers in a scan and unrolled; how
far transformers in bfloat16 is from itself in float32; and the largest logit. ``python -m
benchmarks.models.parity FOLDER`` does so for checkpoints of yours: in the folder are those that
transformers saved, and ``io.npz`` with ``NAME/input_ids``, ``NAME/attention_mask`` and
``NAME/logits`` of each.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.models.recorded import Recorded
from benchmarks.records import run_record
from examples.llm.errors import UsageError
from examples.llm.models.building import abstract_model
from examples.llm.models.huggingface_files import HuggingFaceModel


def logits_of(
    stored: Any,
    inputs: Mapping[str, np.ndarray],
    *,
    dtype: Any = jnp.float32,
    **changes: Any,
) -> np.ndarray:
    """What a model makes of recorded inputs.

    Args:
      stored: the model, as `open_model` gives it.
      inputs: `input_ids`, `attention_mask`, and of BERT `token_type_ids`.
      dtype: of the weights, and of what is computed.
      **changes: fields of the config.

    Returns:
      float32: where the mask is 1, `(tokens, vocabulary)`, or of a classifier `(batch, classes)`.
    """
    graph, _ = abstract_model(dataclasses.replace(stored.config, **changes))
    parameters = jax.tree.map(lambda x: x.astype(dtype), stored.parameters())
    tokens, mask = (jnp.asarray(inputs[name]) for name in ("input_ids", "attention_mask"))
    is_pair = "token_type_ids" in inputs
    types = {"types": jnp.asarray(inputs["token_type_ids"])} if is_pair else {}

    @jax.jit
    def run(parameters):
        model: Any = nnx.merge(graph, nnx.State(parameters))
        if hasattr(model, "class_logits"):
            return model.class_logits(tokens, mask, **types)
        return model.logits(model.features(tokens, mask, **types))

    return at_tokens(np.asarray(run(parameters)), inputs)


def at_tokens(logits: np.ndarray, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Logits but for those at padding, which depend on how attention is computed."""
    return logits if logits.ndim == 2 else logits[inputs["attention_mask"] == 1]


def table_row(name: str, stored: HuggingFaceModel, recorded: Mapping[str, np.ndarray]) -> str:
    """A row of the table; numbers of a dtype are missing where no logits are recorded in it."""
    exact, cells = at_tokens(recorded["logits"], recorded), [name]
    for dtype, key in (("float32", "logits"), ("bfloat16", "logits_bfloat16")):
        expected = at_tokens(recorded[key], recorded) if key in recorded else None
        for scan in (True, False):
            if expected is None:
                cells.append("")
                continue
            found = logits_of(stored, recorded, dtype=dtype, scan_layers=scan)
            cells.append(f"{np.abs(found - expected).max():.1e}")
    rounded = recorded.get("logits_bfloat16")
    own = "" if rounded is None else f"{np.abs(at_tokens(rounded, recorded) - exact).max():.1e}"
    return f"| {' | '.join([*cells, own, f'{np.abs(exact).max():.1f}'])} |"


def checkpoints(folder: Path) -> Iterator[tuple[str, HuggingFaceModel, dict[str, np.ndarray]]]:
    """Name, model and arrays of each checkpoint in a folder."""
    with np.load(folder / "io.npz") as archive:
        arrays = dict(archive)
    for name in dict.fromkeys(key.partition("/")[0] for key in arrays):
        prefix = f"{name}/"
        own = {key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)}
        yield name, HuggingFaceModel(folder / name), own


def recorded_checkpoints() -> Iterator[tuple[str, HuggingFaceModel, dict[str, np.ndarray]]]:
    """Name, model and arrays of each recorded variant."""
    recorded = Recorded()
    with TemporaryDirectory() as folder:
        for name in recorded.variants:
            stored = HuggingFaceModel(recorded.write(name, Path(folder) / name))
            yield name, stored, recorded.arrays(name)


def main(arguments: list[str]) -> None:
    """Prints the table."""
    run = run_record("benchmarks.models.parity", "flax")
    print(f"`{run['command']}`, {run['date']}, JAX {run['versions']['jax']}, {run['machine']}\n")
    print("| checkpoint | scan | unrolled | scan, bf16 | unrolled, bf16 | its own bf16 | logits |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in checkpoints(Path(arguments[0])) if arguments else recorded_checkpoints():
        print(table_row(*row))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, UsageError) as error:
        sys.exit(f"error: {error}")
