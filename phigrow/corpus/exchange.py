"""Tokens that the ranks of one host make for each other, so that each of them tokenises a part of a stream."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.uint32]

PREFIX = "phigrow-tokens-"
"""Begin of the names of folders for exchanges."""

WAIT_SECONDS = 30.0
"""Longest wait for another rank's tokens. Then a rank makes them itself, so no rank can stop another one."""

POLL_SECONDS = 0.002

STALE_SECONDS = 86400.0
"""Age of a folder that no rank has used, from which it counts as left behind by a run that was killed."""


class TokenExchange:
    """Exchange of the tokens of groups of documents among the ranks of one host, through files in shared memory.

    All ranks read the same groups in the same order. Group k belongs to rank k modulo their number. Its owner gives the
    tokens to all others, which take them from a folder of their own. The tokens are a function of the text alone, so a
    rank that does not get them makes them itself, and the result is the same.

    Args:
        folder: the same on all ranks of a host, and of no other run; see `exchange_folder`.
        rank, size: number of this rank on its host, and of all ranks there.
        wait: longest wait in seconds.
    """

    def __init__(self, folder: Path, rank: int, size: int, *, wait: float = WAIT_SECONDS) -> None:
        self.folder, self.rank, self.size, self.wait = folder, rank, size, wait
        self._stopped = False
        with self._stops_on_errors():
            folder.mkdir(mode=0o700, exist_ok=True)
            self._inbox(rank).mkdir(mode=0o700)

    def is_complete(self) -> bool:
        """Return true if this rank sees the folders of all ranks. Call it after all ranks have made theirs."""
        return not self._stopped and all(self._inbox(rank).is_dir() for rank in range(self.size))

    def is_mine(self, number: int) -> bool:
        """Return true if this rank tokenises the group of this number."""
        return number % self.size == self.rank

    def give(self, name: str, ids: Tokens) -> None:
        """Give the tokens of a group to all other ranks."""
        if self._stopped:
            return
        file = self.folder / f"{name}-from-{self.rank}"
        with self._stops_on_errors():
            ids.tofile(file)
            for rank in range(self.size):
                if rank != self.rank:
                    (self._inbox(rank) / name).hardlink_to(file)
            file.unlink()

    def take(self, name: str) -> Tokens | None:
        """Return the tokens of a group of another rank; None if they do not come."""
        file, end = self._inbox(self.rank) / name, time.monotonic() + self.wait
        while True:
            # A rank that stops has given all that it will give, so the file is looked for after the sign.
            ends = self._stopped or self._sign().exists() or not file.parent.is_dir() or time.monotonic() > end
            with contextlib.suppress(OSError):
                ids = np.fromfile(file, np.uint32)
                file.unlink()
                return ids
            if ends:
                return None
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Stop the exchange, and remove this rank's folder. The last rank removes everything."""
        self._stop()
        shutil.rmtree(self._inbox(self.rank), ignore_errors=True)
        if not any(self._inbox(rank).exists() for rank in range(self.size)):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _inbox(self, rank: int) -> Path:
        return self.folder / f"to-{rank}"

    def _sign(self) -> Path:
        return self.folder / "stopped"

    def _stop(self) -> None:
        """Let all ranks tokenise by themselves from now on."""
        self._stopped = True
        with contextlib.suppress(OSError):
            self._sign().touch()

    @contextlib.contextmanager
    def _stops_on_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # no space, or no links between files: this is about speed only
            self._stop()


def exchange_folder(token: str) -> Path:
    """Return the folder of an exchange, in shared memory where the host has any. ``token`` is random.

    Folders that runs have left behind are removed.
    """
    shared = Path("/dev/shm")
    root = shared if shared.is_dir() else Path(tempfile.gettempdir())
    for folder in root.glob(PREFIX + "*"):
        with contextlib.suppress(OSError):
            if time.time() - max(each.stat().st_mtime for each in (folder, *folder.iterdir())) > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
    return root / (PREFIX + token)
