import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from phigrow.checkpoints.bits import bits_of
from phigrow.checkpoints.reader import CheckpointReader
from phigrow.checkpoints.writer import CheckpointWriter
from phigrow.errors import GrowthError


def raw(path, header, data=b"", length=None):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_reads_what_safetensors_wrote_and_writes_what_it_reads(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tensors = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for name, shape in (("matrix", (7, 5)), ("vector", (3,)), ("row", (1, 9)))
        }
        folder = tmp_path / str(dtype)
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        with CheckpointReader(folder) as reader:
            assert {name: tuple(t.shape) for name, t in tensors.items()} == reader.shapes
            assert torch.equal(reader.tensors["matrix"].rows(2, 6), tensors["matrix"][2:6])
            assert torch.equal(reader.tensors["vector"].rows(0, 3), tensors["vector"])
            assert reader.tensors["matrix"].rows(3, 3).shape == (0, 5)
        out = folder / "out"
        out.mkdir()
        writer = CheckpointWriter(out, {n: tuple(t.shape) for n, t in tensors.items()}, str(dtype)[6:], 40)
        for name in ("row", "vector"):
            writer.write(name, 0, bits_of(tensors[name]))
        writer.write("matrix", 4, bits_of(tensors["matrix"][4:]))  # rows in any order
        writer.write("matrix", 0, bits_of(tensors["matrix"][:4]))
        writer.close(sync=False)
        again = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
        assert all(torch.equal(again[name], tensors[name]) for name in tensors)
        with CheckpointReader(out) as reader:
            assert reader.shapes == {n: tuple(t.shape) for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8)}, b"1234567", "gives a tensor a wrong shape or position"),
        ({"a": entry(0, 4)}, b"12345678", "gives a tensor a wrong shape or position"),
        ({"a": entry(-8, 0)}, b"12345678", "gives a tensor a wrong shape or position"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"123456789012", "two tensors overlap in the file"),
        ({"a": entry(0, 2, dtype="I8")}, b"12", "the weights have dtype I8"),
        ({"a": {"dtype": "F32"}}, b"", "header cannot be read"),
        (b"not json", b"", "header cannot be read"),
        (b"[]", b"", "header cannot be read"),
    ],
)
def test_dishonest_files_are_refused(tmp_path, header, data, message):
    raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(GrowthError, match=message):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("length", [0, 10**12, 2**63])
def test_a_header_longer_than_its_file_is_refused(tmp_path, length):
    raw(tmp_path / "model.safetensors", {"a": entry(0, 8)}, b"12345678", length=length)
    with pytest.raises(GrowthError, match="the file is not a complete safetensors file"):
        CheckpointReader(tmp_path)


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "model.bin"]
)
def test_an_index_cannot_point_outside_its_folder(tmp_path, name):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    index(tmp_path, {"a": name})
    with pytest.raises(GrowthError, match="the index of shards names a file outside its folder"):
        CheckpointReader(tmp_path)


def test_an_index_must_fit_its_files(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    index(tmp_path, {"a": "x.safetensors", "b": "x.safetensors"})
    with pytest.raises(GrowthError, match=r"where: b in .*\n  why: x.safetensors does not hold this tensor"):
        CheckpointReader(tmp_path)
    assert list(CheckpointReader(tmp_path, optional=("b", "c")).tensors) == ["a"]  # as of older transformers
    index(tmp_path, {"b": "x.safetensors"})
    with pytest.raises(
        GrowthError, match=r"where: a in .*\n  why: the tensor is in x.safetensors, but the index lists it in no file"
    ):
        CheckpointReader(tmp_path)


def test_pickles_are_not_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(GrowthError, match=r"only pickled weights \(pytorch_model.bin\)"):
        CheckpointReader(tmp_path)
