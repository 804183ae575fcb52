"""Problems that a user can mend, as opposed to bugs.

Everything raised as `UserError` ends the program with exit code 2 and one line per problem on stderr, without
a traceback. A problem may name the dotted config path it comes from; `trainer.config` knows the file and line
behind each path and adds them when the problem is shown.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Problem:
    """One line shown to the user: `origin: path: message`, where origin is `file:line` or the command line."""

    message: str
    path: str = ""
    origin: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.origin, self.path, self.message) if part)


class UserError(Exception):
    """Bad config, bad usage or bad data. Holds every problem found, not only the first.

    Args:
        problems: the problems; a plain string stands for a problem with that message.
        path: the dotted config path of problems given as plain strings, such as `data.train.args.root`.
        agreed: every rank raises this same error, so that showing it once is enough.
    """

    def __init__(self, *problems: Problem | str, path: str = "", agreed: bool = False) -> None:
        assert problems
        self.agreed = agreed
        self.problems = tuple(p if isinstance(p, Problem) else Problem(p, path) for p in problems)
        super().__init__("\n".join(map(str, self.problems)))


class BadSample(UserError):
    """A sample that cannot be used, though it could be read. Whoever knows its file names it: see `named`.

    Args:
        what: what is wrong, such as `has label 9; the model's are 0 to 2`.
        sample: its number, where that is known.
    """

    def __init__(self, what: str, sample: int | None = None) -> None:
        super().__init__(f"sample {sample} {what}" if sample is not None else f"a sample {what}")
        self.what = what
        self.sample = sample

    def named(self, name: str, path: str) -> UserError:
        """Returns the error with the sample's name in place of its number, at `path` of the config."""
        return UserError(f"{name} {self.what}", path=path)


def place_at(path: str, error: UserError) -> UserError:
    """Returns the error with `path` as the config path of every problem that names none."""
    return UserError(*(p if p.path else replace(p, path=path) for p in error.problems), agreed=error.agreed)


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the valid name most like `name`, or an empty string."""
    by_lower: dict[str, str] = {}
    for candidate in valid:
        by_lower.setdefault(candidate.lower(), candidate)
    match = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean '{by_lower[match[0]]}'?" if match else ""


def one_line_text(error: BaseException) -> str:
    """Returns what an exception says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def one_line(error: BaseException) -> str:
    """Returns `ValueError: text (file.py:12)`: an exception in one line, with the place it was raised."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' + text if text else ''}{place}"
