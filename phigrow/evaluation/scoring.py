"""The log probability that a model gives to a text after a prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoints.stored_model import StoredModel
from phigrow.checkpoints.tokenizer_folder import open_tokenizer
from phigrow.errors import GrowthError
from phigrow.expansion.logits import transformers_model
from phigrow.files.paths import utf8_path
from phigrow.models.config import context_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Dtypes of the arithmetic; the first is the default."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
        model: transformers' model in evaluation mode, on its device.
        tokenizer: of the checkpoint.
        context: most tokens that the model reads at once.
        parameters: number of stored values.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    context: int
    parameters: int


@dataclass(frozen=True)
class _Window:
    """Tokens of one forward pass, and the tokens that follow the last ones of them; both belong to one request."""

    request: int
    ids: tuple[int, ...]
    targets: tuple[int, ...]


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a checkpoint.

    Raises:
        GrowthError: the folder has none, or it cannot be loaded.
    """
    try:
        return open_tokenizer(folder)
    except GrowthError as error:
        raise GrowthError(
            f"the checkpoint cannot be evaluated without a tokenizer: {error.what}",
            where=str(folder),
            why=error.why,
            fix=f"copy tokenizer.json and tokenizer_config.json of the text it was trained on into {folder}",
        ) from error


def load(folder: Path, dtype: str = DTYPES[0], device: str | None = None) -> Loaded:
    """Load a checkpoint for evaluation. No code from the folder is run.

    Args:
        folder: the checkpoint.
        dtype: of the arithmetic.
        device: of torch, such as ``cuda:1``; by default the accelerator, or the CPU where there is none.

    Raises:
        GrowthError: the checkpoint cannot be read or has no tokenizer, its tokenizer has more tokens than it, or torch
            does not have the device.
    """
    tokenizer = tokenizer_of(folder)
    with StoredModel(folder) as stored:
        stored.check()
        config, pickled = stored.config, stored.pickled
        parameters = sum(math.prod(shape) for shape in stored.shapes.values())
    if (highest := max(tokenizer.get_vocab().values())) >= config["vocab_size"]:
        raise GrowthError(
            f"the tokenizer has the token {highest}, and the model has {config['vocab_size']} tokens",
            where=str(folder),
            why="the model cannot read every text that the tokenizer encodes",
            fix="copy the tokenizer that the model was trained with into the folder",
        )
    with utf8_path(folder) as readable:
        model = transformers_model(readable, config, str(folder), dtype, pickled)
    model = _on_device(model, device or device_type())
    return Loaded(model, tokenizer, context_of(config), parameters)


def device_type(device: str | None = None) -> str:
    """Return the kind of a device of torch, such as ``cuda``; by default that of the accelerator, or ``cpu``.

    Raises:
        GrowthError: torch knows no such device.
    """
    import torch

    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found.type if found is not None else "cpu"
    try:
        return torch.device(device).type
    except RuntimeError as error:
        raise GrowthError(
            f"there is no device {device!r}",
            where="--device",
            why=str(error).partition("\n")[0],
            fix="choose cpu, cuda, cuda:1 or another device of torch",
        ) from error


def _on_device(model: Any, device: str) -> Any:
    import torch

    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError, TypeError) as error:
        raise GrowthError(
            f"the model cannot be moved to the device {device!r}",
            where="--device",
            why=str(error).partition("\n")[0],
            fix="choose cpu, or a device that this machine has, whose memory holds the model and which knows --dtype",
        ) from error


def logprobs(
    loaded: Loaded,
    requests: Sequence[tuple[str, str]],
    batch_size: int = 16,
    advance: Callable[[object], None] = lambda _: None,
) -> list[float]:
    """Compute the log probability of every continuation after its prompt, in nats.

    `encode_pair` gives the tokens, and those of the continuation are scored. A prompt that is too long loses its
    beginning. A continuation that is longer than the context is scored in pieces, each after the tokens before it.

    Args:
        loaded: the checkpoint.
        requests: pairs of prompt and continuation.
        batch_size: sequences per forward pass.
        advance: called once for each scored sequence.
    """
    import torch

    windows = [
        window
        for number, (prompt, text) in enumerate(requests)
        for window in _windows(number, *encode_pair(loaded.tokenizer, prompt, text), loaded.context)
    ]
    # Sequences of one length share a pass, and the longest come first, so that a lack of memory shows at once.
    windows.sort(key=lambda window: -len(window.ids))
    device = next(loaded.model.parameters()).device
    totals = [0.0] * len(requests)
    with torch.inference_mode():
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            width = len(batch[0].ids)
            ids = torch.tensor([[*window.ids, *[0] * (width - len(window.ids))] for window in batch], device=device)
            mask = torch.tensor([[1] * len(w.ids) + [0] * (width - len(w.ids)) for w in batch], device=device)
            logits = loaded.model(ids, attention_mask=mask, use_cache=False).logits
            for window, row in zip(batch, logits, strict=True):
                end = len(window.ids)
                scored = row[end - len(window.targets) : end]
                scored = scored if scored.dtype == torch.float64 else scored.float()
                targets = torch.tensor(window.targets, device=device)[:, None]
                totals[window.request] += float(scored.log_softmax(-1).gather(1, targets).sum())
                advance(window)
    return totals


def encode_pair(tokenizer: Any, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a prompt and of its continuation.

    Both are encoded together. The prompt has as many tokens as it has alone, but the last token always belongs to the
    continuation, because the last characters of the prompt and the continuation can be one token. Spaces at the end of
    the prompt belong to the continuation.

    Raises:
        GrowthError: the continuation is empty, or the tokenizer gives no tokens.
    """
    stripped = prompt.rstrip()
    prompt, text = stripped, prompt[len(stripped) :] + text
    first = tokenizer("", add_special_tokens=True)["input_ids"]
    first = first if first == [tokenizer.bos_token_id] else []
    whole = tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
    if not text or not whole:
        raise GrowthError(
            "a continuation has no tokens",
            where=repr(prompt + text),
            why="it is empty" if not text else "the tokenizer gives none for the prompt and the continuation",
            fix="give each document continuations that the tokenizer can encode",
        )
    count = min(len(tokenizer(prompt, add_special_tokens=False)["input_ids"]), len(whole) - 1)
    before = [*first, *whole[:count]]
    if not before:
        before = [tokenizer.eos_token_id or 0]
    return before, list(whole[count:])


def _windows(request: int, before: list[int], text: list[int], context: int) -> Iterator[_Window]:
    tokens = [*before, *text]
    for start in range(len(before), len(tokens), context):
        stop = min(start + context, len(tokens))
        yield _Window(request, tuple(tokens[max(0, stop - 1 - context) : stop - 1]), tuple(tokens[start:stop]))
