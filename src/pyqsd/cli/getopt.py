"""Command lines as GNU ``getopt_long`` reads them, with arguments returned in order (optstring ``-``).

Python's own parsers differ where scripts notice: ``--opt=value``, abbreviations, options that swallow the next word
whatever it looks like, words that are no options, ``--``, and the texts of the errors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """One option: its long name, whether it takes an argument, and its letter if it has one."""

    name: str
    has_argument: bool
    letter: str = ""


class Word(NamedTuple):
    """What was found: `name` is the long name, or "" for a word that is no option, or "?" for a mistake, whose text
    (after the program name) is then `value`. `spelling`: the words of the command line, for messages."""

    name: str
    value: str | None
    spelling: tuple[str, ...]


def parse(words: Sequence[str], options: Sequence[Option]) -> Iterator[Word]:
    """The options and arguments of `words` in order; ``--`` ends them."""
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == "--":
            return
        if word.startswith("--"):
            found, taken = _long(word, words[position:], options)
            yield found
            position += taken
        elif word.startswith("-") and len(word) > 1:
            rest = word[1:]
            while rest:
                letter, rest = rest[0], rest[1:]
                option = next((o for o in options if o.letter == letter), None)
                if option is None:
                    # (One byte of it: that is all that getopt looks at.)
                    byte = os.fsdecode(os.fsencode(letter)[:1])
                    yield Word("?", f"invalid option -- '{byte}'", ())
                elif not option.has_argument:
                    yield Word(option.name, None, ())
                elif rest:
                    yield Word(option.name, rest, (word,))
                    rest = ""
                elif position < len(words):
                    yield Word(option.name, words[position], (word, words[position]))
                    position += 1
                else:
                    yield Word("?", f"option requires an argument -- '{letter}'", ())
        else:
            yield Word("", word, (word,))


def _long(word: str, following: Sequence[str], options: Sequence[Option]) -> tuple[Word, int]:
    """The long option `word`, and how many of the `following` words it takes."""
    name, equals, value = word[2:].partition("=")
    exact = [o for o in options if o.name == name]
    matches = exact or [o for o in options if o.name.startswith(name)]
    if not matches:
        return Word("?", f"unrecognized option '{word}'", ()), 0
    if len(matches) > 1:
        possibilities = " ".join(f"'--{o.name}'" for o in matches)
        return Word("?", f"option '{word}' is ambiguous; possibilities: {possibilities}", ()), 0
    option = matches[0]
    if not option.has_argument:
        if equals:
            return Word("?", f"option '--{option.name}' doesn't allow an argument", ()), 0
        return Word(option.name, None, ()), 0
    if equals:
        return Word(option.name, value, (word,)), 0
    if following:
        return Word(option.name, following[0], (word, following[0])), 1
    return Word("?", f"option '--{option.name}' requires an argument", ()), 0
