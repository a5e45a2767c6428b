import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from tiny_models import phi_config, phi_model

import phigrow
from phigrow.checkpoints import hub
from phigrow.checkpoints.hub_names import ALIASES
from phigrow.errors import GrowthError


def test_a_local_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "phi-1_5").mkdir()
    assert hub.locate("phi-1_5") == Path("phi-1_5")
    assert hub.display_name("phi-1_5") == "phi-1_5"
    with pytest.raises(GrowthError, match="--revision main was given with a local folder"):
        hub.locate("phi-1_5", "main")


def test_names_and_revisions_reach_the_hub_and_only_safe_files_are_asked_for(tmp_path, monkeypatch, save_model):
    """The hub library itself is stood in for: everything up to its call, and from the folder it gives, is real."""
    folder = save_model(phi_model(phi_config()))
    asked = []

    def snapshot_download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    out = phigrow.expand("phi-1_5", phi_config(48, 6), revision="abc")
    assert out == Path("phi-1_5-to-grown-wr")
    assert (out / "README.md").read_text().startswith("---\nbase_model: microsoft/phi-1_5\n")
    assert {repository for repository, *_ in asked} == {"microsoft/phi-1_5"}
    assert {revision for _, revision, _ in asked} == {"abc"}
    patterns = {pattern for *_, each in asked for pattern in each}
    assert "*.safetensors" in patterns
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in patterns)
    assert ALIASES == {"phi-1": "microsoft/phi-1", "phi-1_5": "microsoft/phi-1_5", "phi-2": "microsoft/phi-2"}


HUB = """
import http.server, os, re, sys, threading
CODES = {"gated": "GatedRepo", "unknown": "RepoNotFound", "revision": "RevisionNotFound"}
class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status, kind = re.search(r"/s([0-9]+)-([a-z]+)", self.path).groups()
        self.send_response(int(status))
        if kind in CODES:
            self.send_header("X-Error-Code", CODES[kind])
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_HEAD = do_GET
    def log_message(self, *words):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": sys.argv[1]}
from phigrow.checkpoints.hub import locate
from phigrow.corpus import load_documents
from phigrow.errors import GrowthError
for kind, repository in (word.split("=") for word in sys.argv[2:]):
    try:
        (locate if kind == "model" else load_documents)(repository)
    except GrowthError as error:
        print(str(error).replace(chr(10), " "))
"""
"""Asks a hub of its own, which answers each repository s<status>-<kind> with this status."""

ANSWERS = {
    "model=a/s401-plain": ["no model 'a/s401-plain' for your account", "hf auth login", "HF_TOKEN"],
    "model=a/s401-unknown": ["no model 'a/s401-unknown' for your account", "check the spelling", "hf auth login"],
    "model=a/s403-gated": ["denies access to the model", "accept its terms on https://huggingface.co/a/s403-gated"],
    "model=a/s403-plain": ["denies access to the model", "hf auth login"],
    "model=a/s404-revision": ["the model 'a/s404-revision' has no revision"],
    "model=a/s429-plain": ["the hub refuses more requests for now (429)", "wait some minutes"],
    "model=a/s503-plain": ["the hub has an error of its own (503)", "in some minutes"],
    "model=a/s418-plain": ["the hub refuses the model 'a/s418-plain' (418)", "on another machine"],
    "dataset=a/s401-unknown": ["no dataset 'a/s401-unknown' for your account", "hf auth login"],
    "dataset=a/s403-gated": ["denies access to the dataset", "on https://huggingface.co/datasets/a/s403-gated"],
    "dataset=a/s403-plain": ["denies access to the dataset", "HF_TOKEN"],
}


def test_each_answer_of_the_hub_has_its_advice_for_models_and_datasets(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HUB, str(tmp_path), *ANSWERS], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(ANSWERS), done.stdout + done.stderr
    for line, (asked, words) in zip(lines, ANSWERS.items(), strict=True):
        assert [word for word in words if word not in line] == [], (asked, line)
        assert "no connection" not in line


class ConnectError(Exception):
    pass


class LocalEntryNotFoundError(Exception):
    pass


@pytest.mark.parametrize(
    ("cause", "offline", "words"),
    [
        (ConnectError("[Errno 111] Connection refused"), "0", ["there is no connection", "check the network"]),
        (ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED]"), "0", ["CERTIFICATE_VERIFY_FAILED", "SSL_CERT_FILE"]),
        (ConnectError("offline"), "1", ["is not in the local cache", "unset HF_HUB_OFFLINE"]),
    ],
)
def test_a_hub_without_an_answer_is_told_from_one_that_refuses(monkeypatch, cause, offline, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    error = LocalEntryNotFoundError("cannot find the snapshot")
    error.__cause__ = cause
    described = str(hub.hub_error(error, "a/b", "model", "give a folder"))
    assert [word for word in [*words, "give a folder"] if word not in described] == []
    assert hub.hub_error(ValueError("Unknown split"), "a/b", "dataset", "") is None  # negative control


def test_no_network_says_what_to_do(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(GrowthError, match="the hub cannot be reached for the model 'microsoft/phi-2'") as caught:
        hub.locate("phi-2")
    assert "download the repository on another machine and give its folder" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["phi.Q4_K_M.gguf", "README.md"], r"no config.json\n  where: some/model\n  why: it is a GGUF file"),
        (["adapter_config.json", "adapter_model.safetensors"], r"no config.json\n.*\n  why: it is an adapter"),
        (["config.json", "phi.gguf"], r"no \*\.safetensors\n.*\n  why: it is a GGUF file"),
        (
            ["config.json", "pytorch_model.bin"],
            r"only pickled weights\n[\s\S]*hf download some/model --local-dir model$",
        ),
        (["config.json", "flax_model.msgpack"], r"no \*\.safetensors\n.*\n  why: it is a checkpoint of Flax"),
        (["notes.txt"], "the folder has no config.json"),
        (None, "the folder has no config.json"),
    ],
)
def test_a_repository_of_another_kind_is_named(tmp_path, monkeypatch, names, message):
    import json

    def list_repo_files(repository, *, revision):
        assert (repository, revision) == ("some/model", None)
        if names is None:
            raise ConnectionError("no network any more")
        return names

    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    if names and "config.json" in names:
        (snapshot / "config.json").write_text(json.dumps(phi_config()))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GrowthError, match=message):
        phigrow.expand("some/model", phi_config(48, 6))
    assert not (tmp_path / "model-to-grown-wr").exists()
