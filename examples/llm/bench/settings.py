"""What the user chooses for a benchmark, checked before anything is loaded."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from examples.llm.errors import UsageError
from examples.llm.models.opening import named_model
from examples.llm.program.settings import (
    check_above_zero,
    check_at_least,
    check_objective,
    check_seeds,
)
from examples.llm.tasks.encoders import Head
from examples.llm.tasks.sources import find_source
from examples.llm.training.methods import METHODS, check_method_names, check_tuning

Scheme = Literal["full", "lora", "qlora", "prefix", "prompt"]

_DEFAULT_METHODS = ("adam", *(name for name in METHODS if METHODS[name].derivative != "backward"))


@dataclass(frozen=True)
class BenchSettings:
    """Compare ways to fine-tune without backpropagation on tasks with options.

    For every task, tuning and method, learning rates are tried on the development examples; the
    best is run with several seeds and judged by the test examples.
    """

    task: tuple[str, ...] = ("polarity",)
    """Tasks: polarity, sms, or files in the format of SST-2, COPA, WinoGrande or MultiRC."""
    tuning: tuple[Scheme, ...] = ("full", "lora", "prefix", "prompt")
    """Schemes of tuning."""
    method: tuple[str, ...] = _DEFAULT_METHODS
    """Methods, first-order ones among them."""
    rate_factors: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Learning rates to try, as multiples of the method's own."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Choose training batches, random directions and new parameters of the final runs."""
    steps: int = 300
    """Steps of a final run."""
    search_steps: int = 100
    """Steps with each learning rate that is tried."""
    first_order_steps: int = 75
    """Both of these for methods that backpropagate."""
    batch_size: int = 8
    """Examples in a batch."""
    sequence_length: int = 64
    """Tokens in an example at most."""
    objective: Literal["classification", "language-model", "accuracy", "f1"] | None = None
    """What training improves; left out, every task has its own."""
    head: Head | None = None
    """Of an encoder: masked-lm, words of the task in place of a mask; classes, a layer that tells
    the options apart. Left out, the first if the model can."""
    template: bool = True
    """Word a task such that its answer is likely text."""
    train_examples: int = 1000
    """Examples to learn from."""
    dev_examples: int = 500
    """Examples by which learning rates are chosen; a quarter at most where they have no file."""
    test_examples: int = 1000
    """Examples by which the final runs are judged; the same."""
    data: Path = Path("data")
    """Folder with sentence_polarity.zip and SMSSpamCollection.tsv."""
    model: str | None = None
    """A folder of Hugging Face's, a GGUF file, or smollm2-135m, which it is where this is left out,
    minilm or stories260k."""
    output: Path = Path("runs/zo_bench")
    """Folder for the results; what is already in it is not run again. Other settings need another
    folder."""
    quick: bool = False
    """A look at whether everything runs: a tiny random model, a few steps of full tuning."""
    config: Path | None = None
    """A TOML or JSON file of these settings; flags have the last word."""

    def quickened(self) -> "BenchSettings":
        """The settings of a quick run, if this is one."""
        if not self.quick:
            return self
        return replace(
            self, tuning=("full",), rate_factors=(1.0,), seeds=(0,), steps=4,
            search_steps=2, first_order_steps=2, batch_size=4, sequence_length=48,
            train_examples=64, dev_examples=16, test_examples=16,
            output=self.output / "quick",
        )  # fmt: skip

    def check(self) -> None:
        """Raise a `UsageError` that names the first setting that cannot work."""
        check_method_names(self.method)
        for name in ("task", "tuning", "rate_factors"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag}: give at least one, and none twice, got {values}")
        schemes = {scheme for name in self.method for scheme in METHODS[name].learning_rates}
        if not schemes & set(self.tuning):
            check_tuning(self.method[0], self.tuning[0])
        for name in (
            "steps", "search_steps", "first_order_steps", "batch_size", "train_examples",
            "dev_examples", "test_examples",
        ):  # fmt: skip
            check_at_least("--" + name.replace("_", "-"), getattr(self, name), 1)
        check_at_least("--sequence-length", self.sequence_length, 2)
        for factor in self.rate_factors:
            check_above_zero("--rate-factors", factor)
        check_seeds(self.seeds)
        for task in self.task:
            find_source(task, self.data)
        for method in self.method:
            check_objective(method, self.objective)
        if self.model is not None:
            named_model(self.model, self.data)
