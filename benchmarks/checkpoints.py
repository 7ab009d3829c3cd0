"""What the manifest and its checksums cost beside Orbax alone, and what they are for.

``python -m benchmarks.checkpoints`` prints the table and the count of docs/checkpoints.md.
"""

import pathlib
import shutil
import statistics
import sys
import tempfile
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import optax_lowbit
from optax_lowbit import checkpoint
from optax_lowbit.kernels.checksums import checksum

ROUNDS = 5
FLIPS = 200


def main():
    """Prints all of it."""
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda *_: None  # Orbax leaves coroutines behind where reading fails
    folder = pathlib.Path(tempfile.mkdtemp())
    print("| state | checksums | save | Orbax's save | restore | Orbax's restore |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, tx in (
        ("adamw4bit", optax_lowbit.adamw4bit(1e-3)),
        ("optax.adamw", optax.adamw(1e-3)),
    ):
        print(row(name, random_state(tx), folder / name))
    print(f"Orbax restored {other_numbers(folder / 'flips')} of {FLIPS} changed bits unnoticed")
    shutil.rmtree(folder)


def random_state(tx):
    """The state of 32 Mi parameters, with random numbers so that they do not compress."""
    rng = np.random.default_rng(0)
    params = {f"w{i}": jnp.zeros((4096, 1024)) for i in range(8)}

    def draw(x):
        if x.dtype == jnp.uint8:
            return jnp.asarray(rng.integers(0, 256, x.shape, np.uint8))
        return jnp.asarray(rng.random(x.shape, np.float32)) if x.ndim else x

    return jax.tree.map(draw, tx.init(params))


def row(name, state, folder):
    """One line of the table: medians of seconds, taken in turns."""
    arrays = jax.tree.leaves(state)

    def orbax_save():
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "orbax", state, force=True)

    def orbax_restore():
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder / "orbax", state)

    def save():
        shutil.rmtree(folder / "ours", ignore_errors=True)
        checkpoint.save(folder / "ours", state)

    jobs = [
        lambda: [checksum(x) for x in arrays],
        save,
        orbax_save,
        lambda: checkpoint.restore(folder / "ours", state),
        orbax_restore,
    ]
    seconds = [[timed(job) for job in jobs] for _ in range(ROUNDS + 1)][1:]
    medians = [f"{statistics.median(times):.2f} s" for times in zip(*seconds)]
    mib = sum(x.nbytes for x in arrays) / 2**20
    return f"| `{name}`, {mib:.0f} MiB | {' | '.join(medians)} |"


def timed(job):
    """Seconds until the results of a job are there."""
    start = time.perf_counter()
    jax.block_until_ready(job())
    return time.perf_counter() - start


def other_numbers(folder):
    """How often Orbax restores other numbers, without an error, after one bit has changed."""
    rng = np.random.default_rng(0)
    state = {"codes": jnp.asarray(rng.integers(0, 256, (256, 512), np.uint8)),
             "floats": jnp.asarray(rng.random((128, 256), np.float32))}  # fmt: skip
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, state)
    files = sorted(file for file in folder.rglob("d/*") if file.stat().st_size > 3000)
    unnoticed = 0
    for _ in range(FLIPS):
        file = files[rng.integers(len(files))]
        content = file.read_bytes()
        changed = bytearray(content)
        changed[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        file.write_bytes(changed)
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                restored = checkpointer.restore(folder, state)
            unnoticed += not jax.tree.all(jax.tree.map(np.array_equal, restored, state))
        except Exception:  # of any kind: it was noticed
            pass
        file.write_bytes(content)
    return unnoticed


if __name__ == "__main__":
    main()
