"""A model on disk, whatever files it is in."""

import hashlib
from pathlib import Path

from examples.llm.errors import UsageError
from examples.llm.models.gguf_files import GGUFModel
from examples.llm.models.huggingface_files import HuggingFaceModel


def open_model(path: Path) -> GGUFModel | HuggingFaceModel:
    """Open a GGUF file or a folder of Hugging Face's.

    Raises:
      UsageError: it can't be read, or holds another kind of model.
    """
    return HuggingFaceModel(path) if path.is_dir() else GGUFModel(path)


def content_hash(path: Path) -> str:
    """Return what tells the content of a file, or of all files of a folder."""
    digest = hashlib.sha256()
    try:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}") from error
    return digest.hexdigest()[:16]
