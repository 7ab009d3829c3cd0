"""The tasks that are known, and which of them rows belong to."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from examples.llm.tasks import answers, records, templates
from examples.llm.tasks.answers import Answers
from examples.llm.tasks.example import Record
from examples.llm.tasks.files import Row
from examples.llm.tasks.published import LETTERS
from examples.llm.tasks.templates import Wording

# Of a path or the name of a data set, so much tells what it is: a file and two folders.
_TELLING = 3
# A BBH task whose examples list no options has those that are answers, if they are so few.
_MOST_OPTIONS = 4


@dataclass(frozen=True)
class Format:
    """A task.

    Attributes:
      name: of the task.
      record: what a row says.
      wording: its templates.
      label: the field without which a row can't be learnt from, nor judged by.
      objective: what is trained on unless the user chooses; a name in `scoring.OBJECTIVES`.
      answers: how answers are judged, of a task that is answered freely; None: it has options.
    """

    name: str
    record: Callable[[Row], Record]
    wording: Wording
    label: str = "label"
    objective: str = "classification"
    answers: Answers | None = None

    def is_labelled(self, row: Row) -> bool:
        """Whether the right answer is told, as it is not in the test files of benchmarks."""
        return row.values.get(self.label) not in (None, -1, "")


def format_of(rows: Sequence[Row], origins: Iterable[str]) -> Format | None:
    """Tell the task that rows are of by the fields of the first; None if it is none of these.

    Args:
      rows: at least one.
      origins: the paths and names that they come from, by which tasks of the same fields are told
        where their labels are numbers.

    Raises:
      UsageError: these do not tell.
    """
    names = rows[0].values.keys()
    found = (find(rows, origins) for fields, find in _FORMATS if fields <= names)
    return next(filter(None, found), None)


_Find = Callable[[Sequence[Row], Iterable[str]], Format | None]


def _always(format_: Format) -> _Find:
    return lambda rows, origins: format_


def _entailment(rows: Sequence[Row], origins: Iterable[str]) -> Format | None:
    """RTE or CB, whose fields are the same, and those of other pairs of sentences.

    Words as labels tell which. Numbers do not: 1 is no entailment in RTE, a contradiction in CB,
    neutral in MNLI, and entailment in WNLI.
    """
    labelled = [row for row in rows if RTE.is_labelled(row)]
    labels = [row.values["label"] for row in labelled]
    if any(label in ("contradiction", "neutral") for label in labels):
        return CB
    if all(label in ("entailment", "not_entailment") for label in labels):
        return RTE
    if not all(type(label) is int for label in labels):
        return None
    called = _called(origins, {"rte": RTE, "cb": CB})
    if called is None:
        raise labelled[0].place.error(
            f"label {labels[0]} can be RTE's, CB's, MNLI's, WNLI's or MRPC's: write labels as "
            "words, such as entailment, or call the file or its folder rte or cb"
        )
    return called


def _called(origins: Iterable[str], known: Mapping[str, Format]) -> Format | None:
    """The one of `known` that is a word in the name of a file or, else, the nearest folder."""
    found: set[str] = set()
    for origin in origins:
        for name in reversed(re.split("[/:]", origin)[-_TELLING:]):
            words = known.keys() & set(re.split(r"\W|_", name.lower()))
            if words:
                found |= words
                break
    return known[found.pop()] if len(found) == 1 else None


def _sentence(rows: Sequence[Row], origins: Iterable[str]) -> Format | None:
    """SST-2; QNLI's sentences come with questions."""
    return None if "question" in rows[0].values else SST2


def _text_with_label(rows: Sequence[Row], origins: Iterable[str]) -> Format | None:
    return POLARITY if rows[0].values["label"] in ("neg", "pos") else None


def _letters(rows: Sequence[Row], origins: Iterable[str]) -> Format | None:
    """MMLU with letters; other inputs and outputs that have a subject are instructions."""
    is_letter = (str(row.values.get("output")).strip() in LETTERS for row in rows)
    return MMLU_LETTERS if all(is_letter) else None


def _bbh(rows: Sequence[Row], origins: Iterable[str]) -> Format:
    """Examples list their options, or have those of their file, or all are answered freely."""
    found: dict[str, set[str]] = {}
    for row in rows:
        if not records.listed_options(row):
            found.setdefault(records.subject_of(row), set()).add(row.text("target").strip())
    own = {subject: tuple(sorted(targets)) for subject, targets in found.items()}
    is_free = any(len(options) > _MOST_OPTIONS for options in own.values())
    return Format(
        "bbh",
        lambda row: records.bbh(row, None if is_free else own),
        templates.BBH,
        "target",
        answers=answers.FREE_TEXT if is_free else None,
    )


POLARITY = Format("polarity", records.polarity, templates.SENTIMENT)
SMS = Format("sms", records.sms, templates.SPAM)
SST2 = Format("sst2", records.sst2, templates.SENTIMENT)
COPA = Format("copa", records.copa, templates.COPA, objective="language-model")
WINOGRANDE = Format(
    "winogrande", records.winogrande, templates.WINOGRANDE, "answer", "language-model"
)
MULTIRC = Format("multirc", records.multirc, templates.MULTIRC)
BOOLQ = Format("boolq", records.boolq, templates.BOOLQ)
RTE = Format("rte", records.rte, templates.RTE)
CB = Format("cb", records.cb, templates.CB)
MMLU = Format("mmlu", records.mmlu, templates.FOUR_CHOICES, "answer")
MMLU_LETTERS = Format("mmlu", records.letters, templates.LETTERS, "output")
SQUAD = Format("squad", records.squad, templates.SQUAD, "answers", answers=answers.SQUAD)
GSM8K = Format("gsm8k", records.gsm8k, templates.GSM8K, "answer", answers=answers.GSM8K)

# By the fields of their records, the more particular first.
_FORMATS: tuple[tuple[frozenset[str], _Find], ...] = (
    (frozenset({"premise", "choice1"}), _always(COPA)),
    (frozenset({"sentence", "option1"}), _always(WINOGRANDE)),
    (frozenset({"paragraph", "question", "answer"}), _always(MULTIRC)),
    (frozenset({"passage", "question", "answer"}), _always(replace(BOOLQ, label="answer"))),
    (frozenset({"passage", "question"}), _always(BOOLQ)),
    (frozenset({"premise", "hypothesis"}), _entailment),
    (frozenset({"sentence1", "sentence2"}), _entailment),
    (frozenset({"context", "question", "answers"}), _always(SQUAD)),
    (frozenset({"question", "choices", "answer"}), _always(MMLU)),
    (frozenset({"question", "answer"}), _always(GSM8K)),
    (frozenset({"input", "output", "subject"}), _letters),
    (frozenset({"input", "target"}), _bbh),
    (frozenset({"sms", "label"}), _always(SMS)),
    (frozenset({"text", "label"}), _text_with_label),
    (frozenset({"sentence"}), _sentence),
)
