"""Pre-train a network on unlabelled images.

    python jobs/pretrain.py CONFIG.yaml [section.key=value ...]
    python jobs/pretrain.py configs/deepcluster_alexnet_imagenet.yaml data.uri=s3://bucket/photos run.dir=s3://bucket/a

Repeat the command to resume an interrupted run. `ray job submit --working-dir . -- python jobs/pretrain.py ...` runs it
on a cluster.
"""

from raycluster.cli import run_command
from raycluster.config import load
from raycluster.distributed.train.trainer import fit
from raycluster.run.config import Config


def main(config: str, *overrides: str) -> None:
    print(fit(load(Config, config, overrides)))


if __name__ == "__main__":
    run_command(main)
