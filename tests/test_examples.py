import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
SAID = {
    "compare_plans.py": ["lossless: exact", "2048 kept, 512 written as the mean"],
    "grow_a_live_model.py": ["parameters, max |dlogit|"],
}


def test_every_example_is_expected_to_say_something():
    assert {path.name for path in EXAMPLES} == set(SAID)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(path, tmp_path):
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in SAID[path.name]), done.stdout
    if path.name == "grow_a_live_model.py":
        assert float(done.stdout.split()[-1]) < 1e-5
