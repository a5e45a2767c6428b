"""Read YAML by the rules of YAML 1.2, in which `no` is a word, `0100` is a hundred and a key stands once."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.errors import GrowthError

if TYPE_CHECKING:
    import yaml

SCHEMA = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
"""Core schema of YAML 1.2, and merging: for each tag its words and their first letters. All other words are texts."""

TAG = "tag:yaml.org,2002:"


@functools.cache
def _loader() -> type[yaml.SafeLoader]:
    """Return a loader of plain data by YAML 1.2. It refuses a key that stands twice; keys are texts as written."""
    import yaml  # not at the top: importing phigrow stays light

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - none of YAML 1.1

        def __init__(self, stream: str) -> None:
            super().__init__(stream)
            self.checked: set[int] = set()

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            # Flattening puts the keys of merged mappings into a node, so its own keys are checked before, and once.
            if id(node) not in self.checked:
                self.checked.add(id(node))
                check_keys(node)
            super().flatten_mapping(node)

    def check_keys(node: yaml.MappingNode) -> None:
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is no text", problem_mark=key.start_mark)
            if key.tag == f"{TAG}merge":
                continue
            if key.value in first:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands twice, in line {first[key.value]} too",
                    problem_mark=key.start_mark,
                )
            first[key.value] = key.start_mark.line + 1
            key.tag = f"{TAG}str"

    def whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
        text = str(loader.construct_scalar(node))
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text[2:] if base != 10 else text, base)

    for name, (pattern, letters) in SCHEMA.items():
        Loader.add_implicit_resolver(TAG + name, re.compile(f"^(?:{pattern})$"), letters)
    Loader.add_constructor(f"{TAG}int", whole_number)
    return Loader


@functools.cache
def _dumper() -> type[yaml.SafeDumper]:
    """Return a writer that quotes each text that YAML 1.1 or 1.2 would read as something else."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    for name, (pattern, letters) in SCHEMA.items():
        Dumper.add_implicit_resolver(TAG + name, re.compile(f"^(?:{pattern})$"), letters)
    return Dumper


def dump_yaml(content: Any) -> str:
    """Return content as YAML that `parse_yaml` reads back unchanged. The keys of its mappings are texts.

    >>> dump_yaml({"arm": "1e5", "lr": 0.001})
    "arm: '1e5'\\nlr: 0.001\\n"
    """
    import yaml

    return str(yaml.dump(content, Dumper=_dumper()))


def parse_yaml(text: str, where: str) -> Any:
    """Return the content of a YAML text.

    Keys are texts as they are written: `1.0` and `1.00` are two arms.

    Raises:
        GrowthError: the text is not YAML, or a key stands twice.

    >>> parse_yaml("{lr: 1e-05, arms: {no: 0100}}", "an example")
    {'lr': 1e-05, 'arms': {'no': 100}}
    """
    import yaml

    try:
        return yaml.load(text, Loader=_loader())  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{where}, line {mark.line + 1}" if mark else where
        raise GrowthError(
            "this is not valid YAML", where=at, why=error.problem or str(error), fix="correct this line"
        ) from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        # The last four come from tags that do not fit their value, and from very deep nesting.
        raise GrowthError(
            "this is not valid YAML", where=where, why=str(error), fix="save it as plain UTF-8 text, without tags"
        ) from error


def read_yaml(path: Path, name: str, instead: str) -> Any:
    """Return the content of a YAML file.

    Args:
        path: of the file.
        name: of its kind, for messages: ``recipe``.
        instead: what to give where there is no such file.

    Raises:
        GrowthError: there is no such file, it cannot be read, or it is not valid YAML.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise GrowthError(f"there is no such {name}", where=str(path.absolute()), fix=instead) from error
    except (OSError, UnicodeDecodeError) as error:
        raise GrowthError(
            f"the {name} cannot be read", where=str(path), why=str(error), fix="give a readable file of UTF-8 text"
        ) from error
    return parse_yaml(text, str(path))
