"""The JSON objects in the files of models, which may be anybody's."""

import json
from pathlib import Path
from typing import Any

from examples.llm.errors import UsageError

_MAX_BYTES = 2**24


def read_object(path: Path) -> dict[str, Any]:
    """Read the object that a JSON file holds.

    Raises:
      UsageError: the file is missing, too large or deep, or holds something else.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"--model: {path} must have at most {_MAX_BYTES} bytes")
        fields = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"--model: cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--model: cannot read {path}: {error}") from error
    if not isinstance(fields, dict):
        raise UsageError(f"--model: {path} must hold an object, is {type(fields).__name__}")
    return fields
