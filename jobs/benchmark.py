"""Measure raycluster against what one would use instead; prints a table of figures and ratios taken in one run.

    python jobs/benchmark.py ingest [small=URI] [photos=URI] [processes=2]
    python jobs/benchmark.py modes [steps=20]
    python jobs/benchmark.py embeddings pictures=URI out=DIR
    python jobs/benchmark.py kmeans [before=DIR/before.npy after=DIR/after.npy] [clusters=1000,10000] [rows=50000]
    python jobs/benchmark.py kmeans_memory [before=DIR/before.npy]
    python jobs/benchmark.py kmeans_pool [before=DIR/before.npy]
    python jobs/benchmark.py gpu [rows=1280000] [clusters=10000,80000]
    python jobs/benchmark.py guarantees [pictures=URI] [checkpoint_seconds=5]
    python jobs/benchmark.py scale [model=alexnet] [size=224] [global_batch=4096] [gigabits=10]
    python jobs/benchmark.py sinkhorn [features=DIR/before.npy] [sizes=100000x3000,50000x1000] [budget_seconds=300]
    python jobs/benchmark.py heads pictures=CIFAR [heads=1,4] [images=10000] [epochs=6] [seeds=3]
    python jobs/benchmark.py online_features pictures=CIFAR [images=10000] [epochs=6]
    python jobs/benchmark.py imbalance pictures=CIFAR [images=10000] [epochs=6]

Each benchmark is a module of `jobs/benchmarks/`.
"""

from importlib import import_module

import yaml

from raycluster.cli import run_command


def main(name: str, *settings: str) -> None:
    pairs = (setting.partition("=") for setting in settings)
    print(import_module(f"benchmarks.{name}").run(**{key: yaml.safe_load(value) for key, _, value in pairs}))


if __name__ == "__main__":
    run_command(main)
