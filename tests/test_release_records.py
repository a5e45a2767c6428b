"""The archive of records that a release carries: built, checked and unpacked, and what is refused."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def loaded(name):
    spec = spec_from_file_location(f"{name}_benchmark", BENCHMARKS / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


release_records = loaded("release_records")
ArchiveError, build, check, unpack = (getattr(release_records, n) for n in ("ArchiveError", "build", "check", "unpack"))

CONTENTS = {
    "study-a/records/scratch/seed0/600/records.jsonl.gz": b"a",
    "study-a/records/wr/seed0/600/records.jsonl.gz": b"bb",
    "study-b/records/source/records.jsonl.gz": b"",
}


def put(folder, contents):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def below(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def made(tmp_path):
    """Two studies, built into an archive and a manifest."""
    put(tmp_path / "studies", {**CONTENTS, "study-a/study.yaml": b"seeds: [0]", "study-a/report/report.md": b"x"})
    archive, manifest = tmp_path / "records.tar", tmp_path / "manifest.json"
    build(archive, [tmp_path / "studies/study-b", tmp_path / "studies/study-a"], manifest)
    return archive, manifest


def test_an_archive_holds_the_records_alone_and_comes_back_as_it_was(made, tmp_path):
    archive, manifest = made
    assert check(archive, manifest) == CONTENTS
    written = unpack(archive, tmp_path / "out", manifest)
    assert below(tmp_path / "out") == CONTENTS
    assert len(written) == len(CONTENTS)
    assert unpack(archive, tmp_path / "out", manifest) == []


def test_the_same_records_give_the_same_bytes_whenever_and_wherever_they_lie(made, tmp_path):
    put(tmp_path / "elsewhere", dict(reversed(CONTENTS.items())))
    for path in (tmp_path / "elsewhere").rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    again, manifest = tmp_path / "again" / "records.tar", tmp_path / "again" / "manifest.json"
    build(again, sorted((tmp_path / "elsewhere").iterdir()), manifest)
    assert (again.read_bytes(), manifest.read_bytes()) == (made[0].read_bytes(), made[1].read_bytes())


def test_the_manifest_has_size_and_hash_of_the_archive_and_of_each_file(made):
    archive, manifest = made
    described = json.loads(manifest.read_text())
    content = archive.read_bytes()
    assert described["archive"] == {
        "name": "records.tar",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert described["files"] == [
        {"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(CONTENTS.items())
    ]


@pytest.mark.parametrize("place", [0, 600, 2100, -1])
def test_one_altered_byte_is_refused_wherever_it_is(made, tmp_path, place):
    archive, manifest = made
    content = bytearray(archive.read_bytes())
    content[place] ^= 1
    archive.write_bytes(content)
    with pytest.raises(ArchiveError, match=r"records\.tar was altered: its SHA-256 is .* Download it again"):
        unpack(archive, tmp_path / "out", manifest)
    assert not (tmp_path / "out").exists()


def test_an_archive_that_is_cut_off_or_absent_is_refused(made, tmp_path):
    archive, manifest = made
    size = archive.stat().st_size
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(ArchiveError, match=rf"has {size - 1} bytes, and records\.tar has {size}\. Download it again"):
        check(archive, manifest)
    with pytest.raises(ArchiveError, match=r"none\.tar cannot be read: No such file"):
        check(tmp_path / "none.tar", manifest)


def forged(made, members):
    """Replace the archive by one of ``members`` and let the manifest have its size and hash, as a forger would."""
    archive, manifest = made
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content
                tar.addfile(member)
    archive.write_bytes(packed.getvalue())
    described = json.loads(manifest.read_text())
    described["archive"] |= {
        "bytes": len(packed.getvalue()),
        "sha256": hashlib.sha256(packed.getvalue()).hexdigest(),
    }
    manifest.write_text(json.dumps(described))
    return archive, manifest


FIRST = next(iter(CONTENTS))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {**CONTENTS, "study-a/records/extra.jsonl.gz": b"x"},
            "has study-a/records/extra.jsonl.gz, which the manifest",
        ),
        ({**CONTENTS, "../escaped": b"x"}, "which leads out of the folder"),
        ({**CONTENTS, "study-a/../../escaped": b"x"}, "which leads out of the folder"),
        ({**CONTENTS, "/tmp/escaped": b"x"}, "which leads out of the folder"),
        ({**CONTENTS, "..\\escaped": b"x"}, "which leads out of the folder"),
        ({**CONTENTS, "C:escaped": b"x"}, "which leads out of the folder"),
        ({**CONTENTS, FIRST: b"z"}, f"has another {FIRST} than the manifest lists"),
        ({**CONTENTS, FIRST: b"aa"}, f"has another {FIRST} than the manifest lists"),
        ({**CONTENTS, FIRST: (tarfile.SYMTYPE, "/etc/passwd")}, "as a link or a device"),
        ({**CONTENTS, FIRST: (tarfile.LNKTYPE, "study-b")}, "as a link or a device"),
        ({**CONTENTS, FIRST: (tarfile.FIFOTYPE, "")}, "as a link or a device"),
        ({name: content for name, content in CONTENTS.items() if name != FIRST}, f"lacks 1 listed files, {FIRST}"),
        ([*CONTENTS.items(), (FIRST, b"a")], f"has {FIRST}, twice"),
    ],
)
def test_an_archive_of_other_files_is_refused_even_with_a_manifest_of_its_hash(made, tmp_path, members, message):
    archive, manifest = forged(made, members.items() if isinstance(members, dict) else members)
    with pytest.raises(ArchiveError) as refused:
        unpack(archive, tmp_path / "out", manifest)
    assert message in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_forged_archive_of_the_listed_files_is_taken(made, tmp_path):
    """A control: the forger's archive is refused for what is wrong with it, and not because it was forged."""
    archive, manifest = forged(made, CONTENTS.items())
    unpack(archive, tmp_path / "out", manifest)
    assert below(tmp_path / "out") == CONTENTS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"][0].update(path="../escaped"), "lists '../escaped', which leads out of the folder"),
        (lambda m: m["files"][0].update(path="/escaped"), "lists '/escaped', which leads out of the folder"),
        (lambda m: m["files"].append(m["files"][0]), "twice"),
        (lambda m: m["files"][0].pop("sha256"), "without a name, a size or a SHA-256"),
        (lambda m: m["files"][0].update(bytes="1"), "without a name, a size or a SHA-256"),
        (lambda m: m["files"].clear(), "without a name, a size or a SHA-256"),
        (lambda m: m.update(format=2), "is not a manifest of format 1"),
    ],
)
def test_a_manifest_that_is_broken_or_leads_out_of_the_folder_is_refused(made, tmp_path, change, message):
    archive, manifest = made
    described = json.loads(manifest.read_text())
    change(described)
    manifest.write_text(json.dumps(described))
    with pytest.raises(ArchiveError) as refused:
        unpack(archive, tmp_path / "out", manifest)
    assert message in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_no_file_of_the_reader_is_replaced_and_nothing_is_written_then(made, tmp_path):
    archive, manifest = made
    last = max(CONTENTS)
    put(tmp_path / "out", {last: b"mine"})
    with pytest.raises(ArchiveError, match=r"exists and differs .* Move it away, then unpack again"):
        unpack(archive, tmp_path / "out", manifest)
    assert below(tmp_path / "out") == {last: b"mine"}


def test_a_link_in_the_folder_does_not_lead_out_of_it(made, tmp_path):
    archive, manifest = made
    (tmp_path / "out").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "out" / "study-b").symlink_to(tmp_path / "outside")
    with pytest.raises(ArchiveError, match=r"is behind a link that leads out of .* Remove the link"):
        unpack(archive, tmp_path / "out", manifest)
    assert below(tmp_path / "outside") == {}


def test_studies_that_cannot_be_packed_are_refused_and_leave_no_archive(tmp_path):
    put(tmp_path, {"study/records/a/records.jsonl.gz": b"a", "copy/study/records/a/records.jsonl.gz": b"a"})
    (tmp_path / "empty" / "records").mkdir(parents=True)
    (tmp_path / "linked" / "records").mkdir(parents=True)
    (tmp_path / "linked" / "records" / "a").symlink_to(tmp_path / "study")
    for studies, message in (
        (["none"], "has no folder records/"),
        (["empty"], "There are no records to pack"),
        (["study", "copy/study"], "Two of the studies hold study/records/a"),
        (["linked"], "is not an ordinary file"),
    ):
        with pytest.raises(ArchiveError, match=message):
            build(tmp_path / "out.tar", [tmp_path / name for name in studies], tmp_path / "out.json")
    assert not list(tmp_path.glob("out.*"))


def test_the_command_prints_one_line_for_what_it_did_or_refuses(made, tmp_path):
    def run(*words):
        command = [sys.executable, str(BENCHMARKS / "release_records.py"), "--manifest", str(made[1]), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("check", made[0]).stdout == f"{made[0]} matches the manifest: 3 files\n"
    assert run("unpack", made[0], "--into", tmp_path / "out").stdout == f"wrote 3 files below {tmp_path / 'out'}\n"
    shutil.copy(made[1], made[0])
    refused = run("check", made[0])
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"error: {made[0]} has ")
    assert len(refused.stderr.splitlines()) == 1


def test_the_committed_manifest_is_of_the_studies_whose_records_are_not_in_the_repository():
    described = release_records.read_manifest(release_records.MANIFEST)
    studies = {each["path"].split("/")[0] for each in described["files"]}
    there = {folder.name for folder in release_records.RESULTS.glob("*-study-*")}
    assert there - studies == {"2026-11-21-study-phi-2-2xAMD-EPYC", "2026-11-27-study-phi-regime-s-2xAMD-EPYC"}
    assert studies <= there
    assert all((release_records.RESULTS / name / "study.yaml").is_file() for name in there)
    assert described["archive"]["name"] in (release_records.RESULTS / "README.md").read_text()
