"""Means and sample standard deviations over seeds."""

import statistics
from collections.abc import Iterable
from typing import NamedTuple


class Spread(NamedTuple):
    """What several runs have measured of one thing.

    Attributes:
      mean: of the runs.
      deviation: their sample standard deviation; None of a single run.
    """

    mean: float
    deviation: float | None

    def words(self, form: str) -> str:
        """Both numbers, each in a format such as `.4f`; the mean alone where runs do not differ."""
        mean = format(self.mean, form)
        return f"{mean} ± {self.deviation:{form}}" if self.deviation else mean


def spread_of(values: Iterable[float]) -> Spread:
    """Return the spread of at least one value."""
    values = list(values)
    return Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)
