"""The command line: a preset, and flags."""

import sys
from collections.abc import Callable
from functools import partial

from examples.llm.bench.command import benchmark
from examples.llm.program.endings import run_and_report
from examples.llm.program.finetuning import finetune
from examples.llm.program.settings import DEFAULTS, QLORA_RECIPE

# What may stand before the flags.
PRESETS: dict[str, Callable[[list[str]], None]] = {
    "finetune": partial(finetune, recipe=DEFAULTS),
    "qlora": partial(finetune, recipe=QLORA_RECIPE),
    "zo_bench": benchmark,
}


def main(arguments: list[str] | None = None) -> int:
    """Run what `arguments` (by default the process's) ask for.

    Args:
      arguments: flags, after a name in `PRESETS` unless that is "finetune".

    Returns:
      The exit code: 0; 1 if a run died; 2 for a mistake of the user's; 130 after Ctrl-C and 143
      after SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    preset = "finetune"
    if arguments and arguments[0] in PRESETS:
        preset, *arguments = arguments
    return run_and_report(lambda: PRESETS[preset](arguments))
