"""From what the user calls a task to its rows, in the parts that they come in."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from examples.llm.errors import UsageError
from examples.llm.models.opening import content_hash
from examples.llm.tasks.files import File, Row
from examples.llm.tasks.hub import HUB, HubSource
from examples.llm.tasks.published import read_rows
from examples.llm.tasks.splits import Splits, names_of_parts

# The files of tasks that have a name, and where they come from.
NAMED_FILES = {
    "polarity": ("sentence_polarity.zip", "nltk.download('sentence_polarity') fetches it"),
    "sms": ("SMSSpamCollection.tsv", "the UCI machine learning repository has it"),
}
_TEXT = ".txt"
_SUFFIXES = (".csv", ".json", ".jsonl", ".tsv", _TEXT)


@dataclass(frozen=True)
class FileSource:
    """Data in files.

    Attributes:
      files: of each part.
      dev_is_named: whether the user said what is for development.
    """

    files: Splits[File]
    dev_is_named: bool = False

    def __str__(self):
        return ", ".join(str(file.path) for part in self.files for file in part)

    @property
    def is_text(self) -> bool:
        """Whether the files are plain text."""
        return all(file.path.suffix.lower() == _TEXT for part in self.files for file in part)

    @property
    def names(self) -> frozenset[str]:
        """The paths, which tell it from other sources."""
        return frozenset(str(file.path.resolve()) for part in self.files for file in part)

    def identity(self) -> str:
        """Return hashes of the files' contents, by part."""
        parts = self.files._asdict().items()
        return " ".join(
            f"{name} {content_hash(file.path)}" for name, part in parts for file in part
        )

    def rows(self) -> Splits[Row]:
        """Read the files."""
        return Splits(*([row for file in part for row in read_rows(file)] for part in self.files))

    def texts(self) -> Splits[str]:
        """Read the files, which are plain text."""
        return Splits(*([file.text() for file in part] for part in self.files))


Source = FileSource | HubSource


def find_source(
    task: str,
    data: Path,
    flag: str = "--task",
    *,
    named: Iterable[str] = NAMED_FILES,
    dev: Path | None = None,
    test: Path | None = None,
) -> Source:
    """Find the data of a task.

    Args:
      task: a name in `NAMED_FILES`; a file; a folder, in which files or folders are called by their
        parts, or all files belong together; or `hf:NAME[:CONFIG]`, see `HubSource`.
      data: the folder of `NAMED_FILES`.
      flag: that named the task.
      named: tasks that the user could have named.
      dev: the file for development, or a folder; given with `--dev`.
      test: the file for the test, or a folder; given with `--test`.

    Raises:
      UsageError: there is nothing of that kind, it comes in parts of its own, or a file is in two.
    """
    if task.startswith(HUB):
        source = HubSource(task, flag)
    else:
        source = _local(task, data, flag, named)
    for given_flag, path, part in (("--dev", dev, "dev"), ("--test", test, "test")):
        if path is None:
            continue
        if isinstance(source, HubSource) or getattr(source.files, part):
            raise UsageError(f"{given_flag}: {task} comes in parts already")
        files = source.files._replace(**{part: _files_of_part(path, given_flag, part)})
        source = FileSource(files, source.dev_is_named or part == "dev")
    if isinstance(source, FileSource):
        _check_apart(source.files)
    return source


def _files_of_part(path: Path, flag: str, part: str) -> list[File]:
    """A file; the files of a folder, or those of this part if it comes in parts."""
    if path.is_file():
        return [File(path, flag)]
    if not path.is_dir():
        raise UsageError(f"{flag}: there is no file or folder {path}")
    found = _folder(path, flag).files
    files = getattr(found, part) or ([] if found.dev or found.test else found.train)
    if not files:
        raise UsageError(f"{flag}: {path} comes in parts, none of them for {part}")
    return files


def _check_apart(files: Splits[File]) -> None:
    """Raise a `UsageError` if a file is in two parts, or a copy of it."""
    parts = files._asdict()
    sizes = {name: {file.path.stat().st_size for file in part} for name, part in parts.items()}
    seen: dict[str, tuple[str, File]] = {}
    for part, of_part in parts.items():
        elsewhere = set().union(*(sizes[other] for other in parts if other != part))
        # Only files of one size can be the same; the others, however large, are not read for it.
        for file in (file for file in of_part if file.path.stat().st_size in elsewhere):
            other_part, other = seen.setdefault(content_hash(file.path), (part, file))
            if other_part != part:
                raise file.error(f"has the same content as {other}: parts must share nothing")


def _local(task: str, data: Path, flag: str, named: Iterable[str]) -> FileSource:
    name, origin = NAMED_FILES.get(task, (None, ""))
    path = Path(task) if name is None else data / name
    if path.is_file():
        return FileSource(Splits([File(path, flag)], [], []))
    if path.is_dir():
        return _folder(path, flag)
    if name is None:
        known = ", ".join(named)
        raise UsageError(f"{flag}: {task} is neither a file or folder nor one of {known}")
    raise UsageError(f"--data: {task} needs {name}, which is not in {data}; {origin}")


def _folder(path: Path, flag: str) -> FileSource:
    """Files, or folders of files, that are called train, dev or test; or files of no part."""
    try:
        entries = {entry.name: _files(entry, flag) for entry in sorted(path.iterdir())}
    except OSError as error:
        raise UsageError(f"{flag}: cannot read {error.filename}: {error.strerror}") from error
    entries = {name: files for name, files in entries.items() if files}
    if not entries:
        raise UsageError(f"{flag}: {path} has no file in {', '.join(_SUFFIXES)}")
    parts = names_of_parts(entries, f"{flag}: {path}")
    if any(parts):
        return FileSource(Splits(*(entries[name] if name else [] for name in parts)))
    whole = [file for name, files in entries.items() if (path / name).is_file() for file in files]
    if not whole:
        raise UsageError(f"{flag}: {path} has folders none of which is train, dev or test")
    return FileSource(Splits(whole, [], []))


def _files(path: Path, flag: str) -> list[File]:
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    return [File(file, flag) for file in found if file.suffix.lower() in _SUFFIXES]
