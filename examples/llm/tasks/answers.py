"""How answers in a model's own words are judged."""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

# What is written where a passage does not answer a question.
NO_ANSWER = "unanswerable"

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = r"(?:(?<!\d)-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
# GSM8K marks the result; a model that was not taught to may still end with it, and one that was may
# go on with the next question.
_MARKED_NUMBER = re.compile(rf"####\s*({_NUMBER})")

# From what a model wrote and the texts that are right to a score from 0 to 1.
Score = Callable[[str, Sequence[str]], float]


@dataclass(frozen=True)
class Answers:
    """What is asked of an answer.

    Attributes:
      scores: by name.
      tokens: that it may have at most.
      one_line: whether it ends where its line does.
    """

    scores: Mapping[str, Score]
    tokens: int
    one_line: bool

    def judged(self, written: str, answers: Sequence[str]) -> dict[str, float]:
        """The scores, by name, of what a model wrote."""
        if self.one_line:
            written = written.strip().partition("\n")[0]
        return {name: score(written, answers) for name, score in self.scores.items()}


def squad_tokens(text: str) -> list[str]:
    """The words that SQuAD compares: lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()


def exact_match(written: str, answers: Sequence[str]) -> float:
    """SQuAD's: whether the words are those of any right answer."""
    return float(squad_tokens(written) in map(squad_tokens, answers))


def f1(written: str, answers: Sequence[str]) -> float:
    """SQuAD's: the overlap with the right answer to which it is highest."""
    return max(_overlap(squad_tokens(written), squad_tokens(answer)) for answer in answers)


def same_number(written: str, answers: Sequence[str]) -> float:
    """GSM8K's: whether the first number after `####`, or else the last one, is the right one."""
    found = final_number(written)
    return float(found is not None and found in map(final_number, answers))


def same_text(written: str, answers: Sequence[str]) -> float:
    """Whether it is a right answer, but for space around it."""
    return float(written.strip() in (answer.strip() for answer in answers))


def final_number(text: str) -> Decimal | None:
    """The number after the first `####`, or else the last one; None if there is none."""
    found = _MARKED_NUMBER.findall(text)[:1] or re.findall(_NUMBER, text)
    return Decimal(re.sub(r"[$,]", "", found[-1])) if found else None


def _overlap(words: list[str], right: list[str]) -> float:
    if [NO_ANSWER] in (words, right):
        return float(words == right)
    common = sum((Counter(words) & Counter(right)).values())
    return 2 * common / (len(words) + len(right)) if common else float(words == right)


SQUAD = Answers({"exact match": exact_match, "f1": f1}, tokens=50, one_line=True)
GSM8K = Answers({"exact match": same_number}, tokens=256, one_line=False)
FREE_TEXT = Answers({"exact match": same_text}, tokens=64, one_line=True)
