"""A question with options, and the template that words it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """What a line of a task's file says, before it is worded.

    Attributes:
      fields: texts by name, for a `Template`.
      label: number of the right option.
      keys: what the record is about; records that share a key are never split up.
      subject: the part of the task that it belongs to, if that has any.
    """

    fields: Mapping[str, str]
    label: int
    keys: tuple[str, ...]
    subject: str = ""


@dataclass(frozen=True)
class Example:
    """A text that one of several options continues.

    Attributes:
      prompt: the text; empty if there is nothing before the options.
      options: the continuations, each with the space before it.
      label: number of the right option.
      subject: the part of the task that it belongs to, if that has any.
    """

    prompt: str
    options: tuple[str, ...]
    label: int
    subject: str = ""


@dataclass(frozen=True)
class Template:
    """The wording of a task: texts in which `{name}` stands for a field of a record.

    Attributes:
      prompt: what the options continue.
      options: the continuations.
    """

    prompt: str
    options: tuple[str, ...]

    def example(self, record: Record) -> Example:
        """Word a record."""
        options = tuple(option.format_map(record.fields) for option in self.options)
        prompt = self.prompt.format_map(record.fields)
        return Example(prompt, options, record.label, record.subject)
