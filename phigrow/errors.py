"""The exception that phigrow raises for bad input. It carries everything a user needs to fix the input."""

from __future__ import annotations

import re
from typing import Any


class GrowthError(ValueError):
    """Bad input, described so that a user can fix it without reading the code.

    Args:
        what: the problem in one sentence, with the value that was met.
        where: the place: a file, a parameter and its axis, a key of a configuration.
        why: the reason.
        fix: an action for the user.

    The command line prints the message and exits with code 2. Parts of a message may come from a hostile file, so
    control characters are escaped, further lines begin with a bar, and every part is cut after
    `MOST_CHARACTERS`.

    >>> print(GrowthError("hidden shrinks from 8 to 4", where="model.embed_tokens.weight", fix="choose hidden >= 8"))
    hidden shrinks from 8 to 4
      where: model.embed_tokens.weight
      what to do: choose hidden >= 8
    """

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, fix: str | None = None) -> None:
        what, where, why, fix = _shown(what), _shown(where or ""), _shown(why or ""), _shown(fix or "")
        self.what, self.where, self.why, self.fix = what, where, why, fix
        labelled = (("where", where), ("why", why), ("what to do", fix))
        super().__init__("\n".join([what, *(f"  {label}: {text}" for label, text in labelled if text)]))

    def at(self, where: str) -> GrowthError:
        """Return the same error with an outer place, such as the file that holds the key.

        >>> print(GrowthError("lr is -1", where="lr", fix="choose lr > 0").at("arm tile in study.yaml"))
        lr is -1
          where: arm tile in study.yaml: lr
          what to do: choose lr > 0
        """
        place = f"{where}: {self.where}" if self.where else where
        return type(self)(self.what, where=place, why=self.why, fix=self.fix)

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception pickles its positional arguments only, and another process needs the parts.
        return _rebuilt, (type(self), self.what, self.where, self.why, self.fix)


class MachineError(GrowthError):
    """A refusal of the machine or the network, such as a full disk. The same input may work later or elsewhere.

    The training command exits with `phigrow.training.entry.TEMPORARY` for it, other commands with 2.
    """


def _rebuilt(kind: type[GrowthError], what: str, where: str, why: str, fix: str) -> GrowthError:
    return kind(what, where=where, why=why, fix=fix)


MOST_CHARACTERS = 2000
"""Longest part of a message."""


def _shown(text: str) -> str:
    if len(text) > MOST_CHARACTERS:
        text = f"{text[:MOST_CHARACTERS]} ... ({len(text)} characters)"
    # A line of a part never looks like a part of its own, such as "  what to do: ...".
    text = re.sub(r"\n(?!    \| )", "\n    | ", text)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def nearest_multiples(number: int, of: int) -> str:
    """Name the multiples of ``of`` on both sides of ``number``, for the fix of an error.

    >>> nearest_multiples(2048, 96)
    'a multiple of 96, such as 2016 or 2112'
    >>> nearest_multiples(2, 3)
    'a multiple of 3, such as 3'
    """
    below = number // of * of
    return f"a multiple of {of}, such as {' or '.join(str(each) for each in (below, below + of) if each)}"
