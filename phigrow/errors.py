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
