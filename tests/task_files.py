"""Make the tasks that phigrow ships: `python tests/task_files.py --write` writes phigrow/evaluation/tasks.

Every text is made here, from the tables and templates below and a fixed seed; none is copied from a corpus. A document
is one line: a prompt, choices that continue it, and the place of the right one.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "phigrow" / "evaluation" / "tasks"

Document = dict[str, Any]

OPERATIONS = {
    "sum": "+", "difference": "-", "product": "*", "quotient": "/", "remainder": "%", "integer quotient": "//",
}  # fmt: skip
COMPARISONS = {
    "larger than": ">", "smaller than": "<", "equal to": "==", "different from": "!=", "at least": ">=",
    "at most": "<=",
}  # fmt: skip
LIST_CALLS = {
    "number of items": "len({})", "largest item": "max({})", "smallest item": "min({})", "sum": "sum({})",
    "first item": "{}[0]", "last item": "{}[-1]", "sorted copy": "sorted({})", "set of different items": "set({})",
    "items without the first": "{}[1:]", "items in reverse order": "{}[::-1]",
}  # fmt: skip
TEXT_CALLS = {
    "in capital letters": "{}.upper()", "in small letters": "{}.lower()", "without spaces at both ends": "{}.strip()",
    "as a list of words": "{}.split()", "as an integer": "int({})", "as a list of lines": "{}.splitlines()",
}  # fmt: skip
PAIRS = (("first", "second"), ("left", "right"), ("width", "height"), ("price", "tax"), ("old", "new"))
LISTS = ("values", "numbers", "prices", "scores", "weights")
TEXTS = ("text", "line", "name", "title")

OPPOSITES = (
    ("mutable", "immutable"), ("true", "false"), ("positive", "negative"), ("larger", "smaller"), ("even", "odd"),
    ("open", "closed"), ("local", "global"), ("public", "private"), ("empty", "full"), ("ascending", "descending"),
    ("sorted", "unsorted"), ("finite", "infinite"), ("fast", "slow"), ("first", "last"), ("before", "after"),
    ("minimum", "maximum"),
)  # fmt: skip
TYPES = (
    ("3.5", "float"), ("7", "int"), ("'seven'", "str"), ("[1, 2]", "list"), ("(1, 2)", "tuple"), ("{1, 2}", "set"),
    ("{'a': 1}", "dict"), ("True", "bool"), ("b'seven'", "bytes"), ("None", "NoneType"),
)  # fmt: skip
PURPOSES = (
    ("opens a file", "open"), ("prints a line of text", "print"), ("counts the items of a list", "len"),
    ("adds the items of a list", "sum"), ("sorts a list into a new one", "sorted"),
    ("turns a text into an integer", "int"), ("numbers the items of a loop", "enumerate"),
    ("joins two lists item by item", "zip"), ("reads a line from the keyboard", "input"),
    ("rounds a number", "round"), ("gives the type of an object", "type"), ("gives the absolute value", "abs"),
)  # fmt: skip
KEYWORDS = (
    ("A function begins with the keyword", "def"), ("A class begins with the keyword", "class"),
    ("A function gives back its result with", "return"), ("A loop over the items of a list begins with", "for"),
    ("A loop that runs as long as a condition holds begins with", "while"), ("A loop ends early with", "break"),
    ("A module is loaded with the statement", "import"), ("An exception is raised with the statement", "raise"),
    ("An exception is handled in the block that begins with", "except"),
    ("A name is removed with the statement", "del"),
    ("A generator gives its values one by one with", "yield"), ("A condition is tested with the statement", "if"),
    ("A block that always runs at the end begins with", "finally"), ("A context is entered with the statement", "with"),
    ("An anonymous function is written with", "lambda"), ("A statement that does nothing is", "pass"),
)  # fmt: skip
SENTENCES = (
    "One of the two is {one}. The other is not {one} but",
    "The opposite of {one} is",
    "If the answer is not {one}, it is",
)


def document(rng: random.Random, prompt: str, right: str, others: list[str]) -> Document:
    """A document with up to three of the wrong choices, in random order, all different."""
    wrong = list(dict.fromkeys(each for each in others if each != right))
    choices = [right, *rng.sample(wrong, min(3, len(wrong)))]
    rng.shuffle(choices)
    return {"prompt": prompt, "choices": choices, "answer": choices.index(right)}


def cloze(rng: random.Random) -> list[Document]:
    """Sentences of a textbook whose last word is missing."""
    documents = []
    words = [word for pair in OPPOSITES for word in pair]
    for pair in OPPOSITES:
        for (one, other), sentence in zip([pair, pair[::-1], pair], SENTENCES, strict=True):
            others = [f" {word}." for word in words if word != one]
            documents.append(document(rng, sentence.format(one=one), f" {other}.", others))
    for value, kind in TYPES:
        others = [f" {other}." for _, other in TYPES]
        documents.append(document(rng, f"In Python, the value {value} has the type", f" {kind}.", others))
    for purpose, name in PURPOSES:
        others = [f" {other}." for _, other in PURPOSES]
        documents.append(document(rng, f"The built-in function of Python that {purpose} is", f" {name}.", others))
    for sentence, word in KEYWORDS:
        documents.append(document(rng, sentence, f" {word}.", [f" {other}." for _, other in KEYWORDS]))
    return documents


def arithmetic(rng: random.Random) -> list[Document]:
    """Sums, differences and products of small whole numbers; a wrong choice is near, or has its digits reversed."""
    documents: list[Document] = []
    asked: set[str] = set()
    while len(documents) < 96:
        number = len(documents)
        sign = "+-*"[number % 3]
        most = 12 if sign == "*" else 10 ** (1 + number // 3 % 2)
        one, two = rng.randint(2, most), rng.randint(2, most)
        if sign == "-":
            one, two = max(one, two), min(one, two)
        if (prompt := f"{one} {sign} {two} =") in asked:
            continue
        asked.add(prompt)
        right = {"+": one + two, "-": one - two, "*": one * two}[sign]
        near = [right + 1, right + 2, abs(right - 1), right + 10, int(str(right)[::-1])]
        documents.append(document(rng, prompt, f" {right}\n", [f" {each}\n" for each in near]))
    return documents


def code(rng: random.Random) -> list[Document]:
    """Functions of Python with a docstring, whose return value is missing."""
    documents = []
    for one, two in PAIRS:
        for noun, sign in OPERATIONS.items():
            others = [f" {one} {other} {two}\n" for other in OPERATIONS.values()] + [f" {one} {sign} {one}\n"]
            name = f"{noun.replace(' ', '_')}_of"
            head = f'def {name}({one}, {two}):\n    """Return the {noun} of {one} and {two}."""\n    return'
            documents.append(document(rng, head, f" {one} {sign} {two}\n", others))
        for words, sign in COMPARISONS.items():
            others = [f" {one} {other} {two}\n" for other in COMPARISONS.values()]
            name = f"is_{words.replace(' ', '_')}"
            head = f'def {name}({one}, {two}):\n    """Return True if {one} is {words} {two}."""\n    return'
            documents.append(document(rng, head, f" {one} {sign} {two}\n", others))
    for place, (noun, call) in enumerate(LIST_CALLS.items()):
        for name in (LISTS[place % len(LISTS)], LISTS[(place + 2) % len(LISTS)]):
            others = [f" {other.format(name)}\n" for other in LIST_CALLS.values()]
            head = f'def compute({name}):\n    """Return the {noun} of {name}."""\n    return'
            documents.append(document(rng, head, f" {call.format(name)}\n", others))
    for words, call in TEXT_CALLS.items():
        for name in TEXTS:
            others = [f" {other.format(name)}\n" for other in TEXT_CALLS.values()]
            head = f'def convert({name}):\n    """Return {name} {words}."""\n    return'
            documents.append(document(rng, head, f" {call.format(name)}\n", others))
    return documents


def answers(rng: random.Random) -> list[Document]:
    """Questions with one reference answer each, of which the bits a byte are measured."""
    documents = []

    def ask(question: str, answer: str) -> None:
        documents.append({"prompt": f"Question: {question}\nAnswer:", "choices": [f" {answer}\n"], "answer": 0})

    for noun, sign in OPERATIONS.items():
        one, two = rng.choice(PAIRS)
        body = f"def compute({one}, {two}):\n    return {one} {sign} {two}"
        ask(f"Write a Python function that returns the {noun} of {one} and {two}.", body)
    for words, sign in COMPARISONS.items():
        one, two = rng.choice(PAIRS)
        body = f"if {one} {sign} {two}:\n    print({one})"
        ask(f"Print {one} in Python if it is {words} {two}.", body)
    for noun, call in LIST_CALLS.items():
        name = rng.choice(LISTS)
        ask(f"Which expression of Python gives the {noun} of {name}?", call.format(name))
    for words, call in TEXT_CALLS.items():
        name = rng.choice(TEXTS)
        ask(f"Which expression of Python gives {name} {words}?", call.format(name))
    for purpose, name in PURPOSES:
        ask(f"Which built-in function of Python {purpose}?", f"The function {name} {purpose}.")
    for sentence, word in KEYWORDS:
        ask(f"Complete the sentence: {sentence} ...", f"{sentence} {word}.")
    return documents


MAKERS = {"answers": answers, "arithmetic": arithmetic, "cloze": cloze, "code": code}
"""Task -> the function that makes its documents."""


def contents() -> dict[str, str]:
    """File name -> content, of every shipped task."""
    return {
        f"{name}.jsonl": "".join(json.dumps(each) + "\n" for each in make(random.Random(f"phigrow {name}")))
        for name, make in MAKERS.items()
    }


if __name__ == "__main__":
    for file, text in contents().items():
        if "--write" in sys.argv:
            (FOLDER / file).write_text(text, encoding="utf-8")
        print(f"{file}: {text.count(chr(10))} documents, {len(text):,} bytes")
