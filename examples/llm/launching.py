"""Starts the program, or says what is missing for it."""

import sys


def launch(*preset: str) -> int:
    """Run the program with the process's arguments and return its exit code.

    Args:
      preset: a name that stands before the arguments, see `program.command.PRESETS`.
    """
    try:
        from examples.llm.program.command import main
    except ModuleNotFoundError as error:
        print(
            f'error: {error.name} is missing: run `pip install "optax-lowbit[examples]"`',
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130
    return main([*preset, *sys.argv[1:]])
