"""What fine-tuning LLaMA models by QLoRA needs: sizes, and steps compiled ahead of time.

``python -m benchmarks.qlora_memory`` prints the sizes of docs/qlora.md;
``python -m benchmarks.qlora_memory llama-65b "tpu v5p:2x2x1"`` compiles a training step of that
model for one of the target's devices, from abstract shapes, with paged 4-bit AdamW; it needs the
target's compiler (``pip install "jax[tpu]"``).
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding

import optax_lowbit
from optax_lowbit import adapters, qlora
from optax_lowbit.kernels.backends import Backend
from optax_lowbit.memory import abstract_params
from optax_lowbit.memory.architectures import architecture
from optax_lowbit.memory.targets import target_devices
from optax_lowbit.memory.transformer import loss

# Gigabytes of a deployed Guanaco, arXiv 2305.14314, table 6.
PAPER = {"llama-7b": 5, "llama-13b": 10, "llama-33b": 21, "llama-65b": 41}
MATRICES = r"^layers/(query|key|value|output|gate|up|down)$"
# The recipe of the paper's appendix B.2: all linear layers.
LORA = adapters.LoRA(rank=64, alpha=16, targets=MATRICES)
BATCH, LENGTH = 1, 512
# Moments' codes are paged; their scales are small and stay.
MIN_SIZE = 2**20


def models(name, backend: Backend = "auto"):
    """The frozen model in few bits, and its adapters, as abstract arrays."""
    floats = abstract_params(name, "bfloat16")

    def quantized(params):
        return qlora.quantize_params(params, targets=MATRICES, backend=backend)

    base: Any = jax.eval_shape(quantized, floats)
    return base, jax.eval_shape(lambda params: LORA.init(params, 0), floats)


def sizes():
    """Prints the table of sizes."""
    print("| model | parameters | base | adapters, rank 64 | together, GB | paper, GB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, paper in PAPER.items():
        base, trained = models(name)
        count = sum(x.size for x in jax.tree.leaves(abstract_params(name)))
        # Adapters are deployed in 16 bits.
        parts = nbytes(base), nbytes(trained) / 2
        print(
            f"| {name} | {count / 1e9:.1f}e9 | {parts[0] / 1e9:.2f} | {parts[1] / 1e9:.2f} "
            f"| {sum(parts) / 1e9:.1f} | {paper} |"
        )


def compiled(name, target):
    """Prints what a training step needs on one device of the target."""
    device = SingleDeviceSharding(target_devices(target)[0])
    host = device.with_memory_kind("pinned_host")
    a = architecture(name)
    base, trained = models(name, backend="pallas_tpu")
    adamw = optax_lowbit.adamw4bit(2e-4, b2=0.999, backend="reference")
    tx = optax_lowbit.offload(adamw, min_size=MIN_SIZE)
    state = jax.eval_shape(tx.init, trained)

    def step(trained, state, base, tokens):
        def loss_of(trained):
            return loss(a, LORA.attach(base, trained), tokens, remat=True)

        value, grads = jax.value_and_grad(loss_of)(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    def on(tree, is_paged=False):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=host if is_paged and x.size > MIN_SIZE else device
            ),
            tree,
        )

    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32, sharding=device)
    arguments = on(trained), on(state, is_paged=True), on(base), tokens
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    memory: Any = program.memory_analysis()
    gigabyte = 1e9
    print(f"{name} on one device of {target}, batch {BATCH} of {LENGTH} tokens, in GB:")
    print(f"  base {nbytes(base) / gigabyte:.2f}, adapters {nbytes(trained) / gigabyte:.2f}")
    print(f"  state, on the host {nbytes(state) / gigabyte:.2f}")
    print(f"  arguments as laid out on the device {memory.argument_size_in_bytes / gigabyte:.2f}")
    print(f"  temporaries {memory.temp_size_in_bytes / gigabyte:.2f}")
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    print(f"  all {total / gigabyte:.2f}")


def nbytes(tree):
    """Bytes of abstract arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sizes()
    else:
        compiled(*sys.argv[1:])
