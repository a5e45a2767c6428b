import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import phi_config, phi_model

import phigrow
from phigrow.checkpoints.pickles import PickledWeights
from phigrow.errors import GrowthError
from phigrow.expansion.certificates import check_certificate, save_certificate, tensor_hashes

SRC, DST = phi_config(32, 4, 48, 2, 4), phi_config(48, 6, 70, 3, 4)


@pytest.fixture
def sides(tmp_path, save_model):
    src = save_model(phi_model(SRC, torch.float32))
    dst = phigrow.expand(src, DST, tmp_path / "grown", method="lossless", shard_size="40KB")
    return src, dst, tmp_path / "certificate.json"


def test_hashes_follow_values_dtype_and_shape_but_not_shards(sides, tmp_path):
    src, dst, _ = sides
    one = phigrow.expand(src, DST, tmp_path / "one", method="lossless")
    assert tensor_hashes(one) == tensor_hashes(dst)
    assert len(set(tensor_hashes(src).values())) == len(tensor_hashes(src))
    half = phigrow.expand(src, DST, tmp_path / "half", method="lossless", dtype="bfloat16")
    assert all(a != b for a, b in zip(tensor_hashes(half).values(), tensor_hashes(one).values(), strict=True))


def test_one_altered_tensor_is_named(sides):
    src, dst, path = sides
    save_certificate(path, phigrow.verify(src, dst), src, dst)
    assert check_certificate(path, src, dst) == []
    shard = next(p for p in dst.glob("*.safetensors") if "model.layers.1.mlp.fc1.weight" in load_file(p))
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.fc1.weight"][7, 7] += 1e-6
    save_file(tensors, shard, metadata={"format": "pt"})
    assert check_certificate(path, src, dst) == ["destination: model.layers.1.mlp.fc1.weight was altered"]
    # The other side, too; and the two sides are not confused.
    tensors = load_file(src / "model.safetensors")
    del tensors["lm_head.bias"]
    tensors["more"] = torch.ones(2)
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    assert check_certificate(path, src, dst)[:2] == ["source: lm_head.bias is missing", "source: more was not there"]


def test_pickled_weights_are_certified_like_safetensors(sides):
    src, dst, path = sides
    hashes = tensor_hashes(src)
    save_certificate(path, phigrow.verify(src, dst), src, dst)
    torch.save(load_file(src / "model.safetensors"), src / "pytorch_model.bin")
    (src / "model.safetensors").unlink()
    with pytest.warns(PickledWeights):
        assert tensor_hashes(src) == hashes
    with pytest.warns(PickledWeights):
        assert check_certificate(path, src, dst) == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"),
        ('{"format": 2}', "its format is 2, and this phigrow reads format 1"),
        ("{}", "it has no 'format'"),
    ],
)
def test_an_unreadable_certificate_names_the_reason_once(sides, text, why):
    src, dst, path = sides
    path.write_text(text)
    with pytest.raises(GrowthError) as error:
        check_certificate(path, src, dst)
    assert why in error.value.why
    assert str(error.value).count("the certificate cannot be read") == 1


def test_a_certificate_that_cannot_be_read(sides):
    src, dst, path = sides
    for text in ("{", "[]", '{"format": 2}', '{"format": 1, "source": {}}'):
        path.write_text(text)
        with pytest.raises(GrowthError, match="the certificate cannot be read"):
            check_certificate(path, src, dst)
    with pytest.raises(GrowthError, match="the output exists, and it is not a certificate that phigrow wrote"):
        save_certificate(path, phigrow.verify(src, dst), src, dst)
    assert path.read_text() == text
    path.unlink()
    for _ in range(2):  # the second time, its own kind is replaced
        save_certificate(path, phigrow.verify(src, dst), src, dst)
        assert json.loads(path.read_text())["certificate"]["passed"] is True
    with pytest.raises(GrowthError, match="the certificate cannot be written"):
        save_certificate(path / "below", phigrow.verify(src, dst), src, dst)
