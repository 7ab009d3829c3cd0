"""The tasks that are known, and which of them rows belong to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from examples.llm.tasks import answers, records, templates
from examples.llm.tasks.answers import Answers
from examples.llm.tasks.example import Record
from examples.llm.tasks.files import Row
from examples.llm.tasks.published import LETTERS
from examples.llm.tasks.templates import Wording

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


def format_of(rows: Sequence[Row]) -> Format | None:
    """Tell the task that rows are of by the fields of the first; None if it is none of these."""
    names = rows[0].values.keys()
    return next((find(rows) for fields, find in _FORMATS if fields <= names and find(rows)), None)


def _always(format_: Format) -> Callable[[Sequence[Row]], Format]:
    return lambda rows: format_


def _entailment(rows: Sequence[Row]) -> Format | None:
    """RTE or CB, whose fields are the same; other pairs of sentences have other labels."""
    labels = [row.values.get("label") for row in rows]
    if any(label in ("contradiction", "neutral", 2) for label in labels):
        return CB
    is_rte = all(label in ("entailment", "not_entailment", 0, 1, -1, None) for label in labels)
    return RTE if is_rte else None


def _text_with_label(rows: Sequence[Row]) -> Format | None:
    return POLARITY if rows[0].values["label"] in ("neg", "pos") else None


def _letters(rows: Sequence[Row]) -> Format | None:
    """MMLU with letters; other inputs and outputs that have a subject are instructions."""
    is_letter = (str(row.values.get("output")).strip() in LETTERS for row in rows)
    return MMLU_LETTERS if all(is_letter) else None


def _bbh(rows: Sequence[Row]) -> Format:
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
_FORMATS: tuple[tuple[frozenset[str], Callable[[Sequence[Row]], Format | None]], ...] = (
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
    (frozenset({"sentence"}), _always(SST2)),
)
