"""Methods from outside of phigrow: from a Python file, from an object, or from an installed package.

A file is the user's own code. It runs only where the user names its path: on the command line, in a call, or in a YAML
file of the user's. The files of a checkpoint never name code to run: plans hold the hash of a method's file, not its
path.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.paths import user_path
from phigrow.growth.method import SETTINGS, Method, MethodError, MethodSource, Option
from phigrow.growth.methods import built_in_methods
from phigrow.growth.methods.depth import DEPTHS

SUFFIX = ".py"
"""End of a path by which ``--method`` tells a file from a name."""

RESERVED = ("scratch", "continued", "flat")
"""Names of arms that grow by no method."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_OPTION = re.compile(r"[a-z][a-z0-9_]*")


def is_method_file(name: str) -> bool:
    """Return True if the name of a method is the path of a Python file.

    >>> is_method_file("my_method.py"), is_method_file("tile")
    (True, False)
    """
    return name.endswith(SUFFIX)


def load_method_file(path: str | Path) -> Method:
    """Run a Python file and return the one method that it defines.

    The file runs once for each content that it has.

    Raises:
        GrowthError: there is no such file; it cannot be compiled or run, or imports a missing package; it defines no
            method, or several; or its method is declared wrongly. The message has the file and the line.
    """
    file = user_path(path)
    try:
        source = file.read_bytes()
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError)
        raise GrowthError(
            "there is no such method file" if is_missing else "the method file cannot be read",
            where=str(file.absolute()),
            why=None if is_missing else error.strerror,
            fix="check the path; a method file is a Python file that defines one phigrow.methods.Method",
        ) from error
    digest = hashlib.sha256(source).hexdigest()
    module = _run(file.absolute(), digest, source)
    found = {
        id(value): (name, value)
        for name, value in vars(module).items()
        if isinstance(value, Method) and not value.sources and not _is_built_in(value)
    }
    lines = _assigned(source)
    if len(found) != 1:
        several = " and ".join(f"{name} (line {lines.get(name, '?')})" for name, _ in found.values())
        raise GrowthError(
            "the method file defines several methods" if found else "the method file defines no method",
            where=str(file),
            why=f"it has {several}" if found else "no name in it holds a phigrow.methods.Method",
            fix="keep one, and move the others to files of their own" if found else "write METHOD = Method(...) in it",
        )
    ((name, method),) = found.values()
    check_declaration(method, f"{file}:{lines.get(name, 1)}")
    return replace(method, sources=(MethodSource(method.name, file, digest),))


def with_source(method: Method) -> Method:
    """Return a method that was given as an object, with the hash of the file that defines it.

    The hash is that of the file's content now. A method of an interactive session has none.

    Raises:
        GrowthError: the method is declared wrongly.
    """
    if method.sources or _is_built_in(method):
        return method
    path = _file_of(method)
    where = f"{path}:{_line_of(method.axis_maps)}" if path else f"the method {method.name!r}"
    check_declaration(method, where)
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path else None
    return replace(method, sources=(MethodSource(method.name, path, digest),))


def _is_built_in(method: Method) -> bool:
    return any(method is each for each in built_in_methods().values())


@cache
def _run(path: Path, digest: str, source: bytes) -> types.ModuleType:
    """Run the source of a method file as a module of its own."""
    module = types.ModuleType(f"phigrow_method_{digest[:16]}")
    module.__file__ = str(path)
    try:
        code = compile(source, str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        text = (getattr(error, "text", None) or "").strip()
        raise GrowthError(
            "the method file is not valid Python",
            where=f"{path}:{line}",
            why=f"{getattr(error, 'msg', error)}{f': {text}' if text else ''}",
            fix="correct this line",
        ) from error
    sys.modules[module.__name__] = module
    try:
        exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise _failed(error, path, "the method file stopped with an error") from error
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def _failed(error: BaseException, path: Path, what: str) -> GrowthError:
    """Describe an exception of the user's code by the last line of the file that it passed through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f"{path}:{lines[-1]}" if lines else str(path)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return MethodError(
            f"the method file imports {package}, which is not installed",
            where=where,
            why="a method is one file: modules beside it are not found",
            fix=f"install it (pip install {package}), or move its code into the file",
        )
    return MethodError(what, where=where, why=f"{type(error).__name__}: {error}", fix="correct this line")


@cache
def _assigned(source: bytes) -> dict[str, int]:
    """Return name -> line of every assignment at the top level of a file."""
    lines: dict[str, int] = {}
    for node in ast.parse(source).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        lines |= {target.id: node.lineno for target in targets if isinstance(target, ast.Name)}
    return lines


def _functions(method: Method) -> Iterator[Callable[..., Any]]:
    """Yield the functions of a method; the first is in the file that defines it, most often."""
    for function in (method.axis_maps, method.approximations, method.layers, method.notes, method.own_noise):
        if function is not None:
            yield function


def _file_of(method: Method) -> Path | None:
    """Return the file of the first function of a method that is not phigrow's own; None if there is none."""
    for function in _functions(method):
        if (function.__module__ or "").partition(".")[0] == "phigrow":
            continue
        try:
            file = inspect.getsourcefile(inspect.unwrap(function))
        except TypeError:  # a callable object
            continue
        if file is not None and Path(file).is_file():
            return Path(file)
    return None


def _line_of(function: Callable[..., Any]) -> int:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_firstlineno if code is not None else 1


def place_of(method: Method, function: Callable[..., Any]) -> str:
    """Return the file and the line of one of a method's functions, for messages."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None or not Path(code.co_filename).is_file():
        return f"method {method.name}"
    return f"{code.co_filename}:{code.co_firstlineno}"


def call(method: Method, function: Callable[..., Any], *given: Any) -> Any:
    """Call a function of a method.

    Raises:
        GrowthError: the method refuses the growth.
        MethodError: it stopped with another exception, and its file is known; the message has the line.
    """
    try:
        return function(*given)
    except GrowthError:
        raise
    except Exception as error:
        path = next((source.path for source in method.sources if source.path is not None), None)
        if path is None:
            raise
        raise _failed(error, path.absolute(), f"method {method.name} stopped with an error") from error


def check_declaration(method: Method, where: str) -> None:
    """Check the fields of a method from outside of phigrow.

    Raises:
        GrowthError: a name that is taken or cannot be typed, a field of the wrong type, an unknown depth method, or an
            option with the name of another setting.
    """

    def refuse(what: str, fix: str, why: str | None = None) -> GrowthError:
        return GrowthError(what, where=where, why=why, fix=fix)

    name = method.name
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise refuse(f"a method cannot be named {name!r}", "use letters, digits, _ and -, and begin with a letter")
    if name in built_in_methods() or name in RESERVED:
        why = "it names an arm that grows by no method" if name in RESERVED else "phigrow has a method of this name"
        raise refuse(f"the name {name!r} is taken", "give the method another name", why)
    if not isinstance(method.summary, str) or not method.summary:
        raise refuse(f"method {name} has no summary", "give summary: the grown weights in one line")
    for field in ("axis_maps", "approximations", "notes", "layers", "own_noise"):
        value = getattr(method, field)
        if not callable(value) and not (value is None and field in ("layers", "own_noise")):
            raise refuse(f"{field} of method {name} is {value!r}", f"give a function as {field}")
    if method.depth not in DEPTHS:
        raise refuse(
            f"method {name} has the unknown depth method {method.depth!r}", f"choose one of {', '.join(DEPTHS)}"
        )
    if method.noise_on not in ("copies", "pairs", "all"):
        raise refuse(f"noise_on of method {name} is {method.noise_on!r}", "choose copies, pairs or all")
    if method.learns:
        raise refuse(
            f"method {name} cannot learn maps", "leave learns out",
            "phigrow learn-growth trains the maps of ligo only",
        )  # fmt: skip
    for option, declared in method.options.items():
        if not isinstance(declared, Option):
            raise refuse(f"option {option!r} of method {name} is {declared!r}", "declare it as phigrow.methods.Option")
        if not isinstance(option, str) or not _OPTION.fullmatch(option) or option in SETTINGS:
            raise refuse(
                f"an option of method {name} cannot be named {option!r}",
                "use small letters, digits and _, and none of " + ", ".join(SETTINGS),
            )
