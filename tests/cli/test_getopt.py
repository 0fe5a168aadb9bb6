"""GNU getopt_long's ways with a command line."""

from __future__ import annotations

import pytest

from pyqsd.cli.daemon import OPTIONS, program_name
from pyqsd.cli.getopt import Option, Word, parse


def found(*words: str) -> list[tuple[str, str | None]]:
    return [(word.name, word.value) for word in parse(words, OPTIONS)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], []),
        (["--blockdev", "x"], [("blockdev", "x")]),
        (["--blockdev=x"], [("blockdev", "x")]),
        (["--blockdev=x=y"], [("blockdev", "x=y")]),
        (["--blockdev="], [("blockdev", "")]),
        (["--b", "x"], [("blockdev", "x")]),
        (["--nbd", "x", "--nbd-s=y"], [("nbd-server", "x"), ("nbd-server", "y")]),
        (["--blockdev", "--version"], [("blockdev", "--version")]),
        (["--blockdev", "--"], [("blockdev", "--")]),
        (["-V", "-h"], [("version", None), ("help", None)]),
        (["-Vh"], [("version", None), ("help", None)]),
        (["-Tx"], [("trace", "x")]),
        (["-T", "x"], [("trace", "x")]),
        (["-T", "-V"], [("trace", "-V")]),
        (["-hTx", "y"], [("help", None), ("trace", "x"), ("", "y")]),
        (["x", "--daemonize", "y"], [("", "x"), ("daemonize", None), ("", "y")]),
        (["-", "--", "--foo"], [("", "-")]),
        (["--", "x"], []),
        (["--foo=bar"], [("?", "unrecognized option '--foo=bar'")]),
        (["--foo", "-V"], [("?", "unrecognized option '--foo'"), ("version", None)]),
        (["-xV"], [("?", "invalid option -- 'x'"), ("version", None)]),
        (["--blockdev"], [("?", "option '--blockdev' requires an argument")]),
        (["--daem=x"], [("?", "option '--daemonize' doesn't allow an argument")]),
        (["-T"], [("?", "option requires an argument -- 'T'")]),
    ],
)
def test_words(words: list[str], expected: list[tuple[str, str | None]]) -> None:
    assert found(*words) == expected


def test_spelling_is_kept_for_messages() -> None:
    assert [word.spelling for word in parse(["--b", "x", "--b=y", "-Tz", "-T", "q", "r"], OPTIONS)] == [
        ("--b", "x"),
        ("--b=y",),
        ("-Tz",),
        ("-T", "q"),
        ("r",),
    ]


def test_ambiguous() -> None:
    options = [Option("foobar", True), Option("foobaz", False), Option("foo", True)]
    assert list(parse(["--foob"], options)) == [
        Word("?", "option '--foob' is ambiguous; possibilities: '--foobar' '--foobaz'", ())
    ]
    # An exact name is never ambiguous.
    assert list(parse(["--foo=1"], options)) == [Word("foo", "1", ("--foo=1",))]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/usr/bin/pyqsd", "pyqsd"),
        ("./qemu-storage-daemon", "qemu-storage-daemon"),
        ("/x/__main__.py", "pyqsd"),
        ("", "pyqsd"),
    ],
)
def test_program_name(path: str, expected: str) -> None:
    assert program_name(path) == expected
