"""Model cards: what the source's card says of the new model too, and the hub ids of base models alone."""

import pytest
import yaml

from phigrow.checkpoints.model_card import model_card
from phigrow.checkpoints.origin import Origin, origin_of

CARD = """---
license: mit
license_link: https://example.org/LICENSE
language:
- en
- code
datasets: a/b
base_model: owner/parent
model-index: []
widget:
- text: hello
---

# The source
"""


def metadata(card: str) -> dict:
    _, data, _ = card.split("---\n")
    return yaml.safe_load(data)


def test_a_card_is_metadata_and_a_text():
    card = model_card("# Title\n", repository="owner/a", tags=["one", "two"])
    assert metadata(card) == {
        "base_model": "owner/a",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["one", "two"],
    }
    assert card.split("---\n")[2] == "\n# Title\n"
    assert "base_model" not in metadata(model_card("text"))


def test_the_licence_of_the_source_is_kept(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    kept = {
        "license": "mit",
        "license_link": "https://example.org/LICENSE",
        "language": ["en", "code"],
        "datasets": "a/b",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["t"],
    }
    assert metadata(model_card("", source=tmp_path, tags=["t"])) == kept | {"base_model": "owner/parent"}
    assert metadata(model_card("", source=tmp_path, repository="o/c", tags=["t"])) == kept | {"base_model": "o/c"}


@pytest.mark.parametrize("base", ["src", "/home/me/src", "a/b/c", "x/..", "7", "[src, 1]", "{a: b}", "''"])
def test_only_hub_ids_are_base_models(base, tmp_path):
    (tmp_path / "README.md").write_text(f"---\nbase_model: {base}\nlicense: mit\n---\n")
    assert "base_model" not in metadata(model_card("", source=tmp_path))
    (tmp_path / "README.md").write_text("---\nbase_model: [src, o/a, o/b]\n---\n")
    assert metadata(model_card("", source=tmp_path))["base_model"] == ["o/a", "o/b"]


@pytest.mark.parametrize(
    "content", [b"no metadata", b"---\n[1]\n---\n", b"---\na: [\n---\n", b"\xff\xfe", b"---\nlicense: {a: 1}\n---\n"]
)
def test_a_card_that_cannot_be_read_gives_nothing(content, tmp_path):
    (tmp_path / "README.md").write_bytes(content)
    assert set(metadata(model_card("", source=tmp_path))) == {"library_name", "pipeline_tag", "tags"}


def test_a_card_outside_of_the_folder_is_not_read(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (tmp_path / "other.md").write_text(CARD)
    (folder / "README.md").symlink_to(tmp_path / "other.md")
    assert "license" not in metadata(model_card("", source=folder))
    (folder / "README.md").unlink()
    (tmp_path / "other.md").rename(folder / "README.md")
    assert metadata(model_card("", source=folder))["license"] == "mit"


def test_the_origin_is_the_repository_and_commit_where_they_are_known(tmp_path, monkeypatch):
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "models--microsoft--phi-1_5" / "snapshots" / commit
    local = tmp_path / "phi-1_5"
    for folder in (snapshot, local, tmp_path / "models--a--b" / "snapshots" / "main"):
        folder.mkdir(parents=True)
    known = Origin("microsoft/phi-1_5", "microsoft/phi-1_5", commit)
    monkeypatch.chdir(tmp_path / "models--a--b")
    assert origin_of("phi-1_5", snapshot) == known
    assert origin_of("microsoft/phi-1_5", snapshot) == known
    assert origin_of(snapshot, snapshot) == known
    assert origin_of(str(local), local) == Origin("phi-1_5")
    assert origin_of("phi-1_5", local) == Origin("microsoft/phi-1_5", "microsoft/phi-1_5")
    assert origin_of(
        tmp_path / "models--a--b" / "snapshots" / "main", tmp_path / "models--a--b" / "snapshots" / "main"
    ) == Origin("main")
