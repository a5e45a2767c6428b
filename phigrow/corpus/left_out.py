"""Counts of text that is not packed, by reason, with examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 3
"""Most examples of one reason."""

DESCRIPTION, OTHER_SPLIT, OTHER_CONFIG, OTHER_KIND = "description", "other_split", "other_config", "other_kind"
LINKED, NO_ROWS = "linked_folder", "no_documents"
UNDECODABLE, EMPTY, DUPLICATE = "undecodable", "empty", "duplicate"

WORDS = {
    DESCRIPTION: ("file about the data", "files about the data"),
    OTHER_SPLIT: ("file of another split", "files of other splits"),
    OTHER_CONFIG: ("file of another configuration", "files of other configurations"),
    OTHER_KIND: ("file of an unknown kind", "files of unknown kinds"),
    LINKED: ("linked folder", "linked folders"),
    NO_ROWS: ("file without documents", "files without documents"),
    UNDECODABLE: ("document that is null or not UTF-8", "documents that are null or not UTF-8"),
    EMPTY: ("empty document", "empty documents"),
    DUPLICATE: ("duplicate", "duplicates"),
}
"""Reasons, in the order in which they are listed, with their name for one and for several."""


def printable(name: str) -> str:
    """Return the name of a file with escapes for control characters, and for bytes that are not UTF-8.

    >>> printable("caf\\udce9.txt")
    'caf\\\\udce9.txt'
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in name)


@dataclass
class LeftOut:
    """Files and documents that are not packed: their number and first examples by reason.

    ``marks`` are documents that are packed without their byte-order mark.

    >>> left_out = LeftOut()
    >>> left_out.add("description", "README.md")
    >>> left_out.add("duplicate", "'Once upon'", count=4)
    >>> print(left_out)
    Left out: 1 file about the data (README.md), 4 duplicates ('Once upon', ...).
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    marks: list[str] = field(default_factory=list)
    marked: int = 0

    def add(self, reason: str, *examples: str, count: int | None = None) -> None:
        """Count examples of a reason; ``count`` is their number if only some are given."""
        number = len(examples) if count is None else count
        if number:
            self.counts[reason] = self.counts.get(reason, 0) + number
            self.examples[reason] = [*self.examples.get(reason, []), *map(printable, examples)][:EXAMPLES]

    def add_marks(self, *examples: str, count: int | None = None) -> None:
        """Count documents whose byte-order mark was removed."""
        self.marked += len(examples) if count is None else count
        self.marks = [*self.marks, *map(printable, examples)][:EXAMPLES]

    def update(self, other: LeftOut) -> None:
        """Add the counts and examples of another object."""
        for reason, count in other.counts.items():
            self.add(reason, *other.examples[reason], count=count)
        self.add_marks(*other.marks, count=other.marked)

    def as_dict(self) -> dict[str, Any]:
        """Return ``{reason: {count, examples}}`` for ``data.json``, without reasons that did not occur."""
        content = {
            reason: {"count": self.counts[reason], "examples": self.examples[reason]}
            for reason in WORDS
            if reason in self.counts
        }
        if self.marked:
            content["byte_order_mark"] = {"count": self.marked, "examples": self.marks}
        return content

    def __bool__(self) -> bool:
        return bool(self.counts or self.marked)

    def __str__(self) -> str:
        """Return one line; empty if nothing was left out."""
        return describe(self.as_dict())


def describe(content: dict[str, Any]) -> str:
    """Return one line on the content of `LeftOut.as_dict`; empty if there is none."""
    marks = content.get("byte_order_mark")
    parts = [
        f"{each['count']:,} {WORDS[reason][each['count'] != 1]}{_examples(each)}"
        for reason, each in content.items()
        if each is not marks
    ]
    sentences = [f"Left out: {', '.join(parts)}."] if parts else []
    if marks:
        documents = f"document{'s' * (marks['count'] != 1)}"
        sentences.append(f"Removed the byte-order mark of {marks['count']:,} {documents}{_examples(marks)}.")
    return " ".join(sentences)


def _examples(each: dict[str, Any]) -> str:
    names = [*each["examples"], *["..."] * (each["count"] > len(each["examples"]))]
    return f" ({', '.join(names)})" if each["examples"] else ""
