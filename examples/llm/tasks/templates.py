"""How tasks are worded: with a phrase that makes the answer likely text, or bare.

Zhang et al call the first task alignment (arXiv 2402.11592, section 4). The wordings of SST-2,
COPA, WinoGrande, BoolQ, RTE, CB and SQuAD are those of that paper, after MeZO (arXiv 2305.17333,
appendix E); those of MMLU and BBH are their authors' (arXiv 2009.03300, 2210.09261). Masks stand
where MeZO has them for RoBERTa, after Gao et al (arXiv 2012.15723).
"""

from dataclasses import dataclass

from examples.llm.tasks.example import Template


@dataclass(frozen=True)
class Wording:
    """The templates of a task.

    Attributes:
      aligned: with the phrase.
      bare: without it; None where a task has no phrase to leave out.
      cloze: with `{mask}` in place of the option, for a model that fills it; None where the options
        are not single words.
    """

    aligned: Template
    bare: Template | None
    cloze: Template | None = None


SENTIMENT = Wording(
    aligned=Template("{text} It was", (" terrible", " great")),
    bare=Template("{text}", (" terrible", " great")),
    cloze=Template("{text} It was {mask}.", (" terrible", " great")),
)
SPAM = Wording(
    aligned=Template("{text}\nThis message is", (" normal", " spam")),
    bare=Template("{text}", (" normal", " spam")),
    cloze=Template("{text} This message is {mask}.", (" normal", " spam")),
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
BOOLQ = Wording(
    aligned=Template("{passage} {sentence}\n", ("No", "Yes")),
    bare=Template("{passage} {question}", (" No", " Yes")),
)
RTE = Wording(
    aligned=Template(
        '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n', ("Yes", "No")
    ),
    bare=Template("{premise} {hypothesis}", (" Yes", " No")),
    cloze=Template("{clause}? {mask}, {continuation}", (" Yes", " No")),
)
CB = Wording(
    aligned=Template(
        'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
    ),
    bare=Template("{premise} {hypothesis}", (" Yes", " No", " Maybe")),
    cloze=Template("{clause}? {mask}, {continuation}", (" Yes", " No", " Maybe")),
)
SQUAD = Wording(
    aligned=Template(
        "Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:", (" {answer}\n",)
    ),
    bare=Template("{context} {question}", (" {answer}\n",)),
)
GSM8K = Wording(
    aligned=Template("Question: {question}\nAnswer:", (" {answer}",)),
    bare=Template("{question}\n", ("{answer}",)),
)
BBH = Wording(
    aligned=Template("Q: {input}\nA:", (" {option}",)),
    bare=Template("{input}\n", ("{option}",)),
)
# As the QLoRA paper's program has MMLU: the text ends where the letter is due.
LETTERS = Wording(
    aligned=Template("{text}", (" A", " B", " C", " D")),
    bare=None,
)
FOUR_CHOICES = Wording(
    aligned=Template(
        "The following are multiple choice questions (with answers) about {topic}.\n\n"
        "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:",
        (" A", " B", " C", " D"),
    ),
    bare=Template("{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n", ("A", "B", "C", "D")),
)
