"""Command-line flags, each declared once: group, range, default, help, and what a resume does.

What differs from argparse: a flag also declares what happens when a resumed run has another value,
and whether `--test-only` takes its default from the checkpoint. Numbers have a range, and NaN and
infinity are in none.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from utils import UserError

# What a resume does if the flag differs from the checkpoint's.
REFUSE, LOG, IGNORE = "refuse", "log", "ignore"

LARGEST = 2**31 - 1  # limit of whole numbers, unless a flag sets another


class HelpFormatter(argparse.HelpFormatter):
    """Adds "(default: …)" to the help of a flag that has a default and is no switch."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = action.default not in (None, False, argparse.SUPPRESS)
        return f"{text} (default: %(default)s)" if shown else text


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, which also stores what a resume and `--test-only` do with each flag.

    Attributes:
        on_resume: by flag, one of `REFUSE`, `LOG` and `IGNORE`.
        remembered: the flags whose default `--test-only` takes from the checkpoint.
    """

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=HelpFormatter)
        self.groups: dict[str, list[argparse.Action]] = {}
        self.on_resume: dict[str, str] = {}
        self.remembered: list[argparse.Action] = []

    def error(self, message: str) -> NoReturn:
        """Raise a UserError instead of printing the usage; name the flag that was meant."""
        if unknown := re.match("unrecognized arguments: (--[^= ]+)", message):
            alike = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            message += f"; did you mean {alike[0]}?" if alike else ""
        raise UserError(f"{message} (--help lists all flags)")

    def group(
        self, title: str, on_resume: str = IGNORE, remember: bool = False
    ) -> Callable[..., None]:
        """Return the function that declares a flag of a group.

        It takes what `add_argument` takes, and `on_resume` and `remember` where a flag differs
        from its group.
        """
        group, default, is_remembered = self.add_argument_group(title), on_resume, remember

        def add(
            *names: str, on_resume: str = default, remember: bool = is_remembered, **options: Any
        ) -> None:
            action = group.add_argument(*names, **options)
            self.groups.setdefault(title, []).append(action)
            self.on_resume[action.dest] = on_resume
            if remember:
                self.remembered.append(action)

        return add

    def values(self, args: argparse.Namespace, title: str) -> dict[str, Any]:
        """Return the flags of a group by name."""
        return {action.dest: getattr(args, action.dest) for action in self.groups[title]}

    def defaults(self) -> dict[str, Any]:
        """Return the default of every flag by name."""
        return {name: self.get_default(name) for name in self.on_resume}

    def recall(self, saved: Mapping[str, Any], source: str) -> argparse.Namespace:
        """Return the remembered flags that a checkpoint saved, as defaults for `parse_args`.

        Raises:
            UserError: names `source` and the flag, if no command line gives a flag such a value.
        """
        recalled = argparse.Namespace()
        for action in self.remembered:
            value = saved.get(action.dest)
            if value is not None:
                words = value if action.nargs and isinstance(value, list) and value else [value]
                try:  # not `parse_args`, which would obey a value such as "--help"
                    value = self._get_values(action, [str(word) for word in words])
                except argparse.ArgumentError as error:
                    raise UserError(f"{source}: damaged, its flags: {error}") from None
                setattr(recalled, action.dest, value)
        return recalled


def _in_range(kind: type, words: str, fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    """Return an argparse type: a finite number of `kind` that `fits`, described by `words`."""
    noun = "a whole number" if kind is int else "a number"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}; give one {words}") from None
        if not math.isfinite(value) or not fits(value):
            raise argparse.ArgumentTypeError(f"{text} is out of range; give {noun} {words}")
        return value

    return parse


def positive(kind: type, at_most: float = LARGEST) -> Callable[[str], Any]:
    """Return an argparse type: a number greater than 0 and not over `at_most`."""
    words = "greater than 0" + (f", at most {at_most:,}" if at_most != LARGEST else "")
    return _in_range(kind, words, lambda value: 0 < value <= at_most)


def non_negative(kind: type, at_most: float = LARGEST) -> Callable[[str], Any]:
    """Return an argparse type: 0 or a greater number, not over `at_most`."""
    words = "of at least 0" + (f", at most {at_most:,}" if at_most != LARGEST else "")
    return _in_range(kind, words, lambda value: 0 <= value <= at_most)


def between(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """Return an argparse type: a number from `low` to `high`, both included."""
    return _in_range(kind, f"from {low:g} to {high:g}", lambda value: low <= value <= high)


def inside(low: float, high: float) -> Callable[[str], Any]:
    """Return an argparse type: a number between `low` and `high`, both excluded."""
    words = f"greater than {low:g} and less than {high:g}"
    return _in_range(float, words, lambda value: low < value < high)
