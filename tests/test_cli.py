"""How a command ends, as a shell sees it."""

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
        "mistake": lambda: _raise(UserError("seen x; wanted y")),
        "ctrl-c": lambda: _raise(KeyboardInterrupt()),
        "stopped": lambda: _raise(RunStopped("stopped in round 2; the same command goes on from there")),
        "defect": lambda: _raise(KeyError("a bug")),
    }[first]()


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("words", "code", "out", "err"),
    [
        (["good", "a=1"], 0, "done a=1\n", ""),
        (["mistake"], 2, "", "error: seen x; wanted y\n"),
        (["ctrl-c"], 130, "", "interrupted\n"),
        (["stopped"], 130, "", "stopped in round 2; the same command goes on from there\n"),
        ([], 2, "", "How a command ends, as a shell sees it.\n"),
        (["good", "--help"], 0, "How a command ends, as a shell sees it.\n", ""),
    ],
)
def test_exit_codes(words: list[str], code: int, out: str, err: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(main, words)
    assert caught.value.code == code
    assert capsys.readouterr() == (out, err)


def test_defects_keep_their_traceback() -> None:
    with pytest.raises(KeyError):
        run_command(main, ["defect"])


def test_a_closed_pipe_is_not_a_defect() -> None:
    program = (
        "from raycluster.cli import run_command\n"
        "def main(*words: str) -> None:\n"
        "    print('x' * 10_000_000)\n"
        "run_command(main, ['go'])\n"
    )
    command = f'{sys.executable} -c "{program}" | head -c 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (141, "x", "")
