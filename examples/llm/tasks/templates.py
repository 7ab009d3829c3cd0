"""How tasks are worded: with a phrase that makes the answer likely text, or bare.

Zhang et al call the first task alignment (arXiv 2402.11592, section 4). The wordings of SST-2, COPA
and WinoGrande are those of that paper, after MeZO (arXiv 2305.17333, appendix E).
"""

from dataclasses import dataclass

from examples.llm.tasks.example import Template


@dataclass(frozen=True)
class Wording:
    """The templates of a task.

    Attributes:
      aligned: with the phrase.
      bare: without it; None where a task has no phrase to leave out.
    """

    aligned: Template
    bare: Template | None


SENTIMENT = Wording(
    aligned=Template("{text} It was", (" terrible", " great")),
    bare=Template("{text}", (" terrible", " great")),
)
SPAM = Wording(
    aligned=Template("{text}\nThis message is", (" normal", " spam")),
    bare=Template("{text}", (" normal", " spam")),
)
COPA = Wording(
    aligned=Template("{clause} {conjunction}", (" {continuation1}", " {continuation2}")),
    bare=Template("{premise}", (" {choice1}", " {choice2}")),
)
WINOGRANDE = Wording(
    aligned=Template("{before}", ("{space}{option1}{after}", "{space}{option2}{after}")),
    bare=None,
)
MULTIRC = Wording(
    aligned=Template(
        "{passage}\nQuestion: {question}\nAnswer: {answer}\nIs this answer correct?",
        (" No", " Yes"),
    ),
    bare=Template("{passage} {question} {answer}", (" No", " Yes")),
)
LETTERS = Wording(
    aligned=Template("{text}", (" A", " B", " C", " D")),
    bare=None,
)
