"""What the rows of each task say."""

import re
from collections.abc import Mapping

from examples.llm.tasks.answers import NO_ANSWER, final_number
from examples.llm.tasks.example import Record
from examples.llm.tasks.files import Row
from examples.llm.tasks.published import LETTERS, POLARITY_LABELS, SMS_LABELS

_TRUE_OR_FALSE = ((False, 0, "False"), (True, 1, "True"))

# What a BBH task may end with: lines of `(A) text`, or of `- Yes`.
_LISTED = re.compile(r"^(?:(\([A-Z]\)) |- (.+)$)", re.MULTILINE)


def text_key(text: str) -> str:
    """The same for texts that differ in nothing but case and space."""
    return " ".join(text.casefold().split())


def polarity(row: Row) -> Record:
    """A snippet of a review: negative or positive."""
    return _text(row.text("text"), row.choice("label", *zip(POLARITY_LABELS, (0, 1))))


def sms(row: Row) -> Record:
    """A message: ham or spam."""
    return _text(row.text("sms"), row.choice("label", *zip(SMS_LABELS, (0, 1))))


def sst2(row: Row) -> Record:
    """GLUE's sentences: negative or positive."""
    label = row.choice("label", ("0", 0, "negative"), ("1", 1, "positive"))
    return _text(row.text("sentence"), label)


def copa(row: Row) -> Record:
    """SuperGLUE's: which of two is the cause, or the effect, of a premise."""
    premise = row.text("premise")
    question = row.choice("question", ("cause",), ("effect",))
    fields = {
        "premise": premise.strip(),
        "clause": premise.strip().removesuffix("."),
        "conjunction": ("because", "so")[question],
    }
    for number in (1, 2):
        choice = row.text(f"choice{number}").strip()
        fields[f"choice{number}"] = choice
        fields[f"continuation{number}"] = _mid_sentence(choice)
    label = row.choice("label", (0, "choice1"), (1, "choice2"))
    return Record(fields, (text_key(premise),), label)


def winogrande(row: Row) -> Record:
    """A sentence with a gap; `qID`s of twin sentences differ after the last hyphen."""
    sentence = row.text("sentence")
    if sentence.count("_") != 1:
        raise row.place.error(f"sentence must have one gap _, got {sentence!r}")
    before, after = sentence.split("_")
    fields = {
        "before": before.rstrip(),
        "space": before[len(before.rstrip()) :],
        "after": after,
        "option1": row.text("option1"),
        "option2": row.text("option2"),
    }
    keys = (text_key(sentence),)
    if "qID" in row.values:
        twins = row.text("qID")
        keys += (twins.rpartition("-")[0] or twins,)
    return Record(fields, keys, row.choice("answer", ("1",), ("2",)))


def multirc(row: Row) -> Record:
    """SuperGLUE's: is this an answer to this question on this passage? All of one passage agree."""
    passage = row.text("paragraph")
    fields = {
        "passage": passage.strip(),
        "question": row.text("question").strip(),
        "answer": row.text("answer").strip(),
    }
    return Record(fields, (text_key(passage),), row.choice("label", *_TRUE_OR_FALSE))


def boolq(row: Row) -> Record:
    """A question on a passage: no or yes; SuperGLUE has it as `label`, its authors as `answer`."""
    passage, question = row.text("passage").strip(), row.text("question").strip()
    sentence = question[:1].upper() + question[1:].removesuffix("?") + "?"
    fields = {"passage": passage, "question": question, "sentence": sentence}
    name = "label" if "label" in row.values else "answer"
    return Record(fields, (text_key(passage),), row.choice(name, *_TRUE_OR_FALSE))


def rte(row: Row) -> Record:
    """Does a text entail another? As in SuperGLUE, or as GLUE's `sentence1` and `sentence2`."""
    return _entailment(row, ("entailment", 0), ("not_entailment", 1))


def cb(row: Row) -> Record:
    """SuperGLUE's: does a text entail another, contradict it, or neither?"""
    return _entailment(row, ("entailment", 0), ("contradiction", 1), ("neutral", 2))


def _entailment(row: Row, *labels: tuple[str, int]) -> Record:
    names = ("premise", "hypothesis") if "premise" in row.values else ("sentence1", "sentence2")
    premise, hypothesis = (row.text(name).strip() for name in names)
    fields = {
        "premise": premise,
        "hypothesis": hypothesis,
        "clause": premise.rstrip(".?!"),
        "continuation": _mid_sentence(hypothesis),
    }
    return Record(fields, (text_key(premise),), row.choice("label", *labels))


def letters(row: Row) -> Record:
    """MMLU as in the QLoRA paper's program: questions, solved ones perhaps before, and letters."""
    text = row.text("input")
    label = row.choice("output", *((letter, f" {letter}") for letter in LETTERS))
    return Record({"text": text.rstrip()}, (text_key(text),), label, row.text("subject"))


def mmlu(row: Row) -> Record:
    """MMLU's own: a question and four choices."""
    question, choices = row.text("question"), row.texts("choices")
    if len(choices) != len(LETTERS):
        raise row.place.error(f"choices must be four texts, got {choices!r}")
    subject = subject_of(row)
    fields = {
        "question": question.strip(),
        "topic": subject.replace("_", " "),
        **dict(zip(LETTERS, map(str.strip, choices))),
    }
    label = row.choice("answer", *zip(LETTERS, range(len(LETTERS))))
    return Record(fields, (text_key(question),), label, subject)


def squad(row: Row) -> Record:
    """A question on a passage, answered in its words; those without an answer say so."""
    context = row.text("context")
    found = Row(row.place, row.field("answers", dict)).texts("text")
    answers = tuple(dict.fromkeys(found)) or (NO_ANSWER,)
    fields = {
        "title": row.text("title") if "title" in row.values else "",
        "context": context.strip(),
        "question": row.text("question").strip(),
        "answer": answers[0],
    }
    return Record(fields, (text_key(context),), answers=answers)


def gsm8k(row: Row) -> Record:
    """A problem in words, and its solution, which ends with `####` and a number."""
    question, answer = row.text("question"), row.text("answer")
    if "####" not in answer or final_number(answer) is None:
        raise row.place.error(f"answer must end with #### and a number, got {answer[-60:]!r}")
    fields = {"question": question.strip(), "answer": answer.strip()}
    return Record(fields, (text_key(question),), answers=(answer,))


def listed_options(row: Row) -> tuple[str, ...]:
    """The options that the text of one of BBH's examples ends with."""
    _, *found = row.text("input").split("Options:\n")
    return tuple(letter or word.strip() for letter, word in _LISTED.findall("".join(found[-1:])))


def subject_of(row: Row) -> str:
    """The part of a task that a row belongs to; empty if it has none."""
    return row.text("subject") if "subject" in row.values else ""


def bbh(row: Row, own: Mapping[str, tuple[str, ...]] | None) -> Record:
    """An example of BIG-Bench Hard.

    Args:
      row: with `input` and `target`.
      own: by subject, the options of an example that lists none; None if all are answered freely.
    """
    text, target = row.text("input").strip(), row.text("target").strip()
    if own is None:
        return Record({"input": text, "option": target}, (text_key(text),), answers=(target,))
    subject = subject_of(row)
    options = listed_options(row) or own[subject]
    label = row.choice("target", *zip(options))
    return Record({"input": text}, (text_key(text),), label, subject, options)


def _text(text: str, label: int) -> Record:
    return Record({"text": text.strip()}, (text_key(text),), label)


def _mid_sentence(text: str) -> str:
    is_pronoun = text.split(maxsplit=1)[:1] == ["I"] or text.startswith("I'")
    return text if is_pronoun else text[:1].lower() + text[1:]
