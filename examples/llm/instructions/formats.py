"""The rows that instructions come in, as their authors publish them.

The formats and wordings are those of the QLoRA paper's program (arXiv 2305.14314, appendix B.3);
conversations are ShareGPT's, in Vicuna's wording.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from examples.llm.tasks.files import Row
from examples.llm.tasks.records import text_key

# Stanford Alpaca's wording, with and without an input.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response: "
)
# Vicuna's wording (version 1.1), whose system message another one can replace.
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
}


@dataclass(frozen=True)
class Pair:
    """What a model is given, and what it is to write.

    Attributes:
      source: may be empty.
      target: what follows.
    """

    source: str
    target: str


@dataclass(frozen=True)
class Dialogue:
    """Pairs that follow each other in one text.

    Attributes:
      pairs: at least one.
      topic: what it is about; empty where its first source, or else target, tells that.
    """

    pairs: tuple[Pair, ...]
    topic: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """Dialogues that share one are never split up."""
        first = self.pairs[0]
        return (text_key(self.topic or first.source or first.target),)


Reader = Callable[[Row], Iterator[Dialogue]]


def reader_of(rows: Sequence[Row]) -> Reader | None:
    """Tell how to read rows by the fields of the first; None if it has others.

    Rows with labels are not instructions: a text would be learnt whatever its label says.
    """
    names = rows[0].values.keys()
    if "label" in names:
        return None
    return next((reader for fields, reader in _READERS if fields <= names), None)


def one(source: str, target: str) -> Dialogue:
    """A dialogue of one pair."""
    return Dialogue((Pair(source, target),))


def _alpaca(row: Row) -> Iterator[Dialogue]:
    """Alpaca's, and its cleaned form: an instruction, perhaps its input, an output.

    Instructions as general as `Edit this sentence` do not make inputs belong together.
    """
    context = "" if row.values.get("input") is None else row.text("input")
    yield one(_worded(row.text("instruction"), context), row.text("output"))


def _seeds(row: Row) -> Iterator[Dialogue]:
    """Self-instruct's seed tasks: an instruction and its instances, which belong together."""
    instruction = row.text("instruction")
    for instance in row.inner("instances"):
        pair = Pair(_worded(instruction, instance.text("input")), instance.text("output"))
        yield Dialogue((pair,), topic=instruction)


def _self_instruct(row: Row) -> Iterator[Dialogue]:
    yield one(row.text("prompt"), row.text("completion"))


def _input_output(row: Row) -> Iterator[Dialogue]:
    yield one(row.text("input"), row.text("output"))


def _chosen(row: Row) -> Iterator[Dialogue]:
    """HH-RLHF's: the dialogue that was preferred; all of it is learnt."""
    yield one("", row.text("chosen"))


def _text(row: Row) -> Iterator[Dialogue]:
    """Chip2's question and answer, or a dialogue as OASST1's, all of which is learnt."""
    text = row.text("text")
    question, bot, answer = text.partition("\n<bot>: ")
    yield one(question.removeprefix("<human>: "), answer) if bot else one("", text)


def _turns(field: str, role: str, content: str) -> Reader:
    """Of conversations, in which every turn of the assistant's is learnt."""

    def read(row: Row) -> Iterator[Dialogue]:
        source, pairs = _SYSTEM, []
        for turn in row.inner(field):
            speaker, text = _ROLES.get(turn.text(role)), turn.text(content).strip()
            if speaker == "system":
                source = source.removesuffix(_SYSTEM) + text
            elif speaker == "user":
                source = f"{source} USER: {text}".lstrip()
            elif speaker == "assistant":
                pairs.append(Pair(f"{source} ASSISTANT:".lstrip(), f" {text}"))
                source = ""
            else:
                known = ", ".join(_ROLES)
                raise row.place.error(f"{role} must be of {known}, got {turn.values[role]!r}")
        if pairs:  # else there is nothing to learn, as in some of ShareGPT's
            yield Dialogue(tuple(pairs))

    return read


def _worded(instruction: str, context: str) -> str:
    template = _WITH_INPUT if context else _WITHOUT_INPUT
    return template.format(instruction=instruction, input=context)


# By the fields of their records, the more particular first.
_READERS: tuple[tuple[frozenset[str], Reader], ...] = (
    (frozenset({"conversations"}), _turns("conversations", "from", "value")),
    (frozenset({"messages"}), _turns("messages", "role", "content")),
    (frozenset({"instruction", "instances"}), _seeds),
    (frozenset({"instruction", "output"}), _alpaca),
    (frozenset({"prompt", "completion"}), _self_instruct),
    (frozenset({"input", "output"}), _input_output),
    (frozenset({"chosen"}), _chosen),
    (frozenset({"text"}), _text),
)
