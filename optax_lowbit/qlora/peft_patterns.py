r"""Regular expressions of PEFT's config, matched with names in time linear in both.

Configs and names may be anybody's, and Python's `re` takes exponential time for some. Of its
language this has what modules are named with: characters, ``.``, ``\d``, ``\.`` and ``\-``, ``^``
and ``$``, groups of alternatives, and ``*``, ``+`` and ``?`` after one character.

Where in a name a match may have come to is a set of positions, the bits of an int; a part of a
pattern maps such a set to that after it.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

_LONGEST, _MOST_NESTED = 2**12, 16
_TOKEN = re.compile(r"(?P<atom>\\[.d-]|[\w.-])(?P<sign>[*+?]?\??)|(?P<open>\((?:\?:)?)|[)|^$]")
_PLAIN = re.compile(r"\^?(?:[\w.-]|\\[.-])*\$?")


class _Name:
    """A name, and where in it each character is."""

    def __init__(self, name: str):
        self.end = 1 << len(name)
        self._places: dict[str, int] = {}
        for i, character in enumerate(name):
            self._places[character] = self._places.get(character, 0) | 1 << i

    def places(self, atom: str) -> int:
        """The positions of what one character of a pattern stands for."""
        if atom == ".":
            return self.end - 1
        if atom == r"\d":
            return sum(bits for character, bits in self._places.items() if character.isdecimal())
        return self._places.get(atom[-1], 0)


_Part = Callable[[_Name, int], int]


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches all of a name.

    Raises:
      ValueError: If the pattern has more than the module's language.
    """
    text = _name(name)
    return bool(compiled(pattern)(text, 1) & text.end)


def matches_end(pattern: str, name: str) -> bool:
    """Whether a pattern matches all of a name, or all from one of its modules on.

    Raises:
      ValueError: As :func:`matches`.
    """
    part, tail = compiled(pattern), _tail(pattern)
    if not name.endswith(tail):
        return False
    text = _name(name)
    return bool(part(text, 1 | text.places(r"\.") << 1) & text.end)


@functools.lru_cache(maxsize=2**13)
def compiled(pattern: str) -> _Part:
    """The pattern as a map of sets of positions.

    Raises:
      ValueError: As :func:`matches`.
    """
    tokens = [*_TOKEN.finditer(pattern)] if len(pattern) <= _LONGEST else []
    part, rest = _alternatives(tokens, 0)
    if rest < len(tokens) or sum(len(token[0]) for token in tokens) < len(pattern):
        raise _error()
    return part


@functools.lru_cache(maxsize=2**13)
def _tail(pattern: str) -> str:
    """What each name must end with that a pattern matches: most are of other modules."""
    return re.split(r"[.\\-]", pattern.strip("^$"))[-1] if _PLAIN.fullmatch(pattern) else ""


_name = functools.lru_cache(maxsize=2**8)(_Name)


def _alternatives(tokens: list[re.Match[str]], at: int, depth: int = 0) -> tuple[_Part, int]:
    """What stands from a token on to the end of its group, and where that is."""
    if depth > _MOST_NESTED:
        raise _error()
    choices: list[tuple[_Part, ...]] = []
    parts: list[_Part] = []
    while at < len(tokens) and tokens[at][0] != ")":
        token, at = tokens[at], at + 1
        if token[0] == "|":
            choices.append(tuple(parts))
            parts = []
        elif token["open"]:
            part, at = _alternatives(tokens, at, depth + 1)
            if at == len(tokens):
                raise _error()
            at += 1
            parts.append(part)
        elif token["atom"]:
            parts.append(_repeated(token["atom"], token["sign"][:1]))
        else:
            parts.append(_at_start if token[0] == "^" else _at_end)
    choices.append(tuple(parts))
    return functools.partial(_any_of, choices), at


def _any_of(choices: list[tuple[_Part, ...]], name: _Name, at: int) -> int:
    found = 0
    for parts in choices:
        here = at
        for part in parts:
            if not here:
                break
            here = part(name, here)
        found |= here
    return found


def _repeated(atom: str, sign: str) -> _Part:
    def part(name: _Name, at: int) -> int:
        places = name.places(atom)
        once = (at & places) << 1
        if not sign:
            return once
        if sign == "?":
            return at | once
        start = once if sign == "+" else at
        # An addition carries through all of a run of places.
        return start | (((start & places) + places) ^ places)

    return part


def _at_start(name: _Name, at: int) -> int:
    del name
    return at & 1


def _at_end(name: _Name, at: int) -> int:
    return at & name.end


def _error() -> Any:
    return ValueError(
        r"a regular expression here may have names, ., \d, groups of alternatives, and *, + and ? "
        "after one character"
    )
