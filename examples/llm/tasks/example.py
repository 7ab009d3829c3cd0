"""A question with options, or one that is answered freely, and the template that words it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """What a row of a task says, before it is worded.

    Attributes:
      fields: texts by name, for a `Template`.
      keys: what the record is about; records that share a key are never split up.
      label: number of the right option.
      subject: the part of the task that it belongs to, if that has any.
      options: its own, where they are not those of the template.
      answers: texts that are right, of a task that is answered freely.
    """

    fields: Mapping[str, str]
    keys: tuple[str, ...]
    label: int = 0
    subject: str = ""
    options: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """A text that one of several options continues.

    Attributes:
      prompt: the text; empty if there is nothing before the options.
      options: the continuations, each with the space before it; of a task that is answered freely
        the only one is what is learnt.
      label: number of the right option.
      subject: the part of the task that it belongs to, if that has any.
      answers: see `Record`.
    """

    prompt: str
    options: tuple[str, ...]
    label: int = 0
    subject: str = ""
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Template:
    """The wording of a task: texts in which `{name}` stands for a field of a record.

    Attributes:
      prompt: what the options continue.
      options: the continuations; where records bring options of their own, the only one has
        `{option}` for each.
    """

    prompt: str
    options: tuple[str, ...]

    def example(self, record: Record) -> Example:
        """Word a record."""
        fields = record.fields
        if record.options:
            (option,) = self.options
            options = tuple(option.format(**fields, option=own) for own in record.options)
        else:
            options = tuple(option.format_map(fields) for option in self.options)
        prompt = self.prompt.format_map(fields)
        return Example(prompt, options, record.label, record.subject, record.answers)
