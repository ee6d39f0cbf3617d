"""Train any network from scratch on the labels of a finished run.

    python jobs/transfer.py labels=RUN model=resnet18 [training.epochs=90] [run.dir=DIR] [section.key=value ...]
    python jobs/transfer.py labels=RUN training.rotation=true views.train.equalize=0.2 views.train.sharpness=0.5

RUN is a run directory or URI, of any method. The settings are the run's own, changed by the overrides; `model=NAME`
takes that network with its defaults. training.rotation adds 4-way rotation prediction (SeLa+Rot).
Repeat the command to resume an interrupted run.
"""

from raycluster.cli import run_command
from raycluster.distributed.train.trainer import fit
from raycluster.run.label_transfer import transfer_config


def main(*words: str) -> None:
    print(fit(transfer_config(words)))


if __name__ == "__main__":
    run_command(main)
