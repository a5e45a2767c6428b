"""Build, check and unpack the archive of records that a release carries beside the code.

    python benchmarks/release_records.py build phigrow-records-DATE.tar benchmarks/results/DATE-study-NAME-MACHINE ...
    python benchmarks/release_records.py check phigrow-records-DATE.tar
    python benchmarks/release_records.py unpack phigrow-records-DATE.tar

``build`` packs the folder ``records/`` of each study and writes a manifest: the name, size and SHA-256 of the archive,
and the path, size and SHA-256 of each file in it. ``check`` compares an archive with the manifest. ``unpack`` checks,
then puts the files where they belong in `benchmarks/results`. Only the standard library is needed.

The archive is a plain tar file: its records are gzip files already. So it has the same bytes wherever it is built,
while the output of a compressor depends on its version.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
MANIFEST = RESULTS / "records-manifest.json"
FORMAT = 1


class ArchiveError(Exception):
    """An archive, a manifest or a folder that cannot be used; the message says why and what to do."""


def build(archive: Path, studies: Iterable[Path], manifest: Path = MANIFEST) -> dict[str, Any]:
    """Pack the records of ``studies`` into ``archive`` and describe them in ``manifest``.

    Files are sorted by path and have no owner, no time and one mode, so the same records give the same bytes.

    Raises:
        ArchiveError: a study has no records; two studies have one name; a link or a device is among the records.
    """
    files: dict[str, Path] = {}
    for study in studies:
        records = study / "records"
        if not records.is_dir():
            raise ArchiveError(
                f"{study} has no folder records/. Give folders of studies, as benchmarks/archive.py makes."
            )
        below = {f"{study.resolve().name}/{path.relative_to(study).as_posix()}": path for path in records.rglob("*")}
        for name, path in below.items():
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise ArchiveError(f"{path} is not an ordinary file. Put the file itself there, or remove it.")
            if name in files:
                raise ArchiveError(f"Two of the studies hold {name}. Give each study once.")
        files |= {name: path for name, path in below.items() if path.is_file()}
    if not files:
        raise ArchiveError("There are no records to pack. Give at least one study that has some.")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(files):
            content = files[name].read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content))
    described = {
        "format": FORMAT,
        "archive": {"name": archive.name, **_measured(packed.getvalue())},
        "files": [{"path": name, **_measured(files[name].read_bytes())} for name in sorted(files)],
    }
    _verified(packed.getvalue(), described, archive)
    _write(archive, packed.getvalue())
    _write(manifest, _as_text(described).encode())
    return described


def check(archive: Path, manifest: Path = MANIFEST) -> dict[str, bytes]:
    """Compare ``archive`` with ``manifest`` and return the content of each file by its path.

    Raises:
        ArchiveError: either cannot be read; the archive has another size or hash; a file in it is altered, is missing,
            is listed nowhere, or is a link; a path leads out of the folder.
    """
    described = read_manifest(manifest)
    expected = described["archive"]
    try:
        size = archive.stat().st_size
        content = archive.read_bytes() if size == expected["bytes"] else None
    except OSError as error:
        raise ArchiveError(
            f"{archive} cannot be read: {error.strerror}. Give the downloaded {expected['name']}."
        ) from None
    if content is None:
        raise ArchiveError(
            f"{archive} has {size} bytes, and {expected['name']} has {expected['bytes']}. "
            "Download it again, from the release that this manifest belongs to."
        )
    return _verified(content, described, archive)


def unpack(archive: Path, folder: Path = RESULTS, manifest: Path = MANIFEST) -> list[Path]:
    """Check ``archive``, then write its files below ``folder``; return those that were not there before.

    Nothing is written unless everything can be: a file that exists with other content is refused, one with the same
    content is left alone.

    Raises:
        ArchiveError: as ``check``; a file in ``folder`` differs; a link in ``folder`` leads out of it.
    """
    contents = check(archive, manifest)
    root = folder.resolve()
    missing = {}
    for name, content in contents.items():
        path = root / name
        if not path.resolve().is_relative_to(root):
            raise ArchiveError(f"{path} is behind a link that leads out of {folder}. Remove the link.")
        if not path.exists():
            missing[path] = content
        elif not path.is_file() or path.read_bytes() != content:
            raise ArchiveError(
                f"{path} exists and differs from the file in {archive}. Move it away, then unpack again."
            )
    for path, content in missing.items():
        _write(path, content)
    return list(missing)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest and refuse one that is malformed or lists a path out of the folder.

    Raises:
        ArchiveError: it cannot be read; it has another format; an entry is incomplete, unsafe, or there twice.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArchiveError(
            f"{path} cannot be read: {error.strerror}. It is in the repository; check it out again."
        ) from None
    except ValueError as error:
        raise ArchiveError(f"{path} is not valid JSON: {error}. Check it out again.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArchiveError(f"{path} is not a manifest of format {FORMAT}. Use the script of the same release.")
    try:
        entries = [
            (manifest["archive"], manifest["archive"]["name"]),
            *((each, each["path"]) for each in manifest["files"]),
        ]
        names = [name for _, name in entries]
        valid = all(type(each["bytes"]) is int and len(bytes.fromhex(each["sha256"])) == 32 for each, _ in entries)
        valid = valid and all(isinstance(name, str) for name in names) and len(names) > 1
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise ArchiveError(f"{path} has an entry without a name, a size or a SHA-256. Check it out again.")
    for name in names:
        if not _stays_inside(name):
            raise ArchiveError(f"{path} lists {name!r}, which leads out of the folder. Do not use this manifest.")
        if names.count(name) > 1:
            raise ArchiveError(f"{path} lists {name} twice. Check it out again.")
    return manifest


def _stays_inside(name: str) -> bool:
    # Backslashes, drives and empty or dotted parts mean other places on some systems.
    return (
        not any(sign in name for sign in "\\:\0")
        and all(part not in ("", ".", "..") for part in name.split("/"))
        and not PurePosixPath(name).is_absolute()
    )


def _verified(content: bytes, manifest: dict[str, Any], archive: Path) -> dict[str, bytes]:
    """Return the files of an archive after every comparison with its manifest."""
    digest, expected_digest = _measured(content)["sha256"], manifest["archive"]["sha256"]
    if digest != expected_digest:
        raise ArchiveError(f"{archive} was altered: its SHA-256 is {digest}, not {expected_digest}. Download it again.")
    listed = {each["path"]: each for each in manifest["files"]}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                if not _stays_inside(member.name):
                    raise ArchiveError(
                        f"{archive} has a file {member.name!r}, which leads out of the folder. Do not use it."
                    )
                if member.name not in listed or member.name in found:
                    often = "twice" if member.name in found else "which the manifest does not list"
                    raise ArchiveError(f"{archive} has {member.name}, {often}. Do not use it.")
                if member.type != tarfile.REGTYPE:
                    raise ArchiveError(
                        f"{archive} has {member.name} as a link or a device, not as a file. Do not use it."
                    )
                expected = listed[member.name]
                read = tar.extractfile(member)
                found[member.name] = b"" if read is None or member.size != expected["bytes"] else read.read()
                if _measured(found[member.name]) != {key: expected[key] for key in ("bytes", "sha256")}:
                    raise ArchiveError(f"{archive} has another {member.name} than the manifest lists. Do not use it.")
    except tarfile.TarError as error:
        raise ArchiveError(f"{archive} is not a tar file: {error}. Download it again.") from None
    if absent := sorted(listed.keys() - found.keys()):
        raise ArchiveError(f"{archive} lacks {len(absent)} listed files, {absent[0]} among them. Do not use it.")
    return found


def _measured(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _as_text(manifest: dict[str, Any]) -> str:
    """Write JSON with one line for each file, so that differences are read line by line."""
    files = ",\n  ".join(json.dumps(each) for each in manifest["files"])
    return (
        f'{{\n "format": {manifest["format"]},\n "archive": {json.dumps(manifest["archive"])},\n'
        f' "files": [\n  {files}\n ]\n}}\n'
    )


def _write(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and then put it in place, so that it is whole or not there."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ArchiveError(f"{path} cannot be written: {error.strerror}. Make room or give another folder.") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, default=MANIFEST, help="default: %(default)s")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (
        ("build", "pack the records of studies and write the manifest"),
        ("check", "compare an archive with the manifest"),
        ("unpack", "check an archive, then unpack it"),
    ):
        command = commands.add_parser(name, help=words)
        command.add_argument("archive", type=Path)
        if name == "build":
            command.add_argument("studies", type=Path, nargs="+", metavar="STUDY")
        if name == "unpack":
            command.add_argument("--into", type=Path, default=RESULTS, help="default: %(default)s")
    given = parser.parse_args()
    try:
        if given.command == "build":
            made = build(given.archive, given.studies, given.manifest)
            print(f"wrote {given.archive}: {len(made['files'])} files, {made['archive']['bytes']} bytes")
            print(f"wrote {given.manifest}")
        elif given.command == "check":
            print(f"{given.archive} matches the manifest: {len(check(given.archive, given.manifest))} files")
        else:
            new = unpack(given.archive, given.into, given.manifest)
            print(f"wrote {len(new)} files below {given.into}")
    except ArchiveError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
