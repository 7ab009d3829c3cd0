"""The program: `python -m examples.llm --help`."""

import sys

if __name__ == "__main__":
    # Imported here so that the runs' processes, which import this file, stay small.
    from examples.llm.launching import launch

    sys.exit(launch())
