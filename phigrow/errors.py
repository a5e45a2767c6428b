"""The one exception that phigrow raises for bad input, with room for everything a user needs to fix it."""

from __future__ import annotations


class GrowthError(ValueError):
    """Bad input, said so that it can be fixed without reading the code.

    Args:
        what: one sentence, what is wrong.
        where: the place: a file, a parameter and its axis, a key of a configuration.
        why: why phigrow cannot go on.
        fix: what to do instead.

    The command line prints the message and exits with code 2. Parts of it may come from a hostile file: what a terminal
    would obey rather than show is escaped, and no part is longer than `MOST_CHARACTERS`.

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


MOST_CHARACTERS = 2000
"""Of one part of a message."""


def _shown(text: str) -> str:
    if len(text) > MOST_CHARACTERS:
        text = f"{text[:MOST_CHARACTERS]} ... ({len(text)} characters)"
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def nearest_multiples(number: int, of: int) -> str:
    """Name, for the fix of an error, the multiples on both sides of a number that is none.

    >>> nearest_multiples(2048, 96)
    'a multiple of 96, such as 2016 or 2112'
    >>> nearest_multiples(2, 3)
    'a multiple of 3, such as 3'
    """
    below = number // of * of
    return f"a multiple of {of}, such as {' or '.join(str(each) for each in (below, below + of) if each)}"
