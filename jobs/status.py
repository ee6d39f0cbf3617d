"""Progress, workers, failures, time left and cost of a run.

    python jobs/status.py RUN [price=0.80]

RUN is a run directory or URI; price is that of a worker-hour. A run without a heartbeat for 60 s is reported as dead.
"""

import time

from raycluster.cli import run_command
from raycluster.config import load, settings
from raycluster.monitoring.summary import overview


@settings
class Options:
    """price: of a worker-hour, in any currency."""

    price: float | None = None


def main(run_dir: str, *options: str) -> None:
    print(overview(run_dir, now=time.time(), price=load(Options, None, options).price))


if __name__ == "__main__":
    run_command(main)
