"""Exit codes and output of commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raycluster.cli import run_command
from raycluster.types import RunStopped, UserError

ROOT = Path(__file__).parent.parent


def main(first: str, *others: str) -> None:
    {
        "good": lambda: print("done", *others),
        "user error": lambda: _raise(UserError("seen x; wanted y")),
        "ctrl-c": lambda: _raise(KeyboardInterrupt()),
        "stopped": lambda: _raise(RunStopped("stopped in round 2; repeat the command to resume")),
        "defect": lambda: _raise(KeyError("a bug")),
    }[first]()


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("words", "code", "out", "err"),
    [
        (["good", "a=1"], 0, "done a=1\n", ""),
        (["user error"], 2, "", "error: seen x; wanted y\n"),
        (["ctrl-c"], 130, "", "interrupted\n"),
        (["stopped"], 130, "", "stopped in round 2; repeat the command to resume\n"),
        ([], 2, "", "Exit codes and output of commands.\n"),
        (["good", "--help"], 0, "Exit codes and output of commands.\n", ""),
    ],
)
def test_exit_codes(words: list[str], code: int, out: str, err: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(main, words)
    assert caught.value.code == code
    assert capsys.readouterr() == (out, err)


def test_other_exceptions_propagate() -> None:
    with pytest.raises(KeyError):
        run_command(main, ["defect"])


def test_a_closed_pipe() -> None:
    program = (
        "from raycluster.cli import run_command\n"
        "def main(*words: str) -> None:\n"
        "    print('x' * 10_000_000)\n"
        "run_command(main, ['go'])\n"
    )
    command = f'{sys.executable} -c "{program}" | head -c 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (141, "x", "")
