"""Every pair of stored and wanted dtypes: float32 arithmetic and one cast, whatever the shards, tied or not."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import phi_config, phi_model

import phigrow

SRC, DST = phi_config(32, 4, 48, 2, 4), phi_config(48, 6, 60, 3, 4)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stored", DTYPES)
def test_every_pair_of_dtypes_is_the_float32_growth_cast_once(stored, tied, tmp_path):
    src, dst = (each | {"tie_word_embeddings": tied} for each in (SRC, DST))
    folders = tmp_path / "one", tmp_path / "many"
    model = phi_model(src, stored)
    model.save_pretrained(folders[0])
    model.save_pretrained(folders[1], max_shard_size="10KB")
    for method in ("wr", "tile") if tied else ("wr", "tile", "lossless"):
        exact = grown(folders[0], dst, tmp_path, method, torch.float32)
        assert ("lm_head.weight" in exact) is not tied
        for folder in folders:
            for wanted in DTYPES:
                out = grown(folder, dst, tmp_path, method, wanted)
                assert all(torch.equal(out[name], value.to(wanted)) for name, value in exact.items())
                assert out.keys() == exact.keys()


def grown(folder, dst, tmp_path, method, dtype):
    name = str(dtype).removeprefix("torch.")
    shards = "20KB" if dtype is torch.float16 else "5GB"
    out = phigrow.expand(
        folder, dst, tmp_path / "out", method=method, dtype=name, shard_size=shards, overwrite=True, sync=False
    )
    return {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}
