"""Break a run in every way and see whether it ends as if nothing had happened; prints a table.

    python jobs/chaos.py [seed=0] [only=WORDS] [repeat=1] [out=chaos]

Each fault hits a small run of its own (digits, exact mode) on a cluster of three nodes on this machine: real processes,
killed from outside, at a moment and with a victim that the seed chooses. only: faults whose names contain these words.
repeat: play everything so often, each time with the next seed. out: where the logs of a fault stay that did harm. The
exit code is 1 if any did.
"""

import sys
from pathlib import Path

from raycluster.command import run_command
from raycluster.distributed.chaos import FAST_FAULTS, HEADER, chaos, row
from raycluster.distributed.faults import FAULTS


def main(*words: str) -> None:
    given = {"seed": "0", "only": "", "repeat": "1", "out": "chaos", **dict(word.split("=", 1) for word in words)}
    names = [name for name in (*FAULTS, *FAST_FAULTS) if given["only"] in name]
    failed = 0
    print(HEADER, flush=True)
    for number in range(int(given["repeat"])):
        for outcome in chaos(names, seed=int(given["seed"]) + number, out=Path(given["out"])):
            print(row(outcome), flush=True)
            failed += outcome.result.startswith("FAILED")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_command(main, sys.argv[1:] or ["seed=0"])
