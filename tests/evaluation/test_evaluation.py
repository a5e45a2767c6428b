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
from phigrow.evaluation import SHIPPED, evaluate
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


def test_the_export_of_a_run_is_evaluated_and_its_results_are_in_the_run(workplace):
    shutil.copytree("source", "runs/wr/export")
    Path("runs/wr/export/training.json").write_text(json.dumps({"arm": "wr", "seed": 1, "steps": 40}))
    Path("runs/wr/records.jsonl").write_text(json.dumps({"type": "run", "arm": "wr", "seed": 1, "config": {}}) + "\n")
    for given in ("runs/wr", "runs/wr/export"):
        (result,) = evaluate([given], tasks=["phigrow_code"], limit=1)
    assert [str(path) for path in Path("runs").rglob("phigrow_*.json")] == [
        "runs/wr/evaluations/wr-export/phigrow_code.json"
    ]
    assert {key: result.checkpoint[key] for key in ("arm", "seed", "step")} == {"arm": "wr", "seed": 1, "step": 40}
    shutil.rmtree("runs/wr/export")
    with pytest.raises(GrowthError, match="the run has no export to evaluate"):
        evaluate(["runs/wr"])


def _no_tokenizer():
    Path("grown/tokenizer.json").unlink()


def _other_results():
    assert run("source", "--limit", "1", "--out", "results", "--tasks", "phigrow_code").exit_code == 0
    Path("more").mkdir()
    shutil.move("source", "more/source")


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
