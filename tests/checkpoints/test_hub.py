from pathlib import Path

import huggingface_hub
import pytest
from tiny_models import phi_config, phi_model

import phigrow
from phigrow.checkpoints import hub
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
    assert hub.ALIASES == {"phi-1": "microsoft/phi-1", "phi-1_5": "microsoft/phi-1_5", "phi-2": "microsoft/phi-2"}


def test_a_repository_that_is_refused_is_said_so(monkeypatch):
    from types import SimpleNamespace

    from huggingface_hub.errors import RepositoryNotFoundError

    def refuse(*_, **__):
        raise RepositoryNotFoundError(
            "401 Client Error: nothing there", response=SimpleNamespace(headers={}, request=None)
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(GrowthError, match=r"the hub refuses 'some/model'\n.*\n  why: 401 Client Error"):
        hub.locate("some/model")


def test_no_network_says_what_to_do(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(GrowthError, match="the hub cannot be reached for 'microsoft/phi-2'") as caught:
        hub.locate("phi-2")
    assert "download the repository on another machine and give its folder" in str(caught.value)
