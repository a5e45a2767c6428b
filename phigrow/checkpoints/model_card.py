"""Write the card of a model that was made from another: ``README.md``, with what the source's card says of both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phigrow.files.untrusted import contained

CARD_FILE = "README.md"

MOST_BYTES = 1 << 20
"""Largest card that is read."""

KEPT = ("license", "license_name", "license_link", "language", "datasets")
"""Metadata of the source that hold for every model made from it. Its results and its title do not."""


def model_card(
    text: str, *, source: Path | None = None, repository: str | None = None, tags: Sequence[str] = ()
) -> str:
    """Return a Hugging Face model card: its metadata, then a text in Markdown.

    Args:
        text: the card's text.
        source: the source's folder, whose card gives the licence, the languages and the data.
        repository: hub id of the source; by default the base model that the source's own card names.
        tags: of the model.
    """
    from huggingface_hub import ModelCardData

    former = source_metadata(source) if source is not None else {}
    kept: dict[str, Any] = {key: former[key] for key in KEPT if _is_text(former.get(key))}
    data = ModelCardData(
        base_model=repository or _hub_ids(former.get("base_model")),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(tags),
        **kept,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def source_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of a folder's model card; empty where it has none that can be read."""
    from huggingface_hub import ModelCard

    try:
        path = contained(folder, CARD_FILE)
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            return {}
        card: Any = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        return dict(card.data.to_dict())
    except Exception:  # a link that leads out, text of another encoding, YAML that is none, metadata of any other form
        return {}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def _hub_ids(value: Any) -> str | list[str] | None:
    """Return the hub ids among the base models of a card: a local folder's name has no owner."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    ids = []
    for each in value if isinstance(value, list) else [value]:
        try:
            if isinstance(each, str) and each.count("/") == 1:
                validate_repo_id(each)
                ids.append(each)
        except HFValidationError:
            continue
    return None if not ids else ids[0] if len(ids) == 1 else ids
