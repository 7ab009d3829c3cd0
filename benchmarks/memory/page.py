"""The tables of ``docs/memory.md`` from ``results/memory.json``.

``python -m benchmarks.memory.page`` writes them again.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.quality.report import markdown_table
from optax_lowbit.memory.architectures import ARCHITECTURES
from optax_lowbit.memory.sizes import parse_size
from optax_lowbit.memory.training import plan_training

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results" / "memory.json"
PAGE = REPOSITORY / "docs" / "memory.md"
BEGIN, END = "<!-- tables: made by python -m benchmarks.memory.page -->", "<!-- end of tables -->"
MEMORIES = ("24GB", "80GB")


def gib(nbytes: int) -> str:
    """Of all bytes, two decimals."""
    return f"{nbytes / 2**30:.2f}"


def stated_table() -> str:
    """Figures of arXiv 2309.01507 for LLaMA-7B beside exact bytes, without activations."""
    full, low = (
        plan_training(ARCHITECTURES["llama-7b"], name, dtype="bfloat16")
        for name in ("adamw-float32", "adamw4bit")
    )
    weights = full.parameters.total + full.gradients.total
    figures = [
        ("float32 moments of 7.0e9 parameters", "52.2", 8 * 7_000_000_000),
        ("float32 moments of all 6.738e9", "", full.state.total),
        ("4-bit moments", "", low.state.total),
        ("bfloat16 parameters and gradients, float32 moments", "75.40", weights + full.state.total),
        ("bfloat16 parameters and gradients, 4-bit moments", "31.87", weights + low.state.total),
        ("saved", "43.54", full.state.total - low.state.total),
    ]
    head = ["LLaMA-7B", "stated, GB", "bytes", "10^9 bytes", "GiB"]
    rows = [[name, stated, f"{n:,}", f"{n / 1e9:.2f}", gib(n)] for name, stated, n in figures]
    return markdown_table(head, rows)


def llama_table(part: dict[str, Any]) -> str:
    """Steps side by side: what each device needs, all of them, and what is saved."""
    head = ["optimizer", "batch", "arguments", "temporaries", "a device", "all devices", "saved"]
    baseline = part["steps"][0]["all devices"]
    rows = []
    for step in part["steps"]:
        saved = 1 - step["all devices"] / baseline
        rows.append([
            step["optimizer"], str(step["batch"]), gib(step["arguments"]),
            gib(step["temporaries"]), gib(step["device"]), gib(step["all devices"]),
            f"{saved:.1%}" if saved else "",
        ])  # fmt: skip
    return markdown_table(head, rows)


def largest_table(part: dict[str, Any]) -> str:
    """Which model fits in which memory."""
    head = ["model", "optimizer", "arguments", "temporaries", "all", *MEMORIES]
    rows = []
    for step in part["steps"]:
        fits = ["yes" if step["device"] <= parse_size(size) else "no" for size in MEMORIES]
        rows.append([
            step["model"], step["optimizer"], gib(step["arguments"]), gib(step["temporaries"]),
            gib(step["device"]), *fits,
        ])  # fmt: skip
    return markdown_table(head, rows)


TITLES = {
    "llama-h100": "LLaMA-7B, compiled for two H100s",
    "llama-v5p": "LLaMA-7B, compiled for a TPU v5p:2x2x1",
    "largest": "The largest model that fits, compiled for one H100",
}


def tables(results: dict[str, Any]) -> str:
    """The sections of the page, each with its command, date and versions."""
    sections = [
        f"### Figures of the paper\n\n{stated_table()}\n\n`python -m benchmarks.memory.page`."
    ]
    for part, title in TITLES.items():
        if part not in results:
            continue
        run = results[part]["run"]
        versions = ", ".join(f"{name} {v}" for name, v in run["versions"].items() if v)
        table = largest_table if part == "largest" else llama_table
        sections.append(
            f"### {title}\n\n{table(results[part])}\n\n"
            f"`{run['command']}`, {run['date']}; {versions}."
        )
    return "\n\n".join(sections)


def write_page(results: dict[str, Any]) -> None:
    """Puts the tables between their marks."""
    text = PAGE.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables(results)}\n\n{END}{after}")


if __name__ == "__main__":
    write_page(json.loads(RESULTS.read_text()))
