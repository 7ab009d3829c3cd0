"""``docs/speed.md`` from ``results/speed.json``: ``python -m benchmarks.speed.page`` redraws it."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.report import markdown_table
from benchmarks.speed.contestants import BASELINE, BY_NAME, PLAIN, SGD, SGD_4BIT
from benchmarks.speed.figure import MARKERS, draw

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results" / "speed.json"
PAGE = REPOSITORY / "docs" / "speed.md"
FIGURE = REPOSITORY / "docs" / "images" / "speed.png"

INTRO = """# Speed

What a step of an optimizer takes on a CPU, optax_lowbit's and its peers'. Ratios are to
`optax.adamw` with float32 moments, measured in the same process: below 1 is faster than it.

The contestants of a table take turns: a round is one sample of each, forwards and backwards through
the list by turns, and slow ones sit out some rounds. A sample is the mean over as many steps as
take 20 ms, at least one, with new gradients written before each (not timed) and each waited for.
*min* and *median* are over the samples, and ratios are of minima and of medians. Where not all fit
into memory at a time, they are split into groups, each with a measurement of `optax.adamw` of its
own, to which its ratios are. Parameters and gradients are float32, and all have the same
hyperparameters.

A step of JAX is `update` and `optax.apply_updates` compiled together, gradients, state and
parameters donated, in whichever of two orders of the arguments a trial on one matrix found faster:
new parameters can be written over the old ones or over the gradients. `fused_apply` is
`optax_lowbit.fused_apply`. PyTorch's optimizers work in place, and those of torchao compile
themselves. OpenMP's threads wait without spinning (`OMP_WAIT_POLICY=passive`), as they must beside
other programs.

*bytes* are those a parameter's step has to move at least: its gradient read, the parameter and its
state read and written. *x bound* is the minimal time over what these bytes take at the highest
bandwidth seen in the same rounds, by `x + 1` written over a float32 array of {array} MiB, each
element counted as 4 bytes read and 4 written. Data that stay in a cache can be faster than this
bound. *first step* is the first step's seconds with tracing and compiling."""

TITLES = {
    "matrix": "One matrix",
    "large": "One large matrix",
    "tree": "A transformer's parameters",
    "training": "Inside a training step",
    "scaling": "By size",
    "threads": "By number of processors",
    "instructions": "By instruction set",
    "memory": "Memory",
}


def collected(job: dict) -> dict[str, dict[str, Any]]:
    """The contestants of all groups of a timing job, by name, ready for a table.

    A contestant of several groups has its samples put together. Each has ``ratio`` and
    ``median ratio`` to the baseline of its own group, which is 1 for the baseline, and
    ``bandwidth``, bytes a second, the highest of its groups.
    """
    found: dict[str, dict[str, Any]] = {}
    for group in job["groups"]:
        baseline = group["contestants"][BASELINE]
        bandwidth = group["bandwidth"]["bytes"] / group["bandwidth"]["minimum"]
        for name, timed in group["contestants"].items():
            ratios = {
                "ratio": timed["minimum"] / baseline["minimum"],
                "median ratio": timed["median"] / baseline["median"],
            }
            earlier = found.get(name)
            if earlier is None:
                found[name] = {**timed, **ratios, "bandwidth": bandwidth}
                continue
            earlier["seconds"] = earlier["seconds"] + timed["seconds"]
            earlier["minimum"] = min(earlier["minimum"], timed["minimum"])
            earlier["median"] = statistics.median(earlier["seconds"])
            earlier["bandwidth"] = max(earlier["bandwidth"], bandwidth)
    order = list(BY_NAME)
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def bytes_moved(nbytes: dict[str, int]) -> int:
    """What a step has to move: gradients read, parameters and state read and written."""
    return nbytes["grads"] + 2 * (nbytes["params"] + nbytes["state"])


def bandwidth_note(job: dict) -> str:
    """The bandwidth of each group of a job."""
    found = [
        (group["bandwidth"]["bytes"] / group["bandwidth"][kind] / 1e9)
        for group in job["groups"]
        for kind in ("minimum", "median")
    ]
    pairs = [f"{best:.1f} ({median:.1f})" for best, median in zip(found[::2], found[1::2])]
    groups = "" if len(pairs) == 1 else f" in {len(pairs)} groups"
    return f"Bandwidth, GB/s, highest (median){groups}: {', '.join(pairs)}."


def update_section(part: dict) -> str:
    """A table of optimizer steps."""
    (job,) = part["jobs"]
    elements, rows = job["elements"], []
    for name, timed in collected(job).items():
        moved = bytes_moved(timed["bytes"])
        bound = moved / timed["bandwidth"]
        rows.append(
            [
                name,
                f"{timed['ratio']:.2f}",
                f"{timed['median ratio']:.2f}",
                f"{timed['minimum'] / elements * 1e9:.2f}",
                f"{timed['median'] / elements * 1e9:.2f}",
                f"{timed['bytes']['state'] / elements:.2f}",
                f"{moved / elements:.2f}",
                f"{timed['minimum'] / bound:.1f}",
                f"{timed['first_step']:.1f}",
            ]
        )
    head = [
        "optimizer", "x optax.adamw, min", "median", "ns/element, min", "median",
        "state, bytes/element", "bytes", "x bound", "first step, s",
    ]  # fmt: skip
    return (
        f"{counts(job)}. {bandwidth_note(job)}\n\n{markdown_table(head, rows)}\n\n{sgd_note(job)}"
        f"{calls_note(job)}"
    )


def counts(job: dict) -> str:
    """What a job steps over."""
    name = job["workload"][0].upper() + job["workload"][1:]
    leaves = "1 leaf" if job["leaves"] == 1 else f"{job['leaves']} leaves"
    return f"{name}: {job['elements']:,} elements in {leaves}"


def sgd_note(job: dict) -> str:
    """4-bit SGD against SGD."""
    found = collected(job)
    if SGD not in found or SGD_4BIT not in found:
        return ""
    ours, theirs = found[SGD_4BIT], found[SGD]
    ratio, median = (ours[each] / theirs[each] for each in ("ratio", "median ratio"))
    return (
        f"`{SGD_4BIT}` takes {ratio:.2f} times the time of `optax.sgd` with momentum (minima; "
        f"medians {median:.2f}). "
    )


def calls_note(job: dict) -> str:
    """Which steps call custom kernels, and which order of arguments they were run with."""
    found = collected(job)
    by_calls: dict[str, list[str]] = {}
    over_gradients = []
    for name, timed in found.items():
        if "donated" not in timed["details"]:
            continue
        calls = ", ".join(f"`{call}`" for call in timed["details"]["custom calls"])
        by_calls.setdefault(calls, []).append(f"`{name}`")
        if timed["details"]["donated"].startswith("grads"):
            over_gradients.append(f"`{name}`")
    notes = [
        f"Compiled with custom calls ({calls}): {'; '.join(names)}."
        for calls, names in by_calls.items()
        if calls
    ] or ["None of JAX's steps has a custom call: they are XLA's own code."]
    if over_gradients:
        notes.append(f"New parameters over the gradients: {'; '.join(over_gradients)}.")
    return " ".join(notes)


def training_section(part: dict) -> str:
    """A table of training steps, and what is left of them without the gradients."""
    (job,) = part["jobs"]
    found, rows = collected(job), []
    for name, timed in found.items():
        plain = PLAIN[BY_NAME[name].framework]
        beyond = (timed["minimum"] - found[plain]["minimum"]) * 1e3
        rows.append(
            [
                name,
                f"{timed['ratio']:.2f}",
                f"{timed['median ratio']:.2f}",
                f"{timed['minimum'] * 1e3:.1f}",
                f"{timed['median'] * 1e3:.1f}",
                "" if name == plain else f"{beyond:+.1f}",
                f"{timed['first_step']:.1f}",
            ]
        )
    head = [
        "optimizer", "x optax.adamw, min", "median", "ms/step, min", "median",
        "beyond SGD without momentum, ms", "first step, s",
    ]  # fmt: skip
    return (
        f"{counts(job)}. Loss, gradients and update: in JAX one compiled function with state and "
        "parameters donated, in PyTorch forward, backward and `step()`. SGD without momentum has "
        "no state and is the least that a step can do; the other minima less its own, of the same "
        f"framework, are in the column beyond it. {bandwidth_note(job)}\n\n"
        f"{markdown_table(head, rows)}\n\n{sgd_note(job)}{calls_note(job)}"
    )


def across_section(jobs: Sequence[dict], labels: Sequence[str]) -> str:
    """Ratios and nanoseconds of several timing jobs, a column each."""
    columns = [(collected(job), job["elements"]) for job in jobs]
    names = dict.fromkeys(name for column, _ in columns for name in column)

    def rows(cell: Any) -> list[list[str]]:
        return [
            [name, *(cell(found[name], size) if name in found else "" for found, size in columns)]
            for name in names
        ]

    ratios = rows(lambda timed, size: f"{timed['ratio']:.2f}")
    times = rows(lambda timed, size: f"{timed['minimum'] / size * 1e9:.2f}")
    return (
        f"Minimal time, times that of `optax.adamw`:\n\n"
        f"{markdown_table(['optimizer', *labels], ratios)}\n\n"
        f"Nanoseconds an element, minimum:\n\n{markdown_table(['optimizer', *labels], times)}"
    )


def scaling_section(part: dict) -> str:
    """Tables by size."""
    labels = [job["workload"].removesuffix(" elements") for job in part["jobs"]]
    return f"One matrix of so many elements.\n\n{across_section(part['jobs'], labels)}"


def threads_section(part: dict) -> str:
    """Tables by number of processors."""
    labels = [
        "1 processor" if job["cores"] == 1 else f"{job['cores']} processors" for job in part["jobs"]
    ]
    notes = " ".join(
        f"{label}: {bandwidth_note(job)[0].lower()}{bandwidth_note(job)[1:]}"
        for label, job in zip(labels, part["jobs"])
    )
    return (
        f"{counts(part['jobs'][0])}. A process of its own for each column, bound to so many "
        f"processors before JAX or PyTorch start. {notes}\n\n"
        f"{across_section(part['jobs'], labels)}"
    )


def instructions_section(part: dict) -> str:
    """Tables by the instruction set of the native kernels."""
    jobs = [job for job in part["jobs"] if job["instructions"] == job["native kernels"]]
    if not jobs:
        return "The native kernels were not built."
    labels = [job["instructions"] for job in jobs]
    return (
        f"{counts(jobs[0])}. The native kernels as they run where there are no better instructions "
        "(`LOWBIT_CPU_TARGET`), a process of its own for each; XLA's code, Optax's with it, uses "
        f"all that the processor has.\n\n{across_section(jobs, labels)}"
    )


def memory_section(part: dict) -> str:
    """A table of peak memory."""
    rows = []
    for job in part["jobs"]:
        if "bytes" not in job:
            continue
        per_element = [job["bytes"]["state"], job["above"], job["growth"]]
        temporary = job["details"].get("temporary bytes")
        rows.append(
            [
                job["contestant"],
                *(f"{value / job['elements']:.2f}" for value in per_element),
                "" if temporary is None else f"{temporary / job['elements']:.2f}",
            ]
        )
    head = ["optimizer", "state", "peak above parameters", "growth in a step", "XLA's temporaries"]
    return (
        f"{counts(part['jobs'][0])}, bytes an element; each in a process of its own, after steps "
        "that are not counted. *peak above parameters*: the most resident memory of the process "
        "in a step, less what it was before there were arrays, less the parameters; so the "
        "gradients, the state and temporaries. *growth in a step*: the same less what was resident "
        "right before the step, gradients and state among it. Memory that is freed is given back "
        "at once (`MALLOC_MMAP_THRESHOLD_=131072`). *XLA's temporaries* are those of "
        f"`memory_analysis()`.\n\n{markdown_table(head, rows)}"
    )


SECTIONS = {
    "matrix": update_section,
    "large": update_section,
    "tree": update_section,
    "training": training_section,
    "scaling": scaling_section,
    "threads": threads_section,
    "instructions": instructions_section,
    "memory": memory_section,
}


def runs_section(parts: dict[str, dict]) -> str:
    """Command, date, machine and versions of every part, those of one run together."""
    runs: dict[str, list[str]] = {}
    for name, part in parts.items():
        run = dict(part["run"])
        versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items() if v is not None)
        text = f"{run['command']}\n```\n\n{run['date']}; {run['machine']}.\n{versions}."
        runs.setdefault(text, []).append(name)
    blocks = []
    for text, names in runs.items():
        seconds = sum(parts[name]["seconds"] for name in names)
        blocks.append(f"{', '.join(names)} ({seconds:.0f} s):\n\n```sh\n{text}")
    return "\n\n".join(blocks)


def left_out(parts: dict[str, dict]) -> str:
    """Peers that were not installed, and those that refused."""
    missing = {name for part in parts.values() for name in part["not installed"]}
    refused = {
        name: error
        for part in parts.values()
        for job in part["jobs"]
        for name, error in job["refused"].items()
    }
    notes = [f"{name}, which was not installed" for name in sorted(missing)]
    notes += [f"{name}, which raised `{error}`" for name, error in refused.items()]
    return f"Left out: {'; '.join(notes)}.\n\n" if notes else ""


def page(results: dict) -> str:
    """``docs/speed.md``."""
    parts = {name: results[name] for name in SECTIONS if name in results}
    sizes = [
        group["bandwidth"]["bytes"] // 2**21
        for part in parts.values()
        for job in part["jobs"]
        for group in job.get("groups", ())
    ]
    intro = INTRO.format(array=max(sizes, default=0))
    figure = "\n\n![Time of a step, against optax.adamw and by size](images/speed.png)"
    sections = [f"## {TITLES[name]}\n\n{SECTIONS[name](part)}" for name, part in parts.items()]
    ending = (
        f"## How this was measured\n\n{left_out(parts)}{runs_section(parts)}\n\n"
        "All samples are in `benchmarks/results/speed.json`."
    )
    return "\n\n".join([intro + figure, *sections, ending]) + "\n"


def write_page(results: dict) -> None:
    """Writes the page and its figure."""
    ratios = {
        job["workload"]: {name: timed["ratio"] for name, timed in collected(job).items()}
        for part in MARKERS
        if part in results
        for job in results[part]["jobs"]
    }
    sizes: dict[str, dict[int, float]] = {}
    for job in results.get("scaling", {"jobs": ()})["jobs"]:
        for name, timed in collected(job).items():
            nanoseconds = timed["minimum"] / job["elements"] * 1e9
            sizes.setdefault(name, {})[job["elements"]] = nanoseconds
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    draw(ratios, sizes, FIGURE)
    PAGE.write_text(page(results))


if __name__ == "__main__":
    write_page(json.loads(RESULTS.read_text()))
