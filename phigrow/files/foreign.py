"""Recognise files that are no Hugging Face checkpoint, and name the command that turns them into one.

Everything is told from file names and first bytes: nothing is loaded, and no program is run. Errors about a missing
file ask `recognise`, errors about missing tensors `recognise_tensors`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from phigrow.errors import GrowthError

_LFS = b"version https://git-lfs"
_COPY = "and copy the model's config.json and tokenizer files into {out}"
_SHARD = re.compile(r"^(?P<stem>model|pytorch_model)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?P<end>safetensors|bin)$")


@dataclass(frozen=True)
class Foreign:
    """Files of another program, or of another step.

    Attributes:
        what: their kind; it ends the sentence ``it is ...``.
        fix: an action or a command for the user.
    """

    what: str
    fix: str

    def error(self, what: str, where: str) -> GrowthError:
        """Return an error that says both."""
        return GrowthError(what, where=where, why=f"it is {self.what}", fix=self.fix)


def recognise(path: Path) -> Foreign | None:
    """Return the kind of a folder or file that is no checkpoint; None if nothing about it is known."""
    try:
        if path.is_file():
            return _file(path)
        if not path.is_dir():
            return None
        return recognise_names(path, [entry.name for entry in path.iterdir()])
    except OSError:
        return None


def recognise_names(path: Path, names: Collection[str]) -> Foreign | None:
    """Return the kind of a folder, or of a repository on the hub, by the names of its files."""
    ordered = sorted(names)
    return next((found for each in _FOLDERS if (found := each(path, ordered)) is not None), None)


def _matching(names: Collection[str], pattern: str) -> list[str]:
    return [name for name in names if re.fullmatch(pattern, name)]


def _converted(path: Path) -> str:
    """Return the name of a folder for the result of a command."""
    return f"{path.resolve().name or 'model'}-hf"


def _transformers(path: Path, out: str, more: str = "", after: str = "") -> str:
    """Return a command that loads a model with transformers and saves it as safetensors."""
    return (
        f'python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{path}'{more}){after}.save_pretrained('{out}')\""
    )


def _file(path: Path) -> Foreign | None:
    with path.open("rb") as file:
        first = file.read(len(_LFS))
    folder = path.parent
    if first.startswith(b"GGUF"):
        return _gguf(folder, path.name)
    if first.startswith(_LFS):
        return _placeholder(path)
    if path.name.endswith((".safetensors", ".safetensors.index.json")) or path.name.startswith("pytorch_model"):
        return Foreign("one file of a checkpoint", f"give its folder, {folder}")
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        return pickled_elsewhere(path)
    if path.name.endswith(".json"):
        return Foreign("a configuration without weights", "give the folder of a checkpoint, with its weights")
    if path.name.endswith((".zip", ".tar", ".tar.gz", ".tgz")):
        return Foreign("an archive", f"unpack it: tar -xf {quote(str(path))} (or unzip), and give the folder inside")
    return None


def _own(path: Path, names: list[str]) -> Foreign | None:
    """Folders that phigrow wrote for other uses."""
    if {"run.json", "records.jsonl"} & set(names) or (path / "export" / "config.json").is_file():
        return _run(path, "the folder of a training run")
    if "complete.json" in names and {"zero", "state.json"} <= set(names):
        return Foreign(
            "an optimizer's state, which has no model",
            "give the folder of the weights, and this folder as init_optimizer of a run",
        )
    if "complete.json" in names and path.absolute().parent.name == "checkpoints":
        return _run(path.absolute().parents[1], "a checkpoint inside of a training run")
    if "data.json" in names:
        return Foreign("packed data", "give it as --data, and a checkpoint here")
    if "growth-maps.safetensors" in names:
        return Foreign("a folder of learned maps", "give it as --maps, and a checkpoint here")
    return None


def _run(path: Path, what: str) -> Foreign:
    if (path / "export" / "config.json").is_file():
        return Foreign(what, f"give {path / 'export'}")
    return Foreign(
        f"{what} that has no export", "repeat the command of the run with --export export, and give that folder"
    )


def _hub_cache(path: Path, names: list[str]) -> Foreign | None:
    snapshots = sorted((path / "snapshots").glob("*/config.json"))
    if not snapshots:
        return None
    return Foreign(
        "a repository in the cache of the hub", f"give the folder of a commit, such as {snapshots[-1].parent}"
    )


def _trainer(path: Path, names: list[str]) -> Foreign | None:
    numbers = [int(name.rpartition("-")[2]) for name in _matching(names, r"checkpoint-\d+")]
    newest = max((n for n in numbers if (path / f"checkpoint-{n}" / "config.json").is_file()), default=None)
    if newest is None:
        return None
    return Foreign(
        "the output of a Trainer, with a checkpoint in each subfolder", f"give {path / f'checkpoint-{newest}'}"
    )


def _adapter(path: Path, names: list[str]) -> Foreign | None:
    if "adapter_config.json" not in names and not _matching(names, r"adapter_model\..*"):
        return None
    out = _converted(path)
    return Foreign(
        "an adapter (PEFT), which has no weights of the model that it changes",
        f'merge it into its model: python -c "from peft import AutoPeftModelForCausalLM as M; '
        f"M.from_pretrained('{path}').merge_and_unload().save_pretrained('{out}')\", and give {out}",
    )


def _neox(path: Path, names: list[str]) -> Foreign | None:
    """The gpt-neox library, whose files are DeepSpeed's pipeline layers."""
    if not _matching(names, r"layer_\d+-model_\d+-model_states\.pt"):
        return None
    return Foreign(
        "a checkpoint of the gpt-neox library, in pipeline layers",
        "convert it with that library's tools/ckpts/convert_neox_to_hf.py, and give the result",
    )


def _deepspeed(path: Path, names: list[str]) -> Foreign | None:
    if _matching(names, r".*_(model|optim)_states\.pt"):
        tag, folder = path.resolve().name, path.resolve().parent
    elif tags := sorted(name for name in names if list((path / name).glob("*_model_states.pt"))):
        latest = path / "latest"
        named = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
        tag, folder = named if named in tags else tags[-1], path
    else:
        return None
    out = _converted(path)
    whole = folder / tag / "mp_rank_00_model_states.pt"
    if list((folder / tag).glob("*_optim_states.pt")):
        # Not with --safe_serialization, which fails where the head is tied.
        command = f"python -m deepspeed.utils.zero_to_fp32 {quote(str(folder))} {quote(out)} -t {quote(tag)}"
    else:
        command = (
            f'mkdir -p {quote(out)}; python -c "import torch; torch.save(torch.load('
            f"'{whole}', map_location='cpu', weights_only=True)['module'], '{out}/pytorch_model.bin')\""
        )
    return Foreign(
        "a checkpoint of DeepSpeed, in parts of its ranks",
        f"join the parts: {command}, {_COPY.format(out=out)}",
    )


def _distributed(path: Path, names: list[str]) -> Foreign | None:
    inner = next((name for name in names if list((path / name).glob("*.distcp"))), None)
    if not _matching(names, r".*\.distcp"):
        if inner is None:
            return None
        path = path / inner
    out = _converted(path)
    script = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
    return Foreign(
        "a distributed checkpoint of PyTorch (FSDP)",
        f"join its parts: mkdir -p {quote(out)}; {script} {quote(str(path))} {quote(out)}/pytorch_model.bin, "
        f"{_COPY.format(out=out)}",
    )


def _placeholders(path: Path, names: list[str]) -> Foreign | None:
    for name in _matching(names, r".*\.(safetensors|bin|gguf)"):
        if not (path / name).is_file():
            continue
        with (path / name).open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                return _placeholder(path / name)
    return None


def _placeholder(file: Path) -> Foreign:
    return Foreign(
        f"a placeholder of git lfs ({file.name}), without the file itself",
        f"run: git -C {quote(str(file.parent))} lfs pull",
    )


def _shards(path: Path, names: list[str]) -> Foreign | None:
    shards = [match for name in names if (match := _SHARD.match(name))]
    if not shards:
        return None
    first = shards[0]
    alike = [
        m["number"]
        for m in shards
        if (m["stem"], m["count"], m["end"]) == (first["stem"], first["count"], first["end"])
    ]
    what, count = f"a checkpoint in {int(first['count'])} shards", int(first["count"])
    missing = [f"{k:05}" for k in range(1, count + 1) if f"{k:05}" not in alike]
    index = f"{first['stem']}.{first['end']}.index.json"
    if missing:
        shard = f"{first['stem']}-{missing[0]}-of-{first['count']}.{first['end']}"
        return Foreign(
            f"{what} of which {len(missing)} are missing, such as {shard}", "download it again, with all files"
        )
    if index in names:
        return None
    names_of = "safe_open(f, 'numpy').keys()" if first["end"] == "safetensors" else "torch.load(f, weights_only=True)"
    library = "from safetensors import safe_open" if first["end"] == "safetensors" else "import torch"
    return Foreign(
        f"{what} without their index",
        f'make {index}: cd {quote(str(path))} && python -c "import glob, json, pathlib; {library}; '
        f"files = sorted(glob.glob('{first['stem']}-*.{first['end']}')); "
        f"pathlib.Path('{index}').write_text(json.dumps({{'metadata': {{}}, 'weight_map': "
        f'{{k: f for f in files for k in {names_of}}}}}))"',
    )


def _gguf_folder(path: Path, names: list[str]) -> Foreign | None:
    files = _matching(names, r".*\.gguf")
    return _gguf(path, files[0]) if files else None


def _gguf(folder: Path, name: str) -> Foreign:
    out = f"{Path(name).stem}-hf"
    return Foreign(
        "a GGUF file (llama.cpp), in most cases with rounded weights",
        "give the checkpoint from which it was made; or, for Llama and Qwen2, with the package gguf installed: "
        + _transformers(folder, out, f", gguf_file='{name}'"),
    )


def _meta(path: Path, names: list[str]) -> Foreign | None:
    if not _matching(names, r"consolidated.*\.(pth|safetensors)"):
        return None
    return Foreign(
        "a checkpoint in the format of its authors (consolidated)",
        "give the same model in transformers' format, in most cases the repository whose name ends in -hf",
    )


def _other_frameworks(path: Path, names: list[str]) -> Foreign | None:
    for file, framework, word in (("flax_model", "Flax", "from_flax"), ("tf_model", "TensorFlow", "from_tf")):
        if any(name.startswith(file) for name in names):
            out = _converted(path)
            return Foreign(
                f"a checkpoint of {framework}",
                f"convert it with transformers before version 5 and {framework}: "
                + _transformers(path, out, f", {word}=True"),
            )
    for ending, program in ((".onnx", "ONNX"), (".npz", "MLX or numpy"), (".mlpackage", "Core ML")):
        if any(name.endswith(ending) for name in names):
            return Foreign(f"a model for {program}", "give the checkpoint from which it was made")
    return None


def _lone_file(path: Path, names: list[str]) -> Foreign | None:
    files = _matching(names, r".*\.safetensors")
    if len(files) == 1 and files[0] != "model.safetensors":
        return Foreign(
            f"a checkpoint whose file has another name, {files[0]}",
            f"rename it: mv {quote(str(path / files[0]))} {quote(str(path / 'model.safetensors'))}",
        )
    return None


def _pickle_folder(path: Path, names: list[str]) -> Foreign | None:
    files = [
        name for name in _matching(names, r".*\.(pt|pth|ckpt|bin)") if name not in ("training_args.bin", "scheduler.pt")
    ]
    files = [name for name in files if not name.startswith(("optimizer", "rng_state", "pytorch_model"))]
    return pickled_elsewhere(path / files[-1]) if files else None


def pickled_elsewhere(file: Path) -> Foreign:
    """Return the kind of a pickle that transformers does not read, such as one with the weights inside of a dict."""
    name, folder, out = file.name, file.parent, _converted(file.parent)
    keys = "c.get('state_dict', c.get('model_state_dict', c.get('model', c)))"
    return Foreign(
        f"a pickle of PyTorch that transformers does not read, {name}",
        f'take the weights out of it: mkdir -p {quote(out)}; python -c "import torch; '
        f"c = torch.load('{folder / name}', map_location='cpu', weights_only=True); "
        f"torch.save({keys}, '{out}/pytorch_model.bin')\", {_COPY.format(out=out)}",
    )


def _tokenizer(path: Path, names: list[str]) -> Foreign | None:
    has_weights = _matching(names, r".*\.(safetensors|bin|pt|pth|gguf)")
    if (
        {"tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model"} & set(names)
        and not has_weights
        and "config.json" not in names
    ):
        return Foreign("a tokenizer without a model", "give the folder of a checkpoint, with config.json and weights")
    return None


_FOLDERS: tuple[Callable[[Path, list[str]], Foreign | None], ...] = (
    _own, _hub_cache, _adapter, _neox, _distributed, _deepspeed, _placeholders, _shards, _trainer, _gguf_folder, _meta,
    _other_frameworks, _lone_file, _pickle_folder, _tokenizer,
)  # fmt: skip
"""Kinds of folders, the surest first."""

WRAPPERS = {
    "module": "DistributedDataParallel or DeepSpeed",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "base_model.model": "PEFT",
}
"""Part of a tensor's name -> the wrapper that adds it."""


def recognise_tensors(names: Collection[str], expected: Collection[str], where: str) -> Foreign | None:
    """Return the kind of tensors whose names are not those of a model; None if nothing about them is known.

    Args:
        names: of the tensors.
        expected: the names that the model's tensors have.
        where: the folder, or another place.
    """
    out = _converted(Path(where)) if Path(where).is_dir() else "OUT"
    if any(re.search(r"\.lora_(A|B|embedding_A|embedding_B)\b|\.base_layer\.", name) for name in names):
        return Foreign(
            "a model with an adapter (PEFT) that was not merged",
            "merge it before saving: model.merge_and_unload().save_pretrained(OUT)",
        )
    if any(name.endswith((".qweight", ".qzeros", ".SCB", ".absmax", ".weight_scale", ".scales")) for name in names):
        return Foreign("a quantised model", "give the checkpoint from which it was made")
    if {"tok_embeddings.weight", "output.weight"} <= set(names):
        return _meta(Path(where), ["consolidated.pth"])
    wanted = set(expected)
    if parts := _wrapper_parts(names, wanted):
        labels = [WRAPPERS.get(part, "another program") for part in parts]
        return Foreign(
            f"a model inside of a wrapper ({', '.join(labels)}), which adds {', '.join(f'{part}.' for part in parts)} "
            "to names",
            "save the model inside of the wrapper, or rename its tensors: " + _rename(Path(where), _pattern(parts), out)
            if Path(where).is_dir()
            else "give the model inside of the wrapper (model.module, model._orig_mod, model.merge_and_unload())",
        )
    return _other_head(set(names), wanted, where, out)


def _pattern(parts: list[str]) -> str:
    """Return a regular expression of the parts that wrappers add to names; no shell changes its characters."""
    known = [part.replace(".", "[.]") for part in parts if part in WRAPPERS]
    others = ["^" + (f"(?:(?:{'|'.join(known)})[.])*" if known else "") + p for p in parts if p not in WRAPPERS]
    return "|".join(f"{part}[.]" for part in [*others, *known])


def _rename(folder: Path, pattern: str, out: str) -> str:
    """Return a command that writes the weights of a folder again, with what a pattern matches left out of names."""
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        library, load, files = (
            "import torch",
            "torch.load(f, map_location='cpu', weights_only=True)",
            "pytorch_model*.bin",
        )
        save = "torch.save(t, 'OUT/pytorch_model.bin')"
    else:
        library, load = "from safetensors.torch import load_file, save_file", "load_file(f)"
        files, save = "*.safetensors", "save_file(t, 'OUT/model.safetensors', {'format': 'pt'})"
    return (
        f'mkdir -p {quote(out)}; python -c "import glob, re; {library}; '
        f"t = {{re.sub('{pattern}', '', k): v for f in glob.glob('{folder}/{files}') for k, v in {load}.items()}}; "
        f'{save.replace("OUT", out)}", {_COPY.format(out=out)}'
    )


def _wrapper_parts(names: Collection[str], wanted: set[str]) -> list[str]:
    """Return the parts that a wrapper adds to names; empty if names without them are not those of the model."""
    stripped = set(names)
    parts: list[str] = []
    for part in WRAPPERS:
        marked = {name: re.sub(rf"(^|\.){re.escape(part)}\.", r"\1", name) for name in stripped}
        if any(before != after for before, after in marked.items()):
            parts.append(part)
            stripped = set(marked.values())
    if len(stripped & wanted) > len(wanted) // 2:
        return parts
    for prefix in _prefixes(stripped, wanted):
        if sum(name.removeprefix(prefix) in wanted for name in stripped) > len(wanted) // 2:
            return [*parts, prefix.rstrip(".")]
    return []


def _prefixes(names: set[str], wanted: set[str]) -> Iterator[str]:
    """Yield what stands before the first of the wanted names."""
    first = min(wanted)
    for name in sorted(names):
        if name.endswith(f".{first}"):
            yield name[: -len(first)]


def _other_head(names: set[str], wanted: set[str], where: str, out: str) -> Foreign | None:
    missing, extra = wanted - names, names - wanted
    if not extra and missing in ({"lm_head.weight"}, {"embed_out.weight"}):
        return Foreign(
            "a model whose head was not saved, as writers do where the head is the embedding",
            "set tie_word_embeddings: true in config.json if it is; give another checkpoint if it is not",
        )
    roots = {name.split(".")[0] for name in wanted}
    without_root = {name.partition(".")[2] for name in wanted if name.partition(".")[0] in roots}
    if missing and len(names & without_root) == len(names) > len(wanted) // 2:
        head = sorted(name for name in wanted if name.partition(".")[2] not in names)
        if not head or all(name.startswith(("lm_head", "embed_out")) for name in head):
            return Foreign(
                "a model without a head (AutoModel)",
                "give a causal language model. If its head is tied: " + _transformers(Path(where), out),
            )
    heads = sorted(name for name in extra if re.match(r"(score|classifier|v_head|qa_outputs|value_head)\.", name))
    if heads:
        return Foreign(
            f"a model of another task, with {heads[0]}",
            "give a causal language model" + ("" if missing else f", without {', '.join(heads)}"),
        )
    return None
