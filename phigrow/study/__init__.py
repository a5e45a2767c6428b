"""Studies: several ways to start a model against training it from scratch, over seeds and budgets, from one YAML file.

>>> from phigrow.study import load_study, run_study
>>> run_study(load_study("tiny"))  # doctest: +SKIP
"""

from phigrow.study.definition import load_study
from phigrow.study.jobs import jobs_of
from phigrow.study.runner import run_study
from phigrow.study.settings import Arm, Source, Study, Sweep
from phigrow.study.staged import run_stages
from phigrow.study.stages import Staged, load_stages

__all__ = [
    "Arm", "Source", "Staged", "Study", "Sweep", "jobs_of", "load_stages", "load_study", "run_stages", "run_study",
]  # fmt: skip
