"""The one exception that users are meant to read.

Everything that bad input, a bad setting or a bad stored object can cause is raised as `UserError` with one line that
names the object, what was expected, what was found and what to do next. The command line prints that line and exits
with `exit_code`; any other exception is a defect of Glidepath and keeps its traceback.
"""

from __future__ import annotations

import re
from typing import Any

CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


class UserError(Exception):
    """A refusal in one line: object, expected, found, next step. `exit_code` is 1 (failed)."""

    exit_code = 1

    def __init__(self, name: str, expected: str, found: str, next_step: str) -> None:
        self.name, self.expected, self.found, self.next_step = name, expected, found, next_step
        # A name out of an input may hold line breaks, and what a terminal takes for commands.
        super().__init__(CONTROLS.sub(" ", f"{name}: expected {expected}, found {found}; {next_step}"))

    def fields(self) -> tuple[str, str, str, str]:
        """What `UserError(...)` takes, to say the same in another process."""
        return self.name, self.expected, self.found, self.next_step

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is rebuilt from its message alone, which would break the pool that carries it.
        return _rebuild, (type(self), *self.fields())


def _rebuild(kind: type[UserError], *fields: str) -> UserError:
    error = kind.__new__(kind)
    UserError.__init__(error, *fields)
    return error


class UsageError(UserError):
    """The command or its configuration is wrong; nothing was started. `exit_code` is 2 (usage)."""

    exit_code = 2
