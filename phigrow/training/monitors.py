"""TensorBoard, Weights & Biases, Comet and CSV through DeepSpeed's monitors, beside the records of a run.

DeepSpeed's engine would write its own values against samples. phigrow writes the loss, learning rate, gradient norm,
tokens per second and held-out losses against tokens, because runs are compared by tokens.
"""

from __future__ import annotations

import csv
import importlib.util
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.errors import GrowthError

if TYPE_CHECKING:
    from phigrow.training.configuration import RunConfig

SECTIONS = {"csv": "csv_monitor", "tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet"}
"""Name in a recipe -> section of DeepSpeed's configuration."""

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}


def monitor_sections(config: RunConfig, out: Path) -> dict[str, dict[str, Any]]:
    """Return DeepSpeed's sections of the monitors that the recipe names or its DeepSpeed file enables.

    Args:
        config: the run; its ``monitor`` names monitors, separated by commas.
        out: the folder of the run, in which monitors write their files unless their section names another.

    Raises:
        GrowthError: a name is unknown, or the package of a monitor is not installed.
    """
    asked = [name.strip() for name in (config.monitor or "").split(",") if name.strip()]
    file, sections = config.deepspeed_file(), {}
    for name in asked:
        if name not in SECTIONS:
            raise GrowthError(
                f"there is no monitor {name!r}", where="monitor", fix=f"choose some of {', '.join(SECTIONS)}"
            )
    for name, section in SECTIONS.items():
        given = file.get(section, {})
        if name not in asked and given.get("enabled") is not True:
            continue
        package = _PACKAGES.get(name)
        if package is not None and not _is_installed(package):
            raise GrowthError(
                f"the monitor {name} requires the package {package}, which is not installed",
                where="monitor" if name in asked else f"{section} in {config.deepspeed}",
                fix=f"run 'pip install {package}', or leave {name} out",
            )
        places = {"output_path": str(out), "job_name": name} if name in ("csv", "tensorboard") else {}
        sections[section] = places | ({"project": "phigrow"} if name == "wandb" else {}) | given | {"enabled": True}
    return sections


def _is_installed(package: str) -> bool:
    """Return True if a package can be imported; a folder of its name in the current folder is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


class Monitors:
    """Writer of a run's measurements to its monitors, on rank 0 only.

    A run that resumes continues its CSV files after removing the rows past its checkpoint, as it does with its records.
    """

    def __init__(self, sections: dict[str, dict[str, Any]], out: Path, *, tokens: int) -> None:
        self._master: Any = None
        if not sections:
            return
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        if "wandb" in sections:  # DeepSpeed's section has no key for the name of a run
            os.environ.setdefault("WANDB_NAME", out.name)
            os.environ.setdefault("WANDB_DIR", str(out))
        self._master = MonitorMaster(get_monitor_config(sections))
        if (files := self._master.csv_monitor) is not None:
            for path in sorted(Path(files.log_dir).glob("*.csv")):
                _cut(path, tokens)
                files.filenames.append(path.stem)  # DeepSpeed writes the heading of a file that it does not know

    def step(self, tokens: int, values: dict[str, float]) -> None:
        """Write the measurements of a step, against the tokens read so far."""
        self._write("train", tokens, values)

    def eval(self, tokens: int, loss: float, sources: dict[str, float]) -> None:
        """Write held-out losses, in all and of each source."""
        self._write("heldout", tokens, {"loss": loss} | sources)

    def _write(self, group: str, tokens: int, values: dict[str, float]) -> None:
        if self._master is not None:
            self._master.write_events([(f"{group}/{name}", value, tokens) for name, value in values.items()])

    def close(self) -> None:
        """Let the monitors finish their files."""
        if self._master is None:
            return
        if self._master.tb_monitor is not None:
            self._master.tb_monitor.summary_writer.close()
        if self._master.wandb_monitor is not None:
            import wandb

            wandb.finish()


def _cut(path: Path, tokens: int) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        heading, *rows = list(csv.reader(file)) or [[]]
    kept = [row for row in rows if len(row) == 2 and _number(row[0]) <= tokens]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([heading, *kept])


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # the row that was being written when the run was killed
        return math.inf
