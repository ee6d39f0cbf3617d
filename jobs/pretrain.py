"""Pre-train a network on unlabelled pictures.

    python jobs/pretrain.py CONFIG.yaml [section.key=value ...]
    python jobs/pretrain.py configs/deepcluster_alexnet_imagenet.yaml data.uri=s3://bucket/photos run.dir=s3://bucket/a

The same command goes on after an interruption. With `ray job submit --working-dir . -- python jobs/pretrain.py ...` it
runs on a cluster.
"""

from raycluster.cli import run_command
from raycluster.config import load
from raycluster.distributed.train.trainer import fit
from raycluster.run.state import Config


def main(config: str, *overrides: str) -> None:
    print(fit(load(Config, config, overrides)))


if __name__ == "__main__":
    run_command(main)
