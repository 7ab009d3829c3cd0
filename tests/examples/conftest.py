"""A tiny LLaMA model file, so that the whole fine-tuning program runs in seconds."""

from pathlib import Path

import pytest

from examples.llm.models.tiny import write_tiny_gguf


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")
