"""Search hyperparameters: runs that differ in the searched keys, compared on one page.

    python jobs/tune.py configs/search/deepcluster.yaml [section.key=value ...]
    python jobs/tune.py configs/deepcluster_cifar10.yaml 'search={method.num_clusters: [10, 100, 1000]}' run.dir=runs/k

The configuration is that of a run with the sections `search`, the values, and `sweep`, the strategy. Writes
RUN/sweep.html, RUN/best.yaml and a run directory per trial, where RUN is run.dir. Repeat the command to resume an
interrupted sweep.
"""

from raycluster.cli import run_command
from raycluster.config import load
from raycluster.distributed.tune import tune
from raycluster.sweep.config import SweepConfig


def main(config: str, *overrides: str) -> None:
    print(tune(load(SweepConfig, config, overrides)))


if __name__ == "__main__":
    run_command(main)
