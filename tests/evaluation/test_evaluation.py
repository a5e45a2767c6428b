"""Shipped tasks, their scoring against a formula written a second time, and the command evaluate."""

import json
import math
import shlex
import shutil
from pathlib import Path

import pytest
import task_files
import torch
from tiny_models import phi_config, phi_model
from typer.testing import CliRunner

from phigrow.cli import app
from phigrow.corpus.tokenizer import save_tokenizer, train_tokenizer
from phigrow.errors import GrowthError
from phigrow.evaluation import SHIPPED, evaluate, scoring
from phigrow.evaluation.scoring import encode_pair, load, logprobs
from phigrow.evaluation.shipped_tasks import Document, documents_of, metrics_of
from phigrow.measure.evaluation_tables import evaluation_rows
from phigrow.records.evaluations import difference, read_evaluations

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
REQUESTS = [("2 + 2 =", " 4\n"), ("The answer is ", "no."), ("One", " and two, three and four.\n"), ("", "word")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with two tiny models of one tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["a textbook of Python"], 260)
    for seed, name in enumerate(("source", "grown")):
        config = phi_config(16, 2, 24, 1, 4, 260 + 2 * seed, max_position_embeddings=64)
        phi_model(config, torch.float32, seed).save_pretrained(root / name)
        save_tokenizer(tokenizer, root / name)
    return root


@pytest.fixture
def workplace(models, tmp_path, monkeypatch):
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["evaluate", *words])


def test_the_shipped_files_are_those_that_the_script_makes():
    for name, text in task_files.contents().items():
        assert (task_files.FOLDER / name).read_text(encoding="utf-8") == text, name
    assert {f"phigrow_{name}" for name in task_files.MAKERS} == set(SHIPPED)


@pytest.mark.parametrize("task", SHIPPED)
def test_documents_have_different_prompts_and_choices_and_a_right_one(task):
    documents = documents_of(task)
    assert len({document.prompt for document in documents}) == len(documents) > 50
    for document in documents:
        assert len(set(document.choices)) == len(document.choices)
        assert 0 <= document.answer < len(document.choices)
    places = [document.answer for document in documents]
    most = len(documents[0].choices)
    assert max(places.count(place) for place in range(most)) <= len(documents) * max(1 / most + 0.12, most == 1)


def test_the_arithmetic_is_right():
    for document in documents_of("phigrow_arithmetic"):
        assert eval(document.prompt.removesuffix("=")) == int(document.choices[document.answer])


def test_log_probabilities_are_those_of_the_formula(models):
    loaded = load(models / "source", "float64", "cpu")
    found = logprobs(loaded, REQUESTS, batch_size=3)
    for (prompt, text), value in zip(REQUESTS, found, strict=True):
        before, after = encode_pair(loaded.tokenizer, prompt, text)
        with torch.no_grad():
            chances = loaded.model(torch.tensor([[*before, *after]])).logits[0].softmax(-1)
        wanted = sum(math.log(chances[len(before) + n - 1, token]) for n, token in enumerate(after))
        assert value == pytest.approx(wanted, abs=1e-9)
        assert value != pytest.approx(wanted + 1e-3, abs=1e-9)  # negative control
    assert encode_pair(loaded.tokenizer, "is ", "no")[1] == loaded.tokenizer(" no")["input_ids"]


class Merging:
    """A tokenizer of characters, which makes one token of "ab" and of "c d"."""

    bos_token_id, eos_token_id = None, 7

    def __call__(self, text, add_special_tokens=False):
        for pair, token in (("ab", "1"), ("c d", "2")):
            text = text.replace(pair, token)
        return {"input_ids": [ord(each) for each in text]}


def test_a_continuation_that_merges_into_the_prompt_is_scored():
    ids = {name: [ord(each) for each in name] for name in ("x", "1", "y", "2")}
    assert encode_pair(Merging(), "xa", "b") == (ids["x"], ids["1"])  # both have two tokens: x a, x ab
    assert encode_pair(Merging(), "a", "b") == ([7], ids["1"])
    assert encode_pair(Merging(), "xc ", "d") == (ids["x"], ids["2"])
    assert encode_pair(Merging(), "x", "y") == (ids["x"], ids["y"])  # nothing merges
    for prompt, text in (("x", ""), ("", "")):
        with pytest.raises(GrowthError, match="a continuation has no tokens"):
            encode_pair(Merging(), prompt, text)


class NoFloat64(torch.nn.Module):
    """A model whose device refuses its dtype, as mps refuses float64."""

    def to(self, device):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")


def test_a_device_without_the_dtype_or_without_a_name_gives_an_error(models, monkeypatch):
    monkeypatch.setattr(scoring, "transformers_model", lambda *_: NoFloat64())
    with pytest.raises(GrowthError, match="cannot be moved to the device 'cpu'") as caught:
        load(models / "source", "float64", "cpu")
    assert "float64" in caught.value.why
    assert scoring.device_type("cuda:1") == "cuda"
    with pytest.raises(GrowthError, match="there is no device 'gpu9'"):
        scoring.device_type("gpu9")


def test_a_text_longer_than_the_context_is_scored_token_by_token(models):
    loaded = load(models / "source", "float64", "cpu")
    text = "".join(chr(97 + n * n % 26) for n in range(150))
    before, after = encode_pair(loaded.tokenizer, "a b c", text)
    assert len(after) == 150 > 2 * loaded.context
    tokens, wanted = [*before, *after], 0.0
    for start in range(len(before), len(tokens), 64):
        stop = min(start + 64, len(tokens))
        window = tokens[max(0, stop - 65) : stop]
        with torch.no_grad():
            logs = loaded.model(torch.tensor([window[:-1]])).logits[0].log_softmax(-1)
        scored = logs[len(logs) - (stop - start) :]
        wanted += sum(float(row[token]) for row, token in zip(scored, tokens[start:stop], strict=True))
    assert logprobs(loaded, [("a b c", text)])[0] == pytest.approx(wanted, abs=1e-9)


def test_metrics_of_known_log_probabilities():
    documents = [Document("p", (" a", " bcd"), 0), Document("q", (" a", " b"), 1)]
    metrics = metrics_of(documents, [[-2.0, -3.0], [-1.0, -2.0]])
    assert metrics["acc"].per_document == (1.0, 0.0)
    assert metrics["acc_norm"].per_document == (0.0, 0.0)  # -3 over four bytes is more than -2 over two
    assert metrics["bits_per_byte"].per_document == pytest.approx((1 / math.log(2), 1 / math.log(2)))
    assert metrics["acc"].value == 0.5
    assert metrics["acc"].stderr == 0.5
    with pytest.raises(GrowthError, match="not finite"):
        metrics_of(documents[:1], [[math.nan, 0.0]])


def test_two_checkpoints_are_evaluated_and_compared_in_pairs(workplace):
    results = evaluate(["source", "grown"], tasks=["phigrow_cloze"], limit=6)
    source, grown = results
    pairs = zip(grown.metrics["bits_per_byte"].per_document, source.metrics["bits_per_byte"].per_document, strict=True)
    gaps = torch.tensor([a - b for a, b in pairs], dtype=torch.float64)
    found = difference(grown, source, "bits_per_byte")
    assert found.value == pytest.approx(float(gaps.mean()), abs=1e-12)
    assert found.stderr == pytest.approx(float(gaps.std() / math.sqrt(6)), abs=1e-12)
    row = evaluation_rows(results)[-1]
    assert row["grown - source"] == f"{found.value:+.3f} ± {found.stderr:.3f}"
    # Other documents are not paired.
    (few,) = evaluate(["grown"], tasks=["phigrow_cloze"], limit=5, out="few")
    assert difference(few, source, "acc").stderr is None
    assert sorted(map(repr, read_evaluations(Path("evaluations")))) == sorted(map(repr, results))


def test_the_same_command_goes_on_and_other_weights_are_evaluated_again(workplace, monkeypatch):
    words = ("source", "--limit", "2", "--tasks", "phigrow_code,phigrow_cloze")
    first = run(*words)
    assert first.exit_code == 0, first.exception
    file = Path("evaluations/source/phigrow_cloze.json")
    code = Path("evaluations/source/phigrow_code.json")
    file.unlink()
    before = code.read_bytes()
    again = run(*words)
    assert "source, phigrow_code: kept" in again.output
    assert "source, phigrow_cloze: 2 documents" in again.output
    assert code.read_bytes() == before
    assert [line for line in first.output.splitlines() if line[:1] == "|"] == [
        line for line in again.output.splitlines() if line[:1] == "|"
    ]
    phi_model(phi_config(16, 2, 24, 1, 4, 260, max_position_embeddings=64), torch.float32, 5).save_pretrained("source")
    assert "kept" not in run(*words).output
    assert "A difference" not in first.output
    assert "A difference" in run("source", "grown", *words[1:]).output


def test_the_export_of_a_run_is_evaluated_and_its_results_are_in_the_run(workplace):
    shutil.copytree("source", "runs/wr/export")
    Path("runs/wr/export/training.json").write_text(json.dumps({"arm": "wr", "seed": 1, "steps": 40}))
    Path("runs/wr/records.jsonl").write_text(json.dumps({"type": "run", "arm": "wr", "seed": 1, "config": {}}) + "\n")
    for given in ("runs/wr", "runs/wr/export"):
        (result,) = evaluate([given], tasks=["phigrow_code"], limit=1)
    assert [str(path) for path in Path("runs").rglob("phigrow_*.json")] == [
        "runs/wr/evaluations/export/phigrow_code.json"
    ]
    assert {key: result.checkpoint[key] for key in ("arm", "seed", "step")} == {"arm": "wr", "seed": 1, "step": 40}
    # A run that moved keeps its results, under its new name.
    kept = Path("runs/wr/evaluations/export/phigrow_code.json")
    Path("later").mkdir()
    shutil.move("runs/wr", "later/wide")
    lines = []
    (moved,) = evaluate(["later/wide"], tasks=["phigrow_code"], limit=1, say=lines.append)
    assert lines == ["wide-export, phigrow_code: kept"]
    assert moved.checkpoint["folder"] == str(workplace / "later/wide/export")
    assert (moved.metrics, moved.name, result.name) == (result.metrics, "wide-export", "wr-export")
    assert read_evaluations(Path("later/wide/evaluations")) == [moved]
    assert not kept.exists()


@pytest.mark.parametrize(
    ("config", "message", "fix"),
    [
        ({"export": "export"}, "the run has no export to evaluate", "phigrow pretrain command"),
        ({"learning_rate": 1e-3}, "the run has no model to evaluate", "one of its checkpoints"),
    ],
)
def test_only_a_run_of_phigrow_pretrain_is_sent_back_to_it(workplace, config, message, fix):
    Path("run").mkdir()
    Path("run/records.jsonl").write_text(json.dumps({"type": "run", "arm": "wr", "seed": 1, "config": config}) + "\n")
    with pytest.raises(GrowthError, match=message) as caught:
        evaluate(["run"])
    assert fix in caught.value.fix
    assert ("pretrain" in caught.value.fix) == ("export" in config)


def test_a_run_folder_that_holds_a_model_is_evaluated_itself(workplace):
    shutil.copytree("grown", "source/checkpoint-5")
    Path("source/records.jsonl").write_text(json.dumps({"type": "run", "arm": "a", "seed": 1, "config": {}}) + "\n")
    last, earlier = evaluate(["source", "source/checkpoint-5"], tasks=["phigrow_code"], limit=2)
    assert (last.name, earlier.name) == ("source", "source-checkpoint-5")
    assert last.checkpoint["fingerprint"] != earlier.checkpoint["fingerprint"]
    assert sorted(map(str, Path().rglob("phigrow_*.json"))) == [
        "source/evaluations/checkpoint-5/phigrow_code.json",
        "source/evaluations/phigrow_code.json",
    ]


def test_equal_names_get_the_names_of_the_parent_folders(workplace):
    shutil.copytree("source", "x/checkpoint-1000")
    shutil.copytree("grown", "y/checkpoint-1000")
    results = evaluate(["x/checkpoint-1000", "y/checkpoint-1000", "grown"], tasks=["phigrow_code"], limit=1)
    assert [each.name for each in results] == ["x-checkpoint-1000", "y-checkpoint-1000", "grown"]
    (alone,) = evaluate(["y/checkpoint-1000"], tasks=["phigrow_code"], limit=1)
    assert alone.name == "checkpoint-1000"


def test_a_model_on_the_hub_is_named_with_its_revision(workplace, monkeypatch):
    monkeypatch.setattr("phigrow.evaluation.run.locate", lambda name, revision=None: workplace / "source")
    names = [
        evaluate([name], tasks=["phigrow_code"], limit=1, revision=revision, out=f"out{n}")[0].name
        for n, (name, revision) in enumerate([("a/b", None), ("a/b", "v2"), ("a/b@v3", None)])
    ]
    assert names == ["a--b", "a--b@v2", "a--b@v3"]


def _change_the_tokenizer(monkeypatch):
    save_tokenizer(train_tokenizer(["quite another text, and no Python"], 260), Path("source"))


def _change_a_version(monkeypatch):
    known = {"phigrow": "1", "torch": "1.0", "transformers": "4"}
    monkeypatch.setattr("importlib.metadata.version", lambda name: known[name])


def _change_the_device(monkeypatch):
    monkeypatch.setattr(scoring, "device_type", lambda device: "cuda")


def _change_nothing(monkeypatch):
    pass


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (_change_the_tokenizer, False),
        (_change_a_version, False),
        (_change_the_device, False),
        (_change_nothing, True),
    ],
)
def test_a_result_is_computed_again_if_what_can_change_it_differs(workplace, monkeypatch, change, kept):
    lines = []
    for turn in range(2):
        if turn:
            change(monkeypatch)
        evaluate(["source"], tasks=["phigrow_code"], limit=1, device="cpu", say=lines.append)
    assert ("kept" in lines[1]) is kept, lines
    assert json.loads(Path("evaluations/source/phigrow_code.json").read_text())["settings"]["dtype"] == "float32"


def _no_tokenizer():
    Path("grown/tokenizer.json").unlink()


def _other_results():
    assert run("source", "--limit", "1", "--out", "results", "--tasks", "phigrow_code").exit_code == 0
    shutil.copytree("grown", "more/source")


@pytest.mark.parametrize(
    ("prepare", "words", "message", "fix"),
    [
        (None, ["source", "--tasks", "phigrow_clozes"], "there is no task 'phigrow_clozes'", "mean phigrow_cloze?"),
        (_no_tokenizer, ["source", "grown"], "without a tokenizer", "copy tokenizer.json"),
        (None, ["source", "nowhere/at/all"], "there is no checkpoint", "give a folder"),
        (None, ["source", "./source"], "two checkpoints have the name 'source'", "rename one"),
        (None, ["source", "--dtype", "int8"], "there is no dtype 'int8'", "choose one of float32"),
        (_other_results, ["more/source", "--out", "results"], "the results of another checkpoint", "another --out"),
    ],
)
def test_bad_input_gives_one_error_and_writes_nothing(workplace, prepare, words, message, fix):
    if prepare:
        prepare()
    before = sorted(map(str, Path().rglob("*")))
    done = run(*words)
    assert isinstance(done.exception, GrowthError), done.output
    assert message in done.exception.what
    assert fix in done.exception.fix
    assert sorted(map(str, Path().rglob("*"))) == before


def test_a_damaged_result_is_refused(workplace):
    run("source", "--limit", "1", "--tasks", "phigrow_code")
    Path("evaluations/source/phigrow_code.json").write_text('{"format": 1, "task": "phigrow_code"}')
    with pytest.raises(GrowthError, match="not a result of phigrow evaluate"):
        evaluate(["source"], tasks=["phigrow_code"], limit=1)


def test_the_commands_of_the_page_run(workplace):
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("phigrow evaluate ")]
    assert len(lines) >= 2
    for line in lines:
        words = shlex.split(line)[2:]
        done = run(*words, *([] if "--limit" in words else ["--limit", "2"]))
        assert done.exit_code == 0, (line, done.output, done.exception)
    assert "± " in done.output
