"""A command line into a dataclass, by tyro; a mistake becomes one line that names it and the nearest right name."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from worldenv.nouns import no_such

T = TypeVar("T")


def value_of(argv: Sequence[str], flag: str) -> str | None:
    """The value after the last `flag` in `argv` (`--flag value` or `--flag=value`), which is the one that counts in tyro too, or None."""
    found = None
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            found = argv[i + 1]
        elif word.startswith(f"{flag}="):
            found = word.removeprefix(f"{flag}=")
    return found


def parse(program: str, kind: type[T], default: T | None, argv: Sequence[str]) -> T:
    """`argv` as a `kind`, from `default`; None: it has arguments that must be given.

    Raises ValueError with one line for an unknown flag or a bad value; --help prints and exits with 0.
    """
    options = (tyro.conf.FlagCreatePairsOff,)
    begun: dict[str, Any] = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found: T = tyro.cli(kind, prog=program, args=list(argv), config=options, **begun)
    except SystemExit as stop:
        if stop.code:
            raise ValueError(_line(said.getvalue(), program, argv)) from None
        raise
    return found


def _line(box: str, program: str, argv: Sequence[str]) -> str:
    """tyro's message in one line, without the box around it; of an unknown flag or a wrong choice, with the nearest right one; of a value of another
    type, with the type that is wanted."""
    words = re.sub(r"\s+", " ", re.sub(r"[^\x20-\x7e]+|-{5,}", " ", box)).strip()
    if unknown := re.search(r"Unrecognized options: ([^\s,=]+)", words):
        stray = unknown.group(1) in argv
        if not stray and (valued := [word for word in argv if word.startswith("--") and word.endswith(f"={unknown.group(1)}")]):
            return f"{valued[0]}: this flag takes no value; want {valued[0].partition('=')[0]} alone"
        meant = re.search(r"Perhaps you meant: (--[^\s,]+)", words)
        cure = f"; did you mean {meant.group(1)!r}?" if meant else "."
        return f"unknown flag {unknown.group(1)!r}{cure} All flags: {program} --help"
    if refused := re.fullmatch(r"Value error Error parsing [\w.]+: (.*) For full helptext, see .*", words):
        return refused.group(1)
    if wrong := re.search(r"Error parsing (\S+): (.*?) Argument helptext: ", words):
        flag, reason = wrong.groups()
        values = re.findall(r"'[^']*'", (re.search(r"\[.*?\]", reason) or wrong)[0])
        kind = re.search(r"\b(int|float)\b", words, re.IGNORECASE)
        if kind is None:
            return f"{flag}: {reason}"
        what = "whole number" if kind[0].lower() == "int" else "number"
        return f"{flag} {' '.join(values)}: want {f'{what}s' if len(values) > 1 else f'a {what}'}"
    if missing := re.search(r"Missing value for argument '(.*?)'\. Expected (\d+)", words):
        return f"{missing.group(1)}: want {missing.group(2)} value{'s' if missing.group(2) != '1' else ''} after it"
    choice = re.search(r"invalid choice '(.*?)' for argument '(.*?)'\. Expected one of \((.*?)\)", words)
    if choice is None:
        return words
    given, flag, names = choice.group(1), choice.group(2), sorted(set(re.findall(r"'(.*?)'", choice.group(3))) - {"None"})
    return str(no_such(flag, given, names))
