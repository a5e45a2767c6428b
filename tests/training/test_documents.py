"""Attention kept within documents, by value: a document in a block is computed as it is alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scenarios import TINY, VOCAB
from torch import Tensor
from torch.nn import functional as F

from phigrow.training.documents import attention_inputs, document_positions
from phigrow.training.loss import attach_loss

EOS = 0
LENGTHS = (7, 1, 9, 5)
"""Words of the documents of one block; the second is a single word, and one without any follows the third."""


def model(attention: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    config = CONFIG_MAPPING["phi"].from_dict(TINY | {"max_position_embeddings": 64})
    made = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    with torch.no_grad():  # large enough that attention decides something
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.5 if parameter.ndim > 1 else 0.1))
    return made


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCAB, (length,), generator=generator) for length in LENGTHS]


def block() -> tuple[Tensor, list[slice]]:
    """One row of tokens, each document behind an end-of-text token but the first, and where each lies."""
    eos = torch.tensor([EOS])
    one, two, three, four = documents()
    row = torch.cat([one, eos, two, eos, three, eos, eos, four])
    return row[None], [slice(0, 7), slice(7, 9), slice(9, 19), slice(19, 20), slice(20, 26)]


def logits(made: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = made(**inputs, use_cache=False).logits
    return found


def largest_difference(made: Any, whole: Tensor, ids: Tensor, places: list[slice]) -> float:
    alone = [logits(made, {"input_ids": ids[:, place]})[0] for place in places]
    return max(float((whole[0, place] - one).abs().max()) for place, one in zip(places, alone, strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_document_in_a_block_is_computed_as_it_is_alone(attention):
    made = model(attention)
    ids, places = block()
    within = logits(made, attention_inputs(ids, EOS, varlen=False))
    assert largest_difference(made, within, ids, places) < 2e-5  # logits up to 16
    plain = logits(made, {"input_ids": ids})
    assert largest_difference(made, plain, ids, places[:1]) < 2e-5
    assert largest_difference(made, plain, ids, places[2:]) > 1  # negative control


def varlen_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What flash-attn's varlen kernel computes of the lengths it is given, written down."""
    assert attention_mask is None
    assert len(query) == 1
    borders = kwargs["cu_seq_lens_q"].tolist()
    assert borders == kwargs["cu_seq_lens_k"].tolist()
    longest = max(end - start for start, end in itertools.pairwise(borders))
    assert kwargs["max_length_q"] == kwargs["max_length_k"] >= longest
    out = [
        F.scaled_dot_product_attention(
            *(x[:, :, start:end] for x in (query, key, value)), is_causal=True, scale=kwargs["scaling"]
        )
        for start, end in itertools.pairwise(borders)
    ]
    return torch.cat(out, dim=2).transpose(1, 2), None


def test_the_lengths_for_flash_attention_are_those_of_the_documents():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("varlen_reference", varlen_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("varlen_reference", flash_attention_mask)
    ids, places = block()
    two = torch.cat([ids, ids.flip(1)])
    inputs = attention_inputs(two, EOS, varlen=True)
    lengths = inputs["cu_seq_lens_q"]
    assert (lengths.dtype, len(lengths), inputs["max_length_q"]) == (torch.int32, 32, ids.shape[1])
    starts = [at for at, token in enumerate(two.flatten().tolist()) if at in (0, ids.shape[1]) or token == EOS]
    assert lengths.tolist() == [*starts, *[two.numel()] * (32 - len(starts))]  # empty documents fill up the lengths
    found = logits(model("varlen_reference"), inputs).view(2, ids.shape[1], -1)
    masked = logits(model("sdpa"), attention_inputs(two, EOS, varlen=False))
    assert (found - masked).abs().max() < 2e-5
    assert largest_difference(model("sdpa"), found, ids, places) < 2e-5


def test_positions_start_again_at_the_end_of_text_token():
    ids = torch.tensor([[5, 6, 0, 7, 8], [0, 0, 3, 0, 9]])
    assert document_positions(ids, EOS).tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 0, 1]]


def test_the_loss_within_is_that_of_the_documents_alone_and_every_token_has_one():
    made = model("sdpa")
    ids, places = block()
    row = torch.cat([ids, torch.tensor([[EOS]])], dim=1)
    expected = []
    for place in places:
        alone = logits(made, {"input_ids": row[:, place]})[0]
        expected.append(F.cross_entropy(alone, row[0, place.start + 1 : place.stop + 1], reduction="none"))
    wanted = torch.cat(expected)
    assert len(wanted) == row.shape[1] - 1
    attach_loss(made, within=EOS)
    two = torch.cat([row, row.roll(3, 1)])
    with torch.no_grad():
        assert float(made(row)) == pytest.approx(float(wanted.mean()), rel=1e-5)
        by_row = made(two, by_row=True)
        assert by_row.tolist() == pytest.approx([float(made(part[None])) for part in two], rel=1e-5)
        assert float(made(two)) == pytest.approx(float(by_row.mean()), rel=1e-5)
    attach_loss(made)
    with torch.no_grad():
        assert abs(float(made(row)) - float(wanted.mean())) > 1e-2  # negative control
