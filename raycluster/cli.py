"""How a job ends: users' mistakes as a sentence and exit code 2, Ctrl-C as 130; defects keep their traceback."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from raycluster.types import RunStopped, UserError


def run_command(main: Callable[..., Any], arguments: Sequence[str] | None = None) -> None:
    """Call ``main`` with the words of the command line (or ``arguments``), and leave the process with an exit code.

    0: done. 2: the user's mistake, told on stderr; too few or too many words print the docstring of the module that
    defines ``main``, as does ``--help``. 130: stopped by Ctrl-C, its state saved or not. 141: nobody reads the output.
    Raises SystemExit, always; any other exception passes through with its traceback.
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
    except BrokenPipeError:  # as in `| head`; what is still buffered must not raise again when the interpreter exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    return 0


def _accepts(main: Callable[..., Any], words: list[str]) -> bool:
    """Whether the words fit the parameters of main; none at all never do, for they ask how it is used."""
    try:
        inspect.signature(main).bind(*words)
    except TypeError:
        return False
    return bool(words)


def _usage(main: Callable[..., Any]) -> str:
    return inspect.getdoc(inspect.getmodule(main)) or ""
