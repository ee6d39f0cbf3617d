"""Measure raycluster against what one would use instead; prints a table of figures and ratios taken in one run.

    python jobs/benchmark.py ingest [small=URI] [photos=URI] [processes=2]
    python jobs/benchmark.py modes [steps=20]
    python jobs/benchmark.py embeddings pictures=URI out=DIR
    python jobs/benchmark.py kmeans [before=DIR/before.npy after=DIR/after.npy] [clusters=1000,10000] [rows=50000]
    python jobs/benchmark.py kmeans_memory [before=DIR/before.npy]
    python jobs/benchmark.py kmeans_pool [before=DIR/before.npy]

Each benchmark is a module of `jobs/benchmarks/`.
"""

from importlib import import_module

import yaml

from raycluster.command import run_command


def main(name: str, *settings: str) -> None:
    pairs = (setting.partition("=") for setting in settings)
    print(import_module(f"benchmarks.{name}").run(**{key: yaml.safe_load(value) for key, _, value in pairs}))


if __name__ == "__main__":
    run_command(main)
