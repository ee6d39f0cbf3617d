"""Entry point of the jobs: user errors exit with code 2 and a message, Ctrl-C with 130; defects keep a traceback."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from raycluster.types import RunStopped, UserError


def run_command(main: Callable[..., Any], arguments: Sequence[str] | None = None) -> None:
    """Call ``main`` with the command line (or ``arguments``), and exit.

    Exit codes: 0 for success. 2 for a UserError, printed to stderr, and for a wrong number of arguments, which prints
    the docstring of the module of ``main`` as ``--help`` does. 130 for an interruption. 141 for a closed output pipe.
    Always raises SystemExit, except that other exceptions propagate.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(words):
        print(_usage(main))
        sys.exit(0)
    if not _accepts(main, words):
        print(_usage(main), file=sys.stderr)
        sys.exit(2)
    sys.exit(_exit_code(main, words))


def _exit_code(main: Callable[..., Any], words: list[str]) -> int:
    try:
        main(*words)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RunStopped, KeyboardInterrupt) as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `| head`; flushing at exit must not raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    return 0


def _accepts(main: Callable[..., Any], words: list[str]) -> bool:
    """Whether the words match the parameters of main; an empty command line asks for the usage."""
    try:
        inspect.signature(main).bind(*words)
    except TypeError:
        return False
    return bool(words)


def _usage(main: Callable[..., Any]) -> str:
    return inspect.getdoc(inspect.getmodule(main)) or ""
