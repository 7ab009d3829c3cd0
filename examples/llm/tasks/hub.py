"""Rows of data sets on the Hugging Face hub, or saved on disk by its library."""

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.llm.errors import UsageError
from examples.llm.tasks.files import Place, Row
from examples.llm.tasks.splits import Splits, names_of_parts

HUB = "hf:"
# What `save_to_disk` leaves.
_SAVED = ("dataset_dict.json", "state.json")


@dataclass(frozen=True)
class HubSource:
    """A data set that is loaded by `datasets`.

    Attributes:
      name: `hf:NAME` or `hf:NAME:CONFIG`; the name is that of a folder, too.
      flag: that named it.
    """

    name: str
    flag: str

    dev_is_named = False

    def __post_init__(self):
        if importlib.util.find_spec("datasets") is None:
            raise UsageError(
                f"{self.flag}: {self.name} needs a package: run `pip install datasets`"
            )

    @property
    def names(self) -> frozenset[str]:
        """What tells it from other sources."""
        return frozenset({self.name})

    def identity(self) -> str:
        """Return what tells its content."""
        digest = hashlib.sha256()
        for part in self.rows():
            for row in part:
                digest.update(json.dumps(row.values, sort_keys=True, default=str).encode())
        return digest.hexdigest()[:16]

    def rows(self) -> Splits[Row]:
        """Load the rows of its parts.

        Raises:
          UsageError: they are not there, or can't be reached.
        """
        found = self._load()
        parts = names_of_parts(found, f"{self.flag}: {self.name}")
        if not any(found[name] for name in parts if name):
            raise UsageError(f"{self.flag}: {self.name} has no rows for train, dev or test")
        return Splits(*([*self._rows(found[name], name)] if name else [] for name in parts))

    def _load(self) -> Any:
        import datasets  # slow, and optional
        from datasets.exceptions import DatasetsError

        name, _, config = self.name.removeprefix(HUB).partition(":")
        try:
            if any((Path(name) / file).is_file() for file in _SAVED):
                found = datasets.load_from_disk(name)
            else:
                found = datasets.load_dataset(name, config or None)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UsageError(f"{self.flag}: cannot load {self.name}: {reason}") from error
        return found if isinstance(found, dict) else {"train": found}

    def _rows(self, dataset: Any, part: str) -> Iterator[Row]:
        """Labels that are numbers get their names back, as they have in the files of authors."""
        names = {
            column: feature.names
            for column, feature in dataset.features.items()
            if hasattr(feature, "names")
        }
        origin = f"{self.flag}: {self.name}, {part}"
        for number, values in enumerate(dataset, 1):
            for column, known in names.items():
                label = values[column]
                values[column] = None if label is None or label < 0 else known[label]
            yield Row(Place(origin, number, "row"), values)
