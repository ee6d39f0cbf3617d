"""Evaluate a finished run: kNN and linear probe of any layer, and agreement of clusters with true labels.

    python jobs/evaluate.py RUN [data.uri=IMAGES] [evaluation.layer=conv4] [evaluation.test_uri=IMAGES]

RUN is a run directory or URI. Overrides change the settings of the run. evaluation.layer=all evaluates every
layer.
"""

from raycluster.cli import run_command
from raycluster.distributed.evaluate import evaluate_run


def main(run_dir: str, *overrides: str) -> None:
    print(evaluate_run(run_dir, overrides))


if __name__ == "__main__":
    run_command(main)
