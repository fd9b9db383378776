"""Command lines: a wrong one ends like any wrong configuration (exit status 64), and is told what was meant."""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from helixflow.errors import EX_USAGE
from helixflow.terminal import say

_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)")
_UNKNOWN = "unrecognized arguments: "


class Parser(argparse.ArgumentParser):
    """As argparse's own, but for errors. Values that it does not know are not repeated: one may be a password."""

    def error(self, message: str) -> NoReturn:
        """Writes the usage and what is wrong to standard error, and exits with status 64."""
        before, unknown, words = message.partition(_UNKNOWN)
        if unknown:
            names = [word.partition("=")[0] for word in words.split() if word.startswith("-")]
            hints = "".join(meant(name, _options(self)) for name in names)
            message = f"{before}{unknown}{' '.join(names) or 'too many'} (values are not shown){hints}"
        choice = _CHOICE.search(message)
        if choice:
            message += meant(choice[1], re.findall(r"'([^']*)'", choice[2]))
        self.exit(EX_USAGE, f"{self.format_usage()}{self.prog}: error: {message}\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """What was typed may have been pasted from somebody: it steers no terminal."""
        if message:
            say(message, file=file or sys.stderr, end="")


def meant(word: str, known: Iterable[str]) -> str:
    """`; did you mean …?` for the one that is like it, or begins so; empty when none is."""
    names = list(known)
    found = [name for name in names if word and name.startswith(word)] or difflib.get_close_matches(word, names, 1)
    return f"; did you mean {found[0]}?" if found else ""


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The options of a parser and of all its commands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _options(command)
