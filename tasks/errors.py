"""The one error a user's mistake may raise: it says where, what was expected, what came and what to do."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a file, a flag or a configuration, told so that it can be mended.

    Commands print it and exit with status 2; they never show a traceback for it.

    Args:
        problem: what is wrong, in one sentence.
        where: the file, line, column, key or flag.
        expected: what would have been right.
        got: what came instead.
        fix: what to do now.
    """

    def __init__(
        self,
        problem: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        got: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.problem, self.where, self.expected, self.got, self.fix = problem, where, expected, got, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        parts = [("where", self.where), ("expected", self.expected), ("got", self.got), ("fix", self.fix)]
        lines = [f"  {label + ':':<10}{text}" for label, text in parts if text]
        return "\n".join([self.problem, *lines])
