"""Run the commands that a page shows, and compare what they print with the output that the page shows.

A page shows commands in ``console`` blocks: a line that starts with ``$ `` is a command (it continues after a
backslash at the end of the line), the lines below it are its output. A ``python`` or ``yaml`` block with a title is a
file that the commands use.

    python tests/console.py docs/quickstart.md            # exit code 1 if a command fails
    python tests/console.py docs/quickstart.md --write    # put what the commands print into the page
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r'^```(?:python|yaml) title="([\w./-]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
ENVIRONMENT = {"COLUMNS": "88", "NO_COLOR": "1", "TERM": "dumb", "PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu"}
"""The last one keeps DeepSpeed from printing which accelerator it found."""


class Printed(NamedTuple):
    """A command, the output on the page, and the output that the command printed."""

    command: str
    shown: str
    printed: str


def run_page(page: Path, folder: Path) -> Iterator[Printed]:
    """Run the commands of a page one after the other in a folder.

    Raises:
        RuntimeError: a command fails; the message has its output.
    """
    text = page.read_text(encoding="utf-8")
    for name, content in FILE.findall(text):
        (folder / name).write_text(content, encoding="utf-8")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, **ENVIRONMENT, "PATH": path}
    for block in BLOCK.findall(text):
        for command, shown in COMMAND.findall(block):
            done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{command}\n{done.stdout}{done.stderr}")
            yield Printed(command, shown, _tidied(done.stdout))


def without_numbers(text: str) -> str:
    """Replace numbers, hashes and runs of spaces in a text, because they differ from machine to machine."""
    return re.sub(r"\s+", " ", re.sub(r"\b[0-9a-f]{16,}\b|-?\d[\d.,e+-]*", "#", text)).strip()


def _tidied(text: str) -> str:
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    return "".join(f"{line}\n" for line in lines)


def main(words: list[str]) -> int:
    """Run a page in a new folder; see the top of the file."""
    page, write = Path(words[0]), "--write" in words
    text = page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        try:
            for command, shown, printed in run_page(page, Path(folder)):
                print(f"$ {command}\n{printed}", end="", flush=True)
                text = text.replace(f"$ {command}\n{shown}", f"$ {command}\n{printed}", 1)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    if write:
        page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
