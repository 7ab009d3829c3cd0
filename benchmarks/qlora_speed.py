"""NF4 on a CPU beside qwix and bitsandbytes: quantizing, dequantizing, products, a training step.

``python -m benchmarks.qlora_speed`` prints the table of docs/qlora.md and writes
results/qlora_speed.json. Contestants take turns in one process, as in benchmarks/speed. Those that
are not installed are left out: ``pip install -r benchmarks/requirements-peers.txt``.
"""

import dataclasses
import json
import operator
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# PyTorch's threads would spin while they wait, and those of JAX would wait for them.
os.environ["OMP_WAIT_POLICY"] = "passive"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.qlora_errors import PLAIN
from benchmarks.quality.report import markdown_table
from benchmarks.records import run_record
from benchmarks.speed.contestants import installed_version
from benchmarks.speed.measure import summary
from benchmarks.speed.rounds import Rounds, Runner, interleave
from optax_lowbit import adapters, qlora

RESULTS = Path(__file__).parent / "results" / "qlora_speed.json"
SIZES = (2048, 4096)
ROWS = (1, 32, 512)  # of x, times the largest matrix
LAYERS, WIDTH, BATCH = 4, 1024, 256
LORA = adapters.LoRA(rank=16, alpha=16, targets="kernel")
ROUNDS = Rounds(seconds=4, least=5, most=40)
OURS, NESTED = "optax_lowbit", "optax_lowbit, double quantization"
CHECKPOINT = "optax_lowbit, of a checkpoint"
WHOLE, FLOATS = "optax_lowbit, dequantized whole", "float32"

Contestants = Iterable[tuple[str, Runner]]


class JaxCall(Runner):
    """``function(*arguments)``, compiled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.arguments = arguments
        self.compiled: Any = jax.jit(function).lower(*arguments).compile()

    def fill(self) -> None:
        """Nothing."""

    def step(self) -> None:
        """One call."""
        jax.block_until_ready(self.compiled(*self.arguments))


@dataclasses.dataclass
class TorchCall(Runner):
    """``function()`` of PyTorch, whose calls on CPUs are done when they return."""

    function: Callable[[], Any]

    def fill(self) -> None:
        """Nothing."""

    def step(self) -> None:
        """One call."""
        self.function()


def main():
    """Times everything, writes the results and prints the table."""
    peers = {name: installed_version(name) is not None for name in ("qwix", "bitsandbytes")}
    parts = {}
    for size in SIZES:
        parts[f"quantize {size}x{size}"] = timed(quantizers(size, peers))
        parts[f"dequantize {size}x{size}"] = timed(dequantizers(size, peers))
    for rows in ROWS:
        parts[f"{rows} x {SIZES[-1]}x{SIZES[-1]}"] = timed(products(rows, SIZES[-1], peers))
    steps = dict(training_steps(peers))
    parts["training step"] = timed(steps.items())
    temporaries = {
        name: step.compiled.memory_analysis().temp_size_in_bytes
        for name, step in steps.items()
        if isinstance(step, JaxCall)
    }
    run = run_record("benchmarks.qlora_speed", "flax", "qwix", "bitsandbytes", "torch")
    results = {"run": run, "parts": parts, "bytes of temporaries": temporaries}
    RESULTS.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    print(table(parts))
    print()
    rows = [[name, f"{size / 1e6:.1f}"] for name, size in temporaries.items()]
    print(markdown_table(["training step", "temporaries, MB"], rows))


def timed(contestants: Contestants) -> dict[str, dict[str, Any]]:
    """The seconds of each contestant, by samples in turns, with their minimum and median."""
    times = interleave(dict(contestants), ROUNDS)
    return {name: summary(seconds) for name, seconds in times.items()}


def quantizers(size: int, peers: dict[str, bool]) -> Contestants:
    """A float32 matrix to NF4 in blocks of 64 along the axis that is summed over.

    bitsandbytes is given the transposed one, a PyTorch weight; so are we, once, as we read one:
    columns one after the other.
    """
    w = np.random.default_rng(0).standard_normal((size, size), np.float32)
    transposed = w.T.copy()
    for name, spec in ((OURS, PLAIN), (NESTED, qlora.NF4)):
        yield name, JaxCall(lambda w, spec=spec: qlora.quantize_matrix(w, spec), jnp.asarray(w))
    columns = jnp.asarray(transposed.reshape(-1, 1))
    yield CHECKPOINT, JaxCall(lambda w: qlora.quantize_matrix(w, PLAIN), columns)
    if peers["qwix"]:
        yield "qwix", JaxCall(qwix_nf4, jnp.asarray(w))
    if peers["bitsandbytes"]:
        import bitsandbytes.functional as bnb  # pyright: ignore[reportMissingImports]
        import torch  # pyright: ignore[reportMissingImports]

        weight = torch.from_numpy(transposed)
        yield "bitsandbytes", TorchCall(lambda: bnb.quantize_4bit(weight, quant_type="nf4"))


def dequantizers(size: int, peers: dict[str, bool]) -> Contestants:
    """And back, in the order in which it is stored."""
    w = np.random.default_rng(0).standard_normal((size, size), np.float32)
    for name, spec in ((OURS, PLAIN), (NESTED, qlora.NF4)):
        quantized = qlora.quantize_matrix(jnp.asarray(w), spec)
        yield name, JaxCall(lambda w: w.dequantize().mT, quantized)
    if peers["qwix"]:
        import qwix  # pyright: ignore[reportMissingImports]

        yield "qwix", JaxCall(qwix.dequantize, jax.jit(qwix_nf4)(jnp.asarray(w)))
    if peers["bitsandbytes"]:
        import bitsandbytes.functional as bnb  # pyright: ignore[reportMissingImports]
        import torch  # pyright: ignore[reportMissingImports]

        codes, state = bnb.quantize_4bit(torch.from_numpy(w.T.copy()), quant_type="nf4")
        yield "bitsandbytes", TorchCall(lambda: bnb.dequantize_4bit(codes, state))


def products(rows: int, size: int, peers: dict[str, bool]) -> Contestants:
    """``x @ W`` for float32 ``x`` of so many rows."""
    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal((n, size), np.float32) for n in (size, rows))
    for name, spec in ((OURS, PLAIN), (NESTED, qlora.NF4)):
        quantized = qlora.quantize_matrix(jnp.asarray(w), spec)
        yield name, JaxCall(operator.matmul, jnp.asarray(x), quantized)
    yield WHOLE, JaxCall(lambda x, w: x @ w.dequantize(), jnp.asarray(x), quantized)
    yield FLOATS, JaxCall(jnp.matmul, jnp.asarray(x), jnp.asarray(w))
    if peers["qwix"]:
        import qwix  # pyright: ignore[reportMissingImports]

        coded = jax.jit(qwix_nf4)(jnp.asarray(w))
        yield "qwix", JaxCall(lambda x, w: x @ qwix.dequantize(w), jnp.asarray(x), coded)
    if peers["bitsandbytes"]:
        import bitsandbytes.functional as bnb  # pyright: ignore[reportMissingImports]
        import torch  # pyright: ignore[reportMissingImports]
        from bitsandbytes import matmul_4bit  # pyright: ignore[reportMissingImports]

        codes, state = bnb.quantize_4bit(torch.from_numpy(w.T.copy()), quant_type="nf4")
        yield "bitsandbytes", TorchCall(lambda: matmul_4bit(torch.from_numpy(x), codes.t(), state))


def qwix_nf4(w: jax.Array) -> Any:
    """What qwix keeps of a kernel ``(n, m)``."""
    import qwix  # pyright: ignore[reportMissingImports]

    return qwix.quantize(w, "nf4", channelwise_axes=(1,), tiled_axes={0: 64})


def training_steps(peers: dict[str, bool]) -> Contestants:
    """Loss and gradients with respect to the input and the adapters of a stack of layers."""
    rng = np.random.default_rng(0)
    kernels = [rng.standard_normal((WIDTH, WIDTH), np.float32) / 32 for _ in range(LAYERS)]
    x = rng.standard_normal((BATCH, WIDTH), np.float32)
    floats = {f"{i}": {"kernel": jnp.asarray(kernel)} for i, kernel in enumerate(kernels)}
    adapted = LORA.init(floats, key=0)
    for name, frozen in (
        ("LoRA on float32", floats),
        (OURS, qlora.quantize_params(floats, PLAIN)),
        (NESTED, qlora.quantize_params(floats)),
    ):
        yield name, JaxCall(jax.value_and_grad(own_loss, (0, 1)), adapted, jnp.asarray(x), frozen)
    if peers["qwix"]:
        yield "qwix", qwix_step(kernels, x)
    if peers["bitsandbytes"]:
        for name, in_few_bits in (("PyTorch LoRA on float32", False), ("bitsandbytes", True)):
            yield name, torch_step(kernels, x, in_few_bits)


def own_loss(adapted: Any, x: jax.Array, frozen: Any) -> jax.Array:
    """Mean square of the last layer's output."""
    params = LORA.attach(frozen, adapted)
    for layer in range(LAYERS):
        x = jax.nn.relu(x @ params[f"{layer}"]["kernel"])
    return jnp.mean(x**2)


def qwix_step(kernels: list[np.ndarray], x: np.ndarray) -> Runner:
    """The layers as an NNX model that qwix's provider quantizes and gives adapters."""
    import qwix  # pyright: ignore[reportMissingImports]

    class Stack(nnx.Module):
        def __init__(self):
            self.layers = nnx.List(
                nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=nnx.Rngs(0)) for _ in kernels
            )
            for layer, kernel in zip(self.layers, kernels, strict=True):
                layer.kernel[...] = jnp.asarray(kernel)

        def __call__(self, x):
            for layer in self.layers:
                x = jax.nn.relu(layer(x))
            return x

    provider = qwix.LoraProvider(
        module_path=".*", rank=LORA.rank, alpha=LORA.alpha, weight_qtype="nf4", tile_size=64
    )
    model = qwix.apply_lora_to_model(Stack(), provider, jnp.asarray(x), rngs=nnx.Rngs(0))
    graph, adapted, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def loss(adapted, x, frozen):
        return jnp.mean(nnx.merge(graph, adapted, frozen)(x) ** 2)

    return JaxCall(jax.value_and_grad(loss, (0, 1)), adapted, jnp.asarray(x), frozen)


def torch_step(kernels: list[np.ndarray], x: np.ndarray, in_few_bits: bool) -> Runner:
    """The layers in PyTorch, in floats or as bitsandbytes' `Linear4bit`."""
    import bitsandbytes.nn  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    layers, trained = [], []
    for kernel in kernels:
        weight = torch.from_numpy(kernel.T.copy())
        layer = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        if in_few_bits:
            layer = bitsandbytes.nn.Linear4bit(
                WIDTH, WIDTH, bias=False, compress_statistics=False, quant_type="nf4"
            )
        layer.load_state_dict({"weight": weight})
        layers.append(layer.to("cpu").requires_grad_(False))
        a = torch.randn(LORA.rank, WIDTH) / 32
        trained.append([a.requires_grad_(), torch.zeros(WIDTH, LORA.rank, requires_grad=True)])
    inputs = torch.from_numpy(x).requires_grad_()
    leaves = [inputs, *(leaf for pair in trained for leaf in pair)]
    linear = torch.nn.functional.linear

    def step():
        hidden = inputs
        for layer, (a, b) in zip(layers, trained, strict=True):
            low = linear(linear(hidden, a), b)
            hidden = torch.relu(layer(hidden) + LORA.alpha / LORA.rank * low)
        return torch.autograd.grad((hidden**2).mean(), leaves)

    return TorchCall(step)


def table(parts: dict[str, dict[str, Any]]) -> str:
    """Minimum and median of each contestant and part: of `OURS` in ms, of the others over those."""

    def cell(times: dict[str, Any], name: str) -> str:
        if name not in times:
            return ""
        units = {"minimum": 1e-3, "median": 1e-3} if name == OURS else times[OURS]
        shown = (times[name][kind] / units[kind] for kind in ("minimum", "median"))
        return ", ".join(f"{each:.1f}" if name == OURS else f"{each:.2f}" for each in shown)

    names = dict.fromkeys(name for times in parts.values() for name in times)
    rows = [
        [f"{name}, ms" if name == OURS else name, *(cell(times, name) for times in parts.values())]
        for name in names
    ]
    return markdown_table(["", *parts], rows)


if __name__ == "__main__":
    main()
