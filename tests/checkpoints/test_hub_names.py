"""Ways to name a repository: addresses and names with a revision are read, the rest is refused with what to give."""

import json

import pytest

from phigrow.checkpoints import hub
from phigrow.checkpoints.hub_names import HubName, hub_name
from phigrow.corpus import load_documents, load_tokenizer
from phigrow.errors import GrowthError
from phigrow.models.config import load_config

COMMIT = "b6a7e2fe15c21f5847279f23e280cc5a0e7049ef"

NAMES = {
    "phi-1_5": ("microsoft/phi-1_5", None),
    "phi-2@main": ("microsoft/phi-2", "main"),
    "gpt2": ("gpt2", None),
    f"microsoft/phi-1_5@{COMMIT}": ("microsoft/phi-1_5", COMMIT),
    "a/b@refs/pr/5": ("a/b", "refs/pr/5"),
    "https://huggingface.co/microsoft/phi-1_5": ("microsoft/phi-1_5", None),
    "https:/huggingface.co/microsoft/phi-1_5": ("microsoft/phi-1_5", None),  # as a Path spells it
    "http://www.huggingface.co/microsoft/phi-1_5/?library=transformers#use": ("microsoft/phi-1_5", None),
    "https://huggingface.co/microsoft/phi-1_5/tree/main": ("microsoft/phi-1_5", "main"),
    f"https://huggingface.co/microsoft/phi-1_5/commit/{COMMIT}": ("microsoft/phi-1_5", COMMIT),
    "https://huggingface.co/a/b/tree/refs%2Fpr%2F5": ("a/b", "refs/pr/5"),
    "https://huggingface.co/a/b/tree/refs/pr/5": ("a/b", "refs/pr/5"),
    "https://hf.co/gpt2": ("gpt2", None),
    "huggingface.co/a/b/tree/v1.0": ("a/b", "v1.0"),
    "https://huggingface.co/a/b.git": ("a/b", None),
    "git@hf.co:a/b.git": ("a/b", None),
    "hf://a/b": ("a/b", None),
    "hf:/a/b@v1": ("a/b", "v1"),
    "hf://models/a/b@refs/pr/5": ("a/b", "refs/pr/5"),
    "not a name": ("not a name", None),  # which the hub's library refuses
    "./runs/x@y/z": ("./runs/x@y/z", None),
}


@pytest.mark.parametrize("text", NAMES)
def test_names_and_addresses_give_a_repository_and_a_revision(text):
    assert hub_name(text) == HubName(*NAMES[text])
    assert hub.display_name(text) == NAMES[text][0]
    if NAMES[text][1] is None:
        assert hub_name(text, "v2").revision == "v2"


REFUSED = {
    "https://huggingface.co/a/b/blob/main/config.json": "a file in a repository.*give a/b@main for the whole",
    "https://huggingface.co/a/b/resolve/v1/model.safetensors?download=true": "a file in .*give a/b@v1 for",
    "https://huggingface.co/a/b/tree/main/sub/x": r"a folder in .*give b/sub/x: hf download a/b --include 'sub/x/\*' "
    "--local-dir b --revision main",
    "hf://a/b@v1/sub": "a folder in .*--revision v1",
    "https://huggingface.co/datasets/a/b": "the address of a dataset.*a model is needed",
    "hf://datasets/a/b/data": "the address of a dataset",
    "https://huggingface.co/spaces/a/b": "the address of a Space",
    "https://huggingface.co/": "address",
    "https://modelscope.cn/models/a/b": "another place.*download it, and give the folder",
    "s3://bucket/phi": "another place",
    "file:///models/phi": "give /models/phi",
}


@pytest.mark.parametrize("text", REFUSED)
def test_other_addresses_are_refused_with_what_to_give(text):
    for read in (hub.locate, hub.source_config):
        with pytest.raises(GrowthError, match=f"(?s){REFUSED[text]}") as caught:
            read(text)
        assert "no folder has this path" not in str(caught.value)


def test_two_revisions_must_agree():
    assert hub_name("a/b@v1", "v1") == HubName("a/b", "v1")
    with pytest.raises(GrowthError, match="two revisions are given: v1 and v2"):
        hub_name("a/b@v1", "v2")


def test_a_local_folder_of_such_a_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "phi-2@main").mkdir()
    assert hub.locate("phi-2@main").samefile(tmp_path / "phi-2@main")


def test_data_sets_and_tokenizers_are_named_in_the_same_ways(monkeypatch):
    asked = []

    def load_dataset(path, **settings):
        asked.append((path, settings["revision"]))
        raise ValueError("enough")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    names = ("https://huggingface.co/datasets/a/b/tree/v1?row=3", "a/b@v1", "hf://datasets/a/b@v1")
    for name in (*names, "https://huggingface.co/datasets/a/b"):
        with pytest.raises(GrowthError, match="the dataset 'a/b' cannot be loaded"):
            load_documents(name)
    assert asked == [("a/b", "v1")] * 3 + [("a/b", None)]
    with pytest.raises(GrowthError, match=r"(?s)a file in a repository.*hf download a/b --include x.parquet"):
        load_documents("https://huggingface.co/datasets/a/b/resolve/main/x.parquet")
    with pytest.raises(GrowthError, match="the address of a model"):
        load_documents("https://huggingface.co/a/b")

    downloads = []

    def snapshot_download(repository, *, revision, allow_patterns):
        downloads.append((repository, revision))
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for name in ("https://huggingface.co/microsoft/phi-2/tree/v1", "phi-2@v1"):
        with pytest.raises(OSError, match="offline"):
            load_tokenizer(name)
    assert downloads == [("microsoft/phi-2", "v1")] * 2


def test_a_run_says_how_to_start_from_a_model_on_the_hub():
    from phigrow.training import RunConfig
    from phigrow.training.model import model_config

    for init in ("a/b@v1", "https://huggingface.co/a/b/tree/v1"):
        with pytest.raises(GrowthError, match=r"hf download a/b --revision v1 --local-dir b`, and set init to b"):
            model_config(RunConfig(init=init), data_vocab=8, seq_len=8)
    with pytest.raises(GrowthError, match="there is no checkpoint to start from") as caught:
        model_config(RunConfig(init="./runs/x"), data_vocab=8, seq_len=8)
    assert "hf download" not in str(caught.value)


def test_a_destination_is_named_as_a_source_is(tmp_path):
    published = load_config("phi2.json")
    for name in ("phi-2", "microsoft/phi-2", "phi2"):
        assert load_config(name) == published
    assert load_config("phi-2") != load_config("microsoft/phi-1_5")  # negative control
    for name in ("a/b", "https://huggingface.co/a/b/tree/main", "hf://a/b"):
        with pytest.raises(GrowthError, match=r"run `hf download a/b config\.json --local-dir b`, and give b"):
            load_config(name)
    for path in ("./a/b", "a/b.json", "b"):
        with pytest.raises(GrowthError, match="there is no configuration") as caught:
            load_config(path)
        assert "hf download" not in str(caught.value)
    (tmp_path / "marked.json").write_text(json.dumps(published), encoding="utf-8-sig")  # as some editors write it
    assert (tmp_path / "marked.json").read_bytes().startswith(b"\xef\xbb\xbf")
    assert load_config(tmp_path / "marked.json") == published


@pytest.fixture
def cached(tmp_path, monkeypatch, save_model):
    """A folder of the hub's cache, which the library returns without a network."""
    from tiny_models import phi_config, phi_model

    folder = tmp_path / "hub" / "models--a--b" / "snapshots" / COMMIT
    folder.parent.mkdir(parents=True)
    save_model(phi_model(phi_config())).rename(folder)

    def list_repo_files(repository, *, revision):
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *words, **settings: str(folder))
    monkeypatch.setattr("huggingface_hub.list_repo_files", list_repo_files)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def test_a_cache_without_some_files_is_named_as_such(cached, save_model):
    import phigrow

    def refused(source, name):
        with pytest.raises(GrowthError, match=f"the local cache has a/b without {name}") as caught:
            phigrow.expand(source, "phi-1.json", cached.parent / "out")
        fix = caught.value.fix
        assert f"env -u HF_HUB_OFFLINE hf download a/b --revision {COMMIT} --cache-dir {cached.parents[2]}" in fix
        assert "HF_HUB_OFFLINE is set" in caught.value.why

    weights = cached / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    refused("a/b", r"\*.safetensors")
    refused(cached, "model.safetensors")  # the folder itself
    weights.symlink_to("../../blobs/0123.incomplete")
    refused("a/b", "model.safetensors")
    weights.unlink()
    shards = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    (cached / "model.safetensors.index.json").write_text(shards)
    (cached / "model-00001-of-00002.safetensors").write_bytes(content)
    refused("a/b", "model-00002-of-00002.safetensors")
    (cached / "config.json").unlink()
    refused("a/b", "config.json")
    refused(cached, "config.json")
    local = cached.rename(cached.parents[3] / "local")
    with pytest.raises(GrowthError, match=r"the folder has no config\.json"):  # negative control
        phigrow.expand(local, "phi-1.json", local.parent / "out")
