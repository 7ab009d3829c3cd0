"""Hyperparameters are chosen by development examples; test examples judge what was chosen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from examples.llm.training.judging import Evaluation, merit

# Training batches and directions of trials are not those of any final run.
SEARCH_SEED = 1_000_000

Train = Callable[[float, int, bool], Any]
Judge = Callable[[Any, Literal["dev", "test"]], Evaluation]


@dataclass(frozen=True)
class Trial:
    """A learning rate that was tried.

    Attributes:
      learning_rate: which.
      dev: what it reached on the development examples.
    """

    learning_rate: float
    dev: Evaluation


@dataclass(frozen=True)
class FinalRun:
    """A run with the learning rate that was chosen.

    Attributes:
      seed: of the run.
      dev: what it reached on the development examples.
      test: and on the test examples.
    """

    seed: int
    dev: Evaluation
    test: Evaluation


def best_trial(trials: Sequence[Trial], objective: str | None = None) -> Trial:
    """The trial with the most merit, see `merit`."""
    return max(trials, key=lambda trial: merit(trial.dev, objective))


def search(
    train: Train,
    judge: Judge,
    rates: Sequence[float],
    seeds: Sequence[int],
    tell: Callable[[str], None],
    objective: str | None = None,
) -> tuple[list[Trial], float, list[FinalRun]]:
    """Try learning rates, and repeat the best; return the trials, the rate and the runs.

    Args:
      train: `(learning rate, seed, is final) -> trained`.
      judge: `(trained, part) -> evaluation`.
      rates: learning rates to try; a single one is taken as it is.
      seeds: of the final runs.
      tell: is given a line on each run.
      objective: of training; None for the task's own.
    """
    trials = []
    for rate in rates if len(rates) > 1 else ():
        trials.append(Trial(rate, judge(train(rate, SEARCH_SEED, False), "dev")))
        tell(f"learning rate {rate:.3g}: {_words(trials[-1].dev)} on dev")
    rate = best_trial(trials, objective).learning_rate if trials else rates[0]

    def final_run(seed: int) -> FinalRun:
        # What was trained is let go of before the next run, to whose memory it would add.
        trained = train(rate, seed, True)
        return FinalRun(seed, judge(trained, "dev"), judge(trained, "test"))

    runs = []
    for seed in seeds:
        runs.append(final_run(seed))
        tell(f"learning rate {rate:.3g}, seed {seed}: {_words(runs[-1].test)} on test")
    return trials, rate, runs


def _words(evaluation: Evaluation) -> str:
    accuracy = 100 * evaluation.scores["accuracy"]
    return f"accuracy {accuracy:.1f}%, loss {evaluation.loss:.4f}"
