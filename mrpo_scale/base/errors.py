"""The errors a user can cause. Each names the key, the value it got and the remedy, and is raised before weights load."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """A recipe, a data set or a model folder cannot be used as given. The command line prints it as one line and exits with 2."""


class TrainingError(RuntimeError):
    """A run that must not go on, such as a loss that is not finite. Raised on every rank."""


def refuse(problems: Sequence[str]) -> None:
    """All that is wrong, in one line: a person who mends one thing a start waits for each of the others.

    Raises:
        ConfigError: there is a problem.
    """
    if problems:
        line = "; ".join(problem.rstrip(".") for problem in problems)
        raise ConfigError(line if line.endswith("?") else f"{line}.")


def one_line(error: BaseException) -> str:
    """An error of somebody else's, to be quoted in one of ours."""
    return " ".join(str(error).split())


EXIT_STATUS = 75  #: EX_TEMPFAIL of sysexits.h: try again; `accelerate launch` makes 1 of it


class Preempted(SystemExit):
    """The run was asked to stop and has saved what it needs to go on. Not caught, it ends the process with ``EXIT_STATUS``."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_STATUS)
        self.message = message

    def __str__(self) -> str:
        return self.message
