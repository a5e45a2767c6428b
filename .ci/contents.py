"""Check that sdist and wheel have every file that they need, and the wheel no others: ``contents.py SDIST WHEEL``."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile

LEFT_OUT = ("benchmarks/results/",)
"""Folders of which the sdist leaves generated files out."""


def main(sdist: str, wheel: str) -> int:
    """Compare both archives with the files that git tracks.

    Returns:
        0 if nothing is missing, 1 otherwise.
    """
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    with tarfile.open(sdist) as archive:
        packed = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    missing = [name for name in tracked if name not in packed and name != "recipes" and not name.startswith(LEFT_OUT)]
    with zipfile.ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {name for name in tracked if name.startswith("phigrow/")}
    for what, names in {
        "missing in the sdist": missing,
        "missing in the wheel": sorted(package - installed),
        "in the wheel, but not tracked": sorted(installed - package),
    }.items():
        if names:
            print(f"{what}: {', '.join(names)}")
            return 1
    print(f"sdist: {len(packed)} files; wheel: {len(installed)} files, all of them tracked")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
