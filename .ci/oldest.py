"""Run tests with the oldest supported versions of every package, those of ``constraints-oldest.txt``.

``install`` makes an environment beside the one that runs this script. ``check`` installs it if it is missing, and runs
the tests in `TESTS`. The tests take phigrow from this checkout.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = Path(sys.prefix) / "oldest"
PYTHON = FOLDER / "bin" / "python"
PINS = ROOT / "constraints-oldest.txt"
INSTALLED = FOLDER / "installed"

TESTS = [
    "tests/checkpoints/test_rope_parameters.py",
    "tests/checkpoints/test_configuration.py",
    "tests/models/test_family.py",
    "tests/models/test_function.py::test_frequencies_are_those_of_transformers",
    "tests/growth/test_lossless.py",
    "tests/growth/test_contract.py",
    "tests/expansion/test_expand.py",
    "tests/training/test_model_config.py",
    "tests/training/test_starting_runs.py",
    "tests/integrations/test_records_callback.py",
]
"""Families, methods and their claims, expansion, training under DeepSpeed in one process, and records of Trainer."""

LEFT_OUT = "tests/expansion/test_expand.py::test_the_result_is_an_ordinary_folder_without_phigrow"
"""It takes as long as all others of its file, and `make older` loads more of what phigrow writes."""

MARKS = "not slow and not long"  # one process trains under DeepSpeed, so `launch` is not left out
WARNINGS = "ignore::DeprecationWarning"  # of old packages about one another


def install() -> None:
    """Install every package of the constraints, with nothing else that they would bring along."""
    if INSTALLED.is_file() and INSTALLED.read_text() == PINS.read_text():
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(FOLDER)], check=True)
    words = ["--quiet", "--no-deps", "--no-compile", "--disable-pip-version-check", "-r", str(PINS)]
    subprocess.run([str(PYTHON), "-m", "pip", "install", *words], check=True)
    if subprocess.run([str(PYTHON), "-c", "import torch"], capture_output=True, check=False).returncode:
        make_stand_ins(next(FOLDER.glob("lib/python*/site-packages/torch/lib")))
        subprocess.run([str(PYTHON), "-c", "import torch; assert not torch.cuda.is_available()"], check=True)
    INSTALLED.write_text(PINS.read_text())


def make_stand_ins(folder: Path) -> None:
    """Write empty stand-ins for NVIDIA's libraries, which a CUDA build of torch loads before anything else.

    Some indexes have no CPU build of an old torch. Its CUDA build needs 2.5 GB of libraries that tests on a CPU never
    call. Every function of a stand-in returns 100, "no CUDA device is available".

    Args:
        folder: the libraries of torch.
    """
    needed: set[str] = set()
    versioned: dict[str, set[str]] = defaultdict(set)  # library -> its functions, where its name is their version
    others: set[str] = set()
    for library in sorted(folder.glob("*.so*")):
        needed |= set(re.findall(r"NEEDED.*\[(lib(?:cu|nccl|nv)[^\]]*)\]", _output("readelf", "-dW", str(library))))
        for line in _output("nm", "-D", "--undefined-only", str(library)).splitlines():
            name, _, version = line.split()[-1].partition("@")
            if version.startswith(("libcu", "libnv", "libnccl")):
                versioned[version].add(name)
            elif re.match(r"(cu|nccl|nv)[A-Za-z]", name):
                others.add(name)
    with tempfile.TemporaryDirectory() as made:
        for library_name in sorted(needed):
            source, script = Path(made) / f"{library_name}.c", Path(made) / f"{library_name}.map"
            functions = sorted(versioned[library_name] or others)
            source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in functions))
            words = ["-w", "-fno-builtin", "-shared", "-fPIC", f"-Wl,-soname,{library_name}"]
            if versioned[library_name]:
                script.write_text(f"{library_name} {{ global: *; }};\n")
                words.append(f"-Wl,--version-script={script}")
            subprocess.run(["gcc", *words, "-o", str(folder / library_name), str(source)], check=True)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def check() -> int:
    """Run the tests in two processes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [
        "-n",
        "2",
        "--deselect",
        LEFT_OUT,
        "--dist",
        "loadfile",
        "-m",
        MARKS,
        "-W",
        WARNINGS,
        "-p",
        "no:cacheprovider",
    ]
    command = [str(PYTHON), "-m", "pytest", *words, *TESTS]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["install", "check"])
    words = parser.parse_args()
    install()
    return check() if words.action == "check" else 0


if __name__ == "__main__":
    sys.exit(main())
