"""A flag that means nothing to what is learnt is refused, not passed over."""

from dataclasses import fields
from typing import TYPE_CHECKING, Literal

from examples.llm.errors import UsageError

if TYPE_CHECKING:
    from examples.llm.program.settings import Settings

Kind = Literal["text", "a choice of options", "answered freely", "instructions"]

_UNUSED: dict[Kind, tuple[str, ...]] = {
    "text": ("objective", "template", "train_on_source", "train_examples", "eval_examples"),
    "a choice of options": ("train_on_source", "pack", "eval_batches"),
    "answered freely": ("train_on_source", "eval_batches"),
    "instructions": ("objective", "template", "eval_batches"),
}


def check_used(settings: "Settings", kind: Kind) -> None:
    """Raise a `UsageError` that names the first setting that a task of this kind has no use for."""
    unused = {*_UNUSED[kind]} - ({"eval_examples"} if settings.judge else set())
    for field in fields(settings):
        if field.name in unused and getattr(settings, field.name) != field.default:
            # Of those above, one is there to be switched off.
            flag = ("--no-" if field.default is True else "--") + field.name.replace("_", "-")
            raise UsageError(f"{flag}: {settings.task} is {kind}, which has no use for it")
