"""How far the example's models are from transformers, with the same weights.

``python -m benchmarks.models.parity`` prints the table of docs/models.md: of each recorded variant
the largest difference of a logit, with layers in a scan and unrolled. ``python -m
benchmarks.models.parity FOLDER`` does so for checkpoints of yours: in the folder are those that
transformers saved, and ``io.npz`` with ``NAME/input_ids``, ``NAME/attention_mask`` and
``NAME/logits`` of each.
"""

import dataclasses
import sys
from collections.abc import Mapping
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


def table_rows(
    name: str, stored: HuggingFaceModel, recorded: Mapping[str, np.ndarray]
) -> list[str]:
    """Rows of the table, one for each dtype that logits are recorded in."""
    rows = []
    for dtype, key in (("float32", "logits"), ("bfloat16", "logits_bfloat16")):
        if key not in recorded:
            continue
        expected = at_tokens(recorded[key], recorded)
        found = (
            np.abs(logits_of(stored, recorded, dtype=dtype, scan_layers=scan) - expected).max()
            for scan in (True, False)
        )
        cells = (name, dtype, *(f"{x:.1e}" for x in found), f"{np.abs(expected).max():.1f}")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main(arguments: list[str]) -> None:
    """Prints the table."""
    run = run_record("benchmarks.models.parity", "flax")
    print(f"`{run['command']}`, {run['date']}, JAX {run['versions']['jax']}\n")
    print("| checkpoint | dtype | in a scan | unrolled | largest logit |")
    print("| --- | --- | ---: | ---: | ---: |")
    if arguments:
        with np.load(Path(arguments[0]) / "io.npz") as archive:
            arrays = dict(archive)
        for name in dict.fromkeys(key.partition("/")[0] for key in arrays):
            of_model = {
                k.partition("/")[2]: x for k, x in arrays.items() if k.startswith(f"{name}/")
            }
            print(
                *table_rows(name, HuggingFaceModel(Path(arguments[0]) / name), of_model), sep="\n"
            )
        return
    recorded = Recorded()
    with TemporaryDirectory() as folder:
        for name in recorded.variants:
            stored = HuggingFaceModel(recorded.write(name, Path(folder) / name))
            print(*table_rows(name, stored, recorded.arrays(name)), sep="\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, UsageError) as error:
        sys.exit(f"error: {error}")
