"""Read staged growth from one YAML file, strictly: train, grow weights and optimizer, train on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.paths import user_path
from phigrow.files.shipped import find_shipped
from phigrow.growth.growth_spec import GrowthSpec
from phigrow.models.config import Config
from phigrow.models.cost import count_cost
from phigrow.study.inputs import Input
from phigrow.study.job_builder import hash_of, result_keys
from phigrow.study.places import former_places, given_inputs, hashed_data
from phigrow.study.reading import (
    GROWTH,
    beside,
    config_of,
    data_of,
    mapping,
    near,
    only,
    optional,
    read_recipe,
    run_keys,
    single,
)  # fmt: skip
from phigrow.training.declaration import Role

KEYS = ("data", "train", "stages", "schedule", "scratch", "arm", "seed", "ranks", "out")
STAGE = ("model", "init", "grow", "steps", "train")
SCHEDULES = ("one", "each")


@dataclass(frozen=True)
class Growing:
    """Growth between two stages."""

    method: str
    state: str
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    method_files: dict[str, str | None] = field(default_factory=dict)

    @property
    def spec(self) -> GrowthSpec:
        """Settings of the growth; an error if a method file is missing, or has changed since the recipe was read."""
        spec = GrowthSpec.of(self.method, seed=self.seed, **self.options)
        return spec.pinned(self.method_files) if self.method_files else spec


@dataclass(frozen=True)
class Stage:
    """One stage: a growth, except in the first stage, and a training run.

    Attributes:
        number: number of the stage, from 1; 0 for the run from scratch.
        config: configuration of the model.
        steps, first: optimizer steps of this stage, and of all stages before it.
        keys: all keys of its training run.
        folder: folder of its run. Its name ends in a hash of everything on which it depends, earlier stages included.
        growing: the growth before its training; None for the first stage.
        tokens, flops: cost of its training.
    """

    number: int
    config: Config
    steps: int
    first: int
    keys: dict[str, Any]
    folder: Path
    growing: Growing | None
    tokens: int
    flops: float

    @property
    def start(self) -> Path:
        """Folder of the grown weights with which it begins."""
        return self.folder.with_name(self.folder.name + "-start")

    @property
    def state(self) -> Path:
        """Folder of the grown optimizer state with which it begins."""
        return self.folder.with_name(self.folder.name + "-state")

    @property
    def done(self) -> bool:
        """True if the stage has ended. It then has an export, which a run writes last."""
        return (self.folder / "export").is_dir()


@dataclass(frozen=True)
class Staged:
    """A recipe of stages; `load_stages` reads it from YAML.

    Attributes:
        name: name of its file.
        arm: name of the arm in records.
        out: folder of all results.
        data: a folder of packed blocks, or the arguments of `phigrow.corpus.prepare`.
        data_folder: folder of the blocks, which may not exist yet.
        stages: the stages, in order.
        scratch: the last model, trained from scratch for the same number of steps; None without ``scratch: true``.
        ranks: number of DeepSpeed ranks; None lets the machine decide.
        batch: sequences per step of the first stage.
        seed: seed of data order, new weights and growths.
        former_places: place of an input that was moved -> its former place, see `phigrow.study.places`.
    """

    name: str
    arm: str
    out: Path
    data: Path | dict[str, Any]
    data_folder: Path
    stages: tuple[Stage, ...]
    scratch: Stage | None
    ranks: int | None
    batch: int
    seed: int
    former_places: dict[str, str] = field(default_factory=dict)


def load_stages(path: str | Path, *, out: str | Path | None = None, ranks: int | None = None) -> Staged:
    """Read a recipe of stages; relative paths in it are tried beside the file first.

    Args:
        path: a YAML file, or the name of a shipped recipe of stages.
        out: folder of all results, in place of the file's ``out``.
        ranks: in place of the file's ``ranks``.

    Raises:
        GrowthError: there is no such file; a key is unknown (with the nearest ones), missing, or has a wrong value; a
            stage cannot be grown; or its batch size does not divide the sequences read before it.

    >>> [stage.steps for stage in load_stages("tiny").stages]
    [30, 30, 30]
    """
    path = find_shipped(path, "stages")
    given = mapping(read_recipe(path, "stages"), str(path))
    only(given, KEYS, str(path))
    for key in ("data", "stages"):
        if key not in given:
            raise GrowthError(f"the recipe of stages has no {key!r}", where=str(path), fix="give data and stages")
    schedule = str(given.get("schedule", "one"))
    if schedule not in SCHEDULES:
        raise near(f"schedule is {schedule!r}", f"schedule in {path}", schedule, list(SCHEDULES))
    return _Reader(path, given, user_path(out or given.get("out") or Path("runs") / path.stem), schedule, ranks).read()


class _Reader:
    def __init__(self, path: Path, given: dict[str, Any], out: Path, schedule: str, ranks: int | None) -> None:
        self.path, self.given, self.out, self.schedule, self.ranks = path, given, out, schedule, ranks
        self.data, self.seq_len = data_of(given["data"], path)
        self.former_places = former_places(out, given_inputs(self.data, []))
        self.data_key = hash_of(hashed_data(self.data, self.former_places))
        self.folder = self.data if isinstance(self.data, Path) else out / f"data-{self.data_key}"
        self.arm = str(given.get("arm", path.stem))
        self.seed = single(given.get("seed", 0), "seed", path, least=0)
        self.train = {"batch": 16, "keep": 1} | self._run_keys(given.get("train"), f"train in {path}")

    def read(self) -> Staged:
        listed = self.given["stages"]
        if not isinstance(listed, list) or not listed:
            raise GrowthError(
                "there are no stages", where=f"stages in {self.path}", fix="write a list, one entry a stage"
            )
        parts = [mapping(part, f"stage {k} in {self.path}") for k, part in enumerate(listed, 1)]
        lengths = [self._steps(part, k) for k, part in enumerate(parts, 1)]
        stages: list[Stage] = []
        for number, part in enumerate(parts, 1):
            stages.append(self._stage(number, part, lengths, stages))
        wanted = self.given.get("scratch", False)
        if not isinstance(wanted, bool):
            raise GrowthError(f"scratch is {wanted!r}", where=f"scratch in {self.path}", fix="give true or false")
        scratch = self._scratch(stages, sum(lengths)) if wanted else None
        return Staged(
            name=self.path.stem, arm=self.arm, out=self.out, data=self.data, data_folder=self.folder,
            stages=tuple(stages), scratch=scratch, ranks=self.ranks or optional(self.given, "ranks", self.path),
            batch=int(self.train["batch"]), seed=self.seed, former_places=self.former_places,
        )  # fmt: skip

    def _steps(self, part: dict[str, Any], number: int) -> int:
        where = f"stage {number} in {self.path}"
        only(part, STAGE, where)
        if "steps" not in part:
            raise GrowthError("the stage has no 'steps'", where=where, fix="give a number of optimizer steps")
        begins = [key for key in ("model", "init", "grow") if key in part]
        if len(begins) != 1 or (begins == ["grow"]) != (number > 1):
            raise GrowthError(
                f"the stage begins with {' and '.join(begins) or 'nothing'}",
                where=where,
                fix="the first stage has a model, or init (a checkpoint folder); every later one has grow",
            )
        return single(part["steps"], "steps", where, least=1)

    def _run_keys(self, value: Any, where: str) -> dict[str, Any]:
        keys = run_keys(value, Role.STAGES, where, "the stages decide it")
        if keys.get("save_every") == 0:
            raise GrowthError(
                "save_every is 0", where=where, why="stages grow from checkpoints", fix="remove save_every"
            )
        return keys

    def _stage(self, number: int, part: dict[str, Any], lengths: list[int], before: list[Stage]) -> Stage:
        where = f"stage {number} in {self.path}"
        steps, first = lengths[number - 1], sum(lengths[: number - 1])
        train = self.train | self._run_keys(part.get("train"), f"train of {where}")
        if train["batch"] < 1:
            raise GrowthError(f"batch is {train['batch']}", where=f"batch in {where}", fix="give 1 or more")
        read = sum(stage.steps * stage.keys["batch"] for stage in before)
        if read % train["batch"]:
            raise GrowthError(
                f"stage {number} starts after {read} sequences, which is not a multiple of its batch size "
                f"{train['batch']}",
                where=where,
                fix=f"set batch to a divisor of {read}",
            )  # fmt: skip
        growing: Growing | None = None
        identity: list[Any] = [
            before[-1].folder.name if before else self.data_key,
            self.seed,
            steps,
            result_keys(train),
        ]
        if self.schedule == "one":
            train |= {"schedule_start": first or None, "schedule_steps": sum(lengths)}
            identity.append(sum(lengths))
        if "grow" in part:
            # Every growth draws its own values. With up to 999 stages, growths of other seeds differ, too.
            seed = 1000 * self.seed + number
            growing, config, plan_hash = self._growing(part["grow"], before[-1].config, seed, where)
            identity += [plan_hash, growing.state]
        elif "init" in part:
            from phigrow.checkpoints.stored_model import stored_model_config

            folder = beside(str(part["init"]), self.path)
            config = stored_model_config(folder)
            train |= {"init": str(folder)}
            place = str(folder.resolve())
            self.former_places |= former_places(self.out, {place: Input("checkpoint", str(folder))})
            identity.append(self.former_places.get(place, place))
        else:
            config = config_of(part["model"], self.path, "model")
            train |= {"model": config}
            identity.append(config)
        folder = self.out / f"stage{number}-{hash_of(identity)}"
        stage = self._made(number, config, steps, first, train, folder, growing)
        if growing is not None:
            stage.keys.update(init=str(stage.start), init_optimizer=str(stage.state))
        self._check(stage.keys, where)
        return stage

    def _growing(self, value: Any, source: Config, seed: int, where: str) -> tuple[Growing, Config, str]:
        from phigrow.expansion.grow_optimizer import check_state
        from phigrow.growth.method_files import SUFFIX
        from phigrow.growth.method_spec import resolve_method, with_paths
        from phigrow.growth.methods import built_in_methods
        from phigrow.growth.planner import make_plan

        given = mapping(value, f"grow of {where}")
        for key in ("dst", "method"):
            if key not in given:
                raise GrowthError(f"the growth has no {key!r}", where=f"grow of {where}", fix="give dst and method")
        spelling = with_paths(str(given.pop("method")), lambda file: beside(file, self.path))
        options = {option for method in built_in_methods().values() for option in method.options}
        try:
            named = resolve_method(spelling, {})[0]
        except GrowthError as error:
            raise error.at(f"grow of {where}") from error
        only(given, ("dst", "state", "maps", *GROWTH, *sorted(options | set(named.options))), f"grow of {where}")
        dst = config_of(given.pop("dst"), self.path, "dst")
        if "maps" in given:
            given["maps"] = beside(str(given["maps"]), self.path)
        files = {source.method: source.sha256 for source in named.sources} if SUFFIX in spelling else {}
        growing = Growing(spelling, str(given.pop("state", "scale")), seed, given, files)
        try:
            made = make_plan(source, dst, growing.spec)
            check_state(made, growing.state)
        except GrowthError as error:
            raise error.at(f"grow of {where}") from error
        return growing, dst, made.hash

    def _scratch(self, stages: list[Stage], steps: int) -> Stage:
        config, train = stages[-1].config, dict(self.train)
        key = hash_of([self.data_key, self.seed, config, steps, result_keys(train)])
        made = self._made(0, config, steps, 0, train | {"model": config}, self.out / f"scratch-{key}", None)
        made.keys["arm"] = "scratch"
        self._check(made.keys, f"scratch in {self.path}")
        return made

    def _made(
        self, number: int, config: Config, steps: int, first: int, train: dict[str, Any], folder: Path,
        growing: Growing | None,
    ) -> Stage:  # fmt: skip
        keys = {key: value for key, value in train.items() if value is not None}
        keys |= {"steps": steps, "seed": self.seed, "arm": self.arm, "out": str(folder), "data": str(self.folder)}
        keys |= {"export": "export", "export_dtype": "fp32", "universal": True}  # growth starts from the masters
        tokens = steps * int(keys["batch"]) * self.seq_len
        flops = tokens * count_cost(config, self.seq_len).training_flops
        return Stage(number, config, steps, first, keys, folder, growing, tokens, flops)

    def _check(self, keys: dict[str, Any], where: str) -> None:
        from phigrow.training import RunConfig

        try:
            RunConfig(**keys)
        except GrowthError as error:
            raise error.at(where) from error
