"""Run the commands that errors print, in this process."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path


def run_command(text: str) -> None:
    """Run the commands of an advice in this process: cd, mkdir, mv and python."""
    start = re.search(r"(cd|mkdir|mv|python) ", text)
    assert start, text
    lexer = shlex.shlex(
        text[start.start() :].split(", and copy")[0].split(', and give"')[0], posix=True, punctuation_chars=";&"
    )
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word not in (";", "&&"):
            words.append(word)
            continue
        match words:
            case ["cd", folder]:
                os.chdir(folder)
            case ["mkdir", "-p", folder]:
                Path(folder).mkdir(parents=True, exist_ok=True)
            case ["mv", old, new]:
                Path(old).rename(new)
            case ["python", "-c", code]:
                exec(compile(code, "advice", "exec"), {})
            case ["python", "-m", module, *arguments]:
                former, sys.argv = sys.argv, [module, *arguments]
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", RuntimeWarning)  # of a module that is imported already
                        runpy.run_module(module, run_name="__main__")
                finally:
                    sys.argv = former
            case _:
                raise AssertionError(f"no command of this test: {words}")
        words = []
