"""Ways to break a checkpoint folder, and what is said of each.

``BROKEN`` is name -> (what to do to a folder that transformers saved, part of the message of its refusal).
"""

import json
import os
import shutil
import struct

import torch
from safetensors.torch import load_file, save_file
from tiny_models import phi_config

SRC = phi_config(32, 4, 48, 2, 4)
FC1 = "model.layers.1.mlp.fc1.weight"


def weights(change):
    def break_it(src):
        tensors = load_file(src / "model.safetensors")
        change(tensors)
        save_file(tensors, src / "model.safetensors")

    return break_it


def cut(keep):
    def break_it(src):
        file = src / "model.safetensors"
        os.truncate(file, int(keep * file.stat().st_size) if isinstance(keep, float) else keep)

    return break_it


def header(change, extra=b""):
    """Change the header of the file; its values stay as they are."""

    def break_it(src):
        file = src / "model.safetensors"
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        content = json.loads(data[8 : 8 + length])
        text = change(content)
        text = json.dumps(content).encode() if text is None else text
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :] + extra)

    return break_it


def entry(**new):
    return header(lambda content: content[FC1].update(new))


def shift(begin, end):
    def change(content):
        offsets = content[FC1]["data_offsets"]
        offsets[0] += begin
        offsets[1] += end

    return header(change)


def index(weight_map):
    """An index beside the single file: text as it is, a function of the honest map, or a file for one tensor."""

    def break_it(src):
        (src / "model.safetensors").rename(src / "a.safetensors")
        honest = dict.fromkeys(load_file(src / "a.safetensors"), "a.safetensors")
        content = weight_map(honest) if callable(weight_map) else honest | {FC1: weight_map}
        text = content if isinstance(content, str) else json.dumps({"weight_map": content})
        (src / "model.safetensors.index.json").write_text(text)

    return break_it


def twice_in_files(src):
    index(lambda honest: honest | {FC1: "b.safetensors"})(src)
    save_file({FC1: load_file(src / "a.safetensors")[FC1]}, src / "b.safetensors")


def twice_in_index(honest):
    return (
        json.dumps({"weight_map": honest})
        .replace("{", f'{{"{FC1}": "a.safetensors", ', 2)
        .replace(f'{{"{FC1}": "a.safetensors", ', "{", 1)
    )


def link(name, target):
    def break_it(src):
        (src / name).unlink(missing_ok=True)
        (src / name).symlink_to(target)

    return break_it


def linked_shard(src):
    index("b.safetensors")(src)
    (src / "b.safetensors").symlink_to("../../other.safetensors")


def config(**new):
    def break_it(src):
        content = json.loads((src / "config.json").read_text())
        (src / "config.json").write_text(json.dumps(content | new))

    return break_it


def rotary(factor):
    """transformers 5 writes the factor inside, where it wins."""
    return config(rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": factor})


def config_bytes(data):
    return lambda src: (src / "config.json").write_bytes(data)


def config_is_a_folder(src):
    (src / "config.json").unlink()
    (src / "config.json").mkdir()


def two_sets(src):
    shutil.copyfile(src / "model.safetensors", src / "a.safetensors")
    honest = dict.fromkeys(load_file(src / "a.safetensors"), "a.safetensors")
    (src / "model.safetensors.index.json").write_text(json.dumps({"weight_map": honest}))


class Payload:
    """What a hostile pickle does: run a command of its own when it is read."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def pickled(content):
    def break_it(src):
        (src / "model.safetensors").unlink()
        torch.save(content, src / "pytorch_model.bin")

    return break_it


def old_names(tensors):
    for name in [name for name in tensors if "q_proj" in name]:
        new = name.replace("self_attn.q_proj", "mixer.Wqkv")
        tensors[new] = torch.cat([tensors.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"])


def value(number):
    return weights(lambda tensors: tensors[FC1].view(-1)[7:8].fill_(number))


def recast(dtype):
    return weights(lambda tensors: tensors.update({FC1: torch.zeros(48, 32, dtype=dtype)}))


LIES = "the safetensors header gives a tensor a wrong shape or position\n  where: model.layers.1.mlp.fc1.weight in "
UNREAD = "the safetensors header cannot be read\n  where: "
OUT = "a symbolic link leads out of its folder\n  where: "
BROKEN = {
    "truncated, empty": (cut(0), "the file is not a complete safetensors file"),
    "truncated in its length": (cut(7), "the file is not a complete safetensors file"),
    "truncated in its header": (cut(60), "the file is not a complete safetensors file"),
    "truncated in its values": (cut(0.5), "gives a tensor a wrong shape or position"),
    "truncated by a byte": (cut(0.999999), "gives a tensor a wrong shape or position"),
    "a placeholder": (
        lambda src: (src / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "or a placeholder (git lfs) for the real file",
    ),
    "a shape too large": (entry(shape=[4800, 32]), LIES),
    "a shape of a terabyte": (entry(shape=[1 << 30, 1 << 30]), LIES),
    "a shape that overflows 64 bits": (entry(shape=[1 << 62, 4]), LIES),
    "a shape of many axes": (entry(shape=[1] * 9), LIES),
    "a negative size": (entry(shape=[-48, -32]), LIES),
    "a fraction of a row": (entry(shape=[48.0, 32]), LIES),
    "true as a size": (entry(shape=[True, 1536]), LIES),
    "no shape": (entry(shape=None), LIES),
    "offsets past the end": (shift(10**9, 10**9), LIES),
    "offsets in reverse": (entry(data_offsets=[8, 0]), LIES),
    "three offsets": (entry(data_offsets=[0, 1, 2]), UNREAD),
    "no offsets": (header(lambda content: content[FC1].pop("data_offsets") and None), UNREAD),
    "an entry that is no object": (header(lambda content: content.update({FC1: 3})), UNREAD),
    "a number of 5000 digits": (header(lambda _: b'{"a": ' + b"9" * 5000 + b"}"), UNREAD),
    "a nesting bomb": (header(lambda _: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), UNREAD),
    "a header that is a list": (header(lambda _: b"[]      "), UNREAD),
    "a header in UTF-16": (header(lambda _: "{}".encode("utf-16")), UNREAD),
    "metadata of numbers": (header(lambda content: content.update(__metadata__={"a": 1})), UNREAD),
    "a tensor twice in a header": (
        header(lambda content: json.dumps(content).replace("{", f'{{"{FC1}": 0, ', 1).encode()),
        f"  why: the key '{FC1}' appears twice",
    ),
    "two tensors overlap in the file": (shift(-4, -4), "two tensors overlap in the file\n  where: "),
    "a hole": (shift(4, 4), "the safetensors file has a gap between its tensors\n  where: between "),
    "hidden bytes between": (
        header(lambda content: content.pop(FC1) and None),
        "the safetensors file has a gap between its tensors\n  where: between ",
    ),
    "hidden bytes behind": (header(lambda _: None, b"hidden"), "the safetensors file is longer than its tensors"),
    "rank 3": (entry(shape=[48, 16, 2]), "the tensor has shape [48, 16, 2], but the configuration gives it [48, 32]"),
    "a size of zero": (weights(lambda t: t.update({FC1: torch.zeros(0, 32)})), "the tensor has shape [0, 32], but"),
    "a tensor missing": (weights(lambda tensors: tensors.pop(FC1)), f"1 missing: {FC1}"),
    "a tensor too many": (weights(lambda t: t.update({"\x1b[2J": torch.ones(1)})), "1 unexpected: \\x1b[2J"),
    "an index that goes up": (index("../other.safetensors"), "the index of shards names a file outside its folder"),
    "an absolute index": (index("/etc/passwd.safetensors"), "the index of shards names a file outside its folder"),
    "an index to a pickle": (index("evil.bin"), "the index of shards names a file outside its folder"),
    "an index to a number": (index(3), "the index of shards names a file outside its folder"),
    "an index to no file": (index("b.safetensors"), "the file b.safetensors is missing"),
    "an index that misses a tensor": (
        index(lambda honest: {k: v for k, v in honest.items() if k != FC1}),
        f"the index of shards does not match its files\n  where: {FC1} in ",
    ),
    "an index that invents a tensor": (
        index(lambda honest: honest | {"more": "a.safetensors"}),
        "the index of shards does not match its files\n  where: more in ",
    ),
    "an index with a tensor twice": (index(twice_in_index), f"  why: the key '{FC1}' appears twice"),
    "a tensor in two files": (twice_in_files, f"two files hold the same tensor\n  where: {FC1} in "),
    "an index of nothing": (index(lambda _: {}), "the index of shards cannot be read"),
    "an index of pairs": (index(lambda honest: list(honest.items())), "the index of shards cannot be read"),
    "an index that is no JSON": (index(lambda _: "weights"), "the index of shards cannot be read"),
    "two sets of weights": (two_sets, "the folder holds two sets of weights"),
    "weights by a link": (link("model.safetensors", "../../other.safetensors"), OUT),
    "a shard by a link": (linked_shard, OUT),
    "an index by a link": (link("model.safetensors.index.json", "../../secret.json"), OUT),
    "a configuration by a link": (link("config.json", "/etc/hostname"), OUT),
    "a tokenizer by a link": (link("tokenizer.json", "../../secret.json"), OUT),
    "costs by a link": (link("training.json", "../../secret.json"), OUT),
    "a link in a circle": (link("tokenizer.json", "tokenizer.json"), "the path cannot be resolved"),
    "a malicious pickle": (
        pickled({"model.embed_tokens.weight": Payload()}),
        "the pickled weights cannot be read safely\n  where: src/pytorch_model.bin",
    ),
    "NaN": (value(float("nan")), f"the weights hold NaN or infinities\n  where: {FC1}"),
    "Inf": (value(float("-inf")), f"the weights hold NaN or infinities\n  where: {FC1}"),
    "weights in int8": (recast(torch.int8), f"the weights have dtype I8\n  where: {FC1} in "),
    "weights in uint8": (recast(torch.uint8), f"the weights have dtype U8\n  where: {FC1} in "),
    "weights in int64": (recast(torch.int64), f"the weights have dtype I64\n  where: {FC1} in "),
    "weights in float8": (recast(torch.float8_e4m3fn), f"the weights have dtype F8_E4M3\n  where: {FC1} in "),
    "booleans": (recast(torch.bool), f"the weights have dtype BOOL\n  where: {FC1} in "),
    "an unheard-of dtype": (entry(dtype="F31"), "the weights have dtype F31"),
    "a dtype that is no text": (entry(dtype=["F32"]), "the weights have dtype ['F32']"),
    "a negative hidden_size": (config(hidden_size=-32), "hidden_size is -32, but must be a positive whole number"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers is 0, but must be a positive whole number"),
    "half a head": (config(num_attention_heads=0.5), "num_attention_heads is 0.5, but must be a positive whole number"),
    "true heads": (
        config(num_attention_heads=True),
        "num_attention_heads is True, but must be a positive whole number",
    ),
    "negative groups": (
        config(num_key_value_heads=-2),
        "num_key_value_heads is -2, but must be a positive whole number",
    ),
    "sizes as text": (config(vocab_size="61"), "vocab_size is '61', but must be a positive whole number"),
    "sizes as lists": (
        config(intermediate_size=[48]),
        "intermediate_size is [48], but must be a positive whole number",
    ),
    "an absurd width": (config(hidden_size=1 << 40), f"hidden_size is {1 << 40}, but phigrow accepts at most"),
    "an absurd depth": (
        config(num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000, but phigrow accepts at most",
    ),
    "an absurd vocabulary": (config(vocab_size=10**12), "vocab_size is 1000000000000, but phigrow accepts at most"),
    "absurd sizes together": (
        config(hidden_size=1 << 20, num_attention_heads=1 << 10, num_hidden_layers=9999),
        "why: phigrow accepts at most 1e+14 parameters",
    ),
    "heads that do not divide": (
        config(hidden_size=33),
        "hidden_size is 33, which is not a multiple of num_attention_heads",
    ),
    "another head_dim": (config(head_dim=16), "head_dim is 16, but hidden_size / num_attention_heads is 8"),
    "a rotary part larger than the head": (rotary(1.5), "partial_rotary_factor is 1.5, but must be a"),
    "a rotary factor of 10^400": (rotary(10**400), "partial_rotary_factor is 1000"),
    "a rotary factor of 1e999": (
        config_bytes(json.dumps(SRC).replace('factor": 0.5', 'factor": 1e999').encode()),
        "partial_rotary_factor is inf, but must be a number from 0 to 1",
    ),
    "rotary settings as a list": (config(rope_parameters=[1]), "rope_parameters is [1], but must be an object"),
    "rope_theta as text": (
        config(rope_parameters={"rope_theta": "x"}),
        "rope_theta is 'x', but must be a positive number",
    ),
    "NaN as rope_theta": (
        config(rope_parameters={"rope_theta": float("nan")}),
        "the configuration cannot be read\n  where: src/config.json\n  why: not JSON: NaN is not a JSON number",
    ),
    "tied perhaps": (
        config(tie_word_embeddings="perhaps"),
        "tie_word_embeddings is 'perhaps', but must be true or false",
    ),
    "positions in the negative": (
        config(max_position_embeddings=-1),
        "max_position_embeddings is -1, but must be a positive",
    ),
    "a configuration of a number": (config_bytes(b"7"), "it holds a JSON int, not an object"),
    "a configuration that is not UTF-8": (
        config_bytes(b'{"model_type": "\xff"}'),
        "the configuration cannot be read",
    ),
    "a configuration cut short": (config_bytes(b'{"model_type": '), "the configuration cannot be read"),
    "a configuration that nests": (config_bytes(b'{"a":' * 50_000), "  why: its nesting is deeper than 64 levels"),
    "a configuration that nests a little": (
        config(x=json.loads("[" * 70 + "]" * 70)),
        "  why: its nesting is deeper than 64 levels",
    ),
    "half a character": (config(hidden_act="\ud800"), "surrogates not allowed"),
    "a key twice": (config_bytes(b'{"hidden_size": 1, "hidden_size": 2}'), "the key 'hidden_size' appears twice"),
    "no configuration": (lambda src: (src / "config.json").unlink(), "the folder has no config.json"),
    "a configuration that is a folder": (config_is_a_folder, "the folder has no config.json"),
    "another architecture": (config(model_type="gpt9"), "phigrow does not support model_type 'gpt9'"),
    "an architecture that is a list": (config(model_type=["phi"]), "phigrow does not support model_type ['phi']"),
    "remote code for an unknown model": (
        config(model_type="mine", auto_map={"AutoModelForCausalLM": "evil.Mine"}),
        "phigrow never runs code that comes with a checkpoint (auto_map)",
    ),
    "a first upload of phi-1_5": (
        config(model_type="mixformer-sequential", n_embd=2048, auto_map={"AutoConfig": "evil.Mine"}),
        "phigrow does not read the first phi uploads, which have model_type 'mixformer-sequential'",
    ),
    "a first upload of phi-2": (
        config(model_type="phi-msft", n_embd=2560),
        "use the repository's current revision (microsoft/phi-1, phi-1_5 and phi-2",
    ),
    "tensors of a first upload": (
        weights(old_names),
        "the tensors have the names of the first phi uploads: model.layers.0.mixer.Wqkv.weight",
    ),
    "a generation configuration that is no JSON": (
        lambda src: (src / "generation_config.json").write_text("?"),
        "the configuration cannot be read\n  where: src/generation_config.json",
    ),
    "costs that are no JSON": (
        lambda src: (src / "training.json").write_text("[1]"),
        "training.json cannot be read\n  where: src/training.json\n  why: it holds a JSON list",
    ),
}
