"""The fields of every record. Writers, readers and validation share this declaration."""

# Annotations are evaluated here: the keys of a TypedDict are read when the program runs.
from typing import Any, Literal, TypedDict

FILE = "records.jsonl"
"""Name of the file of records in a run's folder: one JSON object on each line."""

PACKED_FILE = "records.jsonl.gz"
"""The same, compressed by gzip. It is read where ``FILE`` is missing."""

Unit = Literal["tokens", "flops", "seconds"]
UNITS: tuple[Unit, ...] = ("tokens", "flops", "seconds")
"""Cumulative costs. Tokens are required, because they order a curve. The others may be missing from a run."""

Record = dict[str, Any]
"""One line of the file: ``type`` and the fields of that type."""


class RunRecord(TypedDict, total=False):
    """Settings and provenance of a run, written once. Fields that are not listed here are kept and shown unchanged.

    ``arm`` and ``seed`` are required. docs/records.md describes each field.
    """

    arm: str
    seed: int
    config: dict[str, Any]
    stage_settings: list[dict[str, Any]]
    auto_choices: dict[str, Any]
    attention: dict[str, Any]
    compare: dict[str, Any]
    trunk: str
    budget: int | None
    model: dict[str, Any]
    parameters: int
    non_embedding_parameters: int
    flops_per_token: float
    seq_len: int
    teacher: dict[str, Any]
    growth: dict[str, Any] | None
    study: dict[str, Any]
    source_tokens: float | None
    source_flops: float | None
    source_seconds: float | None
    expand_tokens: float | None
    expand_flops: float | None
    expand_seconds: float | None
    data_fingerprint: str
    content_fingerprint: str
    eval_fingerprint: str
    eval_blocks: int
    log: dict[str, Any]
    world_size: int
    device: str
    versions: dict[str, str]
    commit: str | None


class _Point(TypedDict):
    step: int
    tokens: int
    loss: float | None


class _Costs(TypedDict, total=False):
    flops: float
    seconds: float


class StepRecord(_Point, _Costs, total=False):
    """One optimizer step. ``loss`` is the training loss in nats per token, null where it is not finite.

    ``skipped``: no update was made. ``overflow``: fp16 halved its loss scale, and no update was made. ``spike``: the
    loss was an outlier. ``blocks``: data blocks of a skipped step. ``distillation_loss``: divergence from the teacher
    in nats per token, in steps with a teacher; ``loss`` is then the cross entropy alone. With several ranks:
    ``slowest_rank``, its seconds before it waits for others, and the median of all ranks.
    """

    lr: float | None
    grad_norm: float | None
    tokens_per_second: float | None
    data_wait: float | None
    slowest_rank: int
    slowest_seconds: float
    median_seconds: float
    distillation_loss: float | None
    overflow: bool
    skipped: bool
    spike: bool
    blocks: list[int]


class EvalRecord(_Point, _Costs, total=False):
    """One evaluation. ``loss`` is the held-out loss in nats per token.

    ``sources`` has the held-out loss of each named source. ``tokens_by_source`` and ``epochs_by_source`` count the
    training text so far. The last evaluation of a run has ``group_losses``, the mean losses of up to 100 groups of
    held-out blocks, and ``group_blocks``, their numbers of blocks.
    """

    sources: dict[str, float | None]
    tokens_by_source: dict[str, int]
    epochs_by_source: dict[str, float]
    group_losses: list[float]
    group_blocks: list[int]


class DiagnosticsRecord(TypedDict, total=False):
    """Symmetry of copied values at one step. docs/measuring.md defines each column."""

    step: int
    copy_cosine: float | None
    copy_cosine_min: float | None
    copy_cosine_max: float | None
    effective_rank: float | None
    fresh_update_share: float | None


class GrowthRecord(_Costs, total=False):
    """The point at which a staged run grew: costs before it, seconds that growth took, losses before and after."""

    step: int
    tokens: int
    grow_seconds: float
    method: str | None
    depth: str | None
    state: str | None
    plan_hash: str | None
    loss_before: float | None
    loss_after: float | None
    parameters: int | None


class ResumeRecord(TypedDict, total=False):
    """A resumption: its step, the device, the number of ranks and the ZeRO stage, and both before it (``was``)."""

    step: int
    device: str
    world_size: int
    zero: int
    was: dict[str, int]


class StudyInfo(TypedDict, total=False):
    """Information of a study about a run: key ``study`` of the run record. Training uses none of it.

    ``source`` names the source. ``source_seed`` is the seed of the source's own training. ``source_age`` is the number
    of tokens that the source read before growth, divided by its number of parameters. ``source_constant``: its
    learning rate had not decayed. ``source_loss`` is its held-out loss at the moment of growth. ``flat``: the run
    trains a model of another size from scratch, for the flat frontier. ``same_text``: it reads the source's blocks.
    ``refined``: the run is an end that was added where a cost had been read between two other ends.
    ``side_by_side`` is the number of runs that shared the machine, itself included. ``teacher`` has the tokens of
    distillation and the teacher's FLOPs for each.
    """

    source: str | None
    source_seed: int | None
    source_age: float | None
    source_constant: bool
    source_loss: float | None
    flat: bool
    same_text: bool
    refined: bool
    side_by_side: int
    teacher: dict[str, float] | None


FIELDS: dict[str, frozenset[str]] = {
    kind: frozenset(record.__annotations__)
    for kind, record in {
        "run": RunRecord,
        "step": StepRecord,
        "eval": EvalRecord,
        "diagnostics": DiagnosticsRecord,
        "growth": GrowthRecord,
        "resume": ResumeRecord,
    }.items()
}
"""Names of the fields of every type of record."""

DIAGNOSTICS = tuple(name for name in DiagnosticsRecord.__annotations__ if name != "step")
"""Columns of the ``diagnostics`` records."""
