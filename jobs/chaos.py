"""Inject faults into small runs and compare the results with runs without faults; prints a table.

    python jobs/chaos.py [seed=0] [only=TEXT] [repeat=1] [out=chaos]

A dozen small runs (digits) on a local cluster of three nodes each meet several faults, one after the other: processes
are killed from outside, at moments chosen by the seed. All scenarios take half an hour. only: scenarios with a fault
whose name contains the text. repeat: number of passes, each with the next seed. out: folder for run directories and
logs of failed scenarios. The exit code is 1 if there are any. Needs the extra `chaos`.
"""

import logging
import signal
import sys
from pathlib import Path

from chaos.config import ChaosSettings

from raycluster.cli import run_command
from raycluster.config import load
from raycluster.types import UserError


def main(*words: str) -> None:
    settings = load(ChaosSettings, None, words)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("chaos").setLevel(logging.INFO)
    print("loading Ray and torch", file=sys.stderr, flush=True)
    from chaos.rig import FAULTS, HEADER, row, run_scenarios

    if not any(settings.only in fault for fault in FAULTS):
        raise UserError(f"only: seen {settings.only}; wanted a part of the name of a fault: {', '.join(FAULTS)}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)
    failed = 0
    print(HEADER, flush=True)
    for index in range(settings.repeat):
        for outcome in run_scenarios(settings.only, seed=settings.seed + index, out=Path(settings.out)):
            print(row(outcome), flush=True)
            failed += not outcome.result.startswith(("identical", "agrees"))
    sys.exit(1 if failed else 0)


def _exit(number: int, frame: object) -> None:
    """Unwind the stack, which ends all processes and removes temporary folders, once."""
    for other in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(other, lambda *_: None)  # SIG_IGN would raise if the signal is already pending
    sys.exit(128 + number)


if __name__ == "__main__":
    run_command(main, sys.argv[1:] or ["seed=0"])
