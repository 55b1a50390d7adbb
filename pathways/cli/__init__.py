"""The `pathways` command. Light to import: a command's own module is loaded when it runs."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from pathways.allocator import reuse_memory
from tasks.errors import UserError

USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status.

    0 all well; 1 something is wrong with the data or the machine; 2 a mistake of the user; 130 Ctrl-C; 128 + n stopped
    by signal n after saving.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    # Before jax is imported: what XLA and its helpers log is of no use to a user.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if argv is None:  # a program of its own, not a call from one
        reuse_memory()
    try:
        return _run(words)
    except UserError as error:
        return _tell(str(error), USER_ERROR, debug)
    except KeyboardInterrupt:
        return _tell("stopped", INTERRUPTED, debug)
    except BrokenPipeError:
        # Nobody reads any more: what is buffered must not be flushed into the pipe at exit.
        if argv is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        where = f"\n  where:    {error.filename}" if error.filename else ""
        return _tell(f"The system refused: {error.strerror or error}{where}", 1, debug)
    except Exception as error:
        status = _stopped_by(error)
        if status is None:
            raise
        return _tell(f"{error}\n  fix:      run the same command again to go on", status, debug)


def _run(words: list[str]) -> int:
    from pathways.cli.parser import parse

    try:
        args = parse(words)
    except SystemExit as done:  # after --help and --version
        return int(done.code or 0)
    from pathways.cli.commands import COMMANDS

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        warnings.showwarning = _show_warning
        status = COMMANDS[args.command](args)
    sys.stdout.flush()
    return status or 0


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _stopped_by(error: Exception) -> int | None:
    """128 + the signal, if this is training's own word for having stopped and saved."""
    loop = sys.modules.get("pathways.training.loop")
    if loop is not None and isinstance(error, loop.Interrupted):
        return 128 + int(getattr(error, "number", 0))
    return None


def _tell(text: str, status: int, debug: bool) -> int:
    """Prints an error on standard error, its first line in red on a terminal."""
    if debug:
        traceback.print_exc()
    first, newline, rest = text.partition("\n")
    red = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    first = f"\033[1;31m{first}\033[0m" if red else first
    print(f"{first}{newline}{rest}", file=sys.stderr)
    return status
