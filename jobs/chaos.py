"""Break a run in every way and see whether it ends as if nothing had happened; prints a table.

    python jobs/chaos.py [seed=0] [only=WORDS] [repeat=1] [out=chaos]

Some faults, one after the other, hit each of a dozen small runs (digits) on a cluster of three nodes on this machine:
real processes, killed from outside, at a moment and with a victim that the seed chooses. only: runs with a fault whose
name contains these words. repeat: play everything so often, each time with the next seed. out: where the logs of a run
stay that did not end as it should. The exit code is 1 if any did not.
"""

import sys
from pathlib import Path

from chaos.rig import HEADER, chaos, row

from raycluster.cli import run_command


def main(*words: str) -> None:
    given = {"seed": "0", "only": "", "repeat": "1", "out": "chaos", **dict(word.split("=", 1) for word in words)}
    failed = 0
    print(HEADER, flush=True)
    for number in range(int(given["repeat"])):
        for outcome in chaos(given["only"], seed=int(given["seed"]) + number, out=Path(given["out"])):
            print(row(outcome), flush=True)
            failed += not outcome.result.startswith(("identical", "agrees"))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_command(main, sys.argv[1:] or ["seed=0"])
