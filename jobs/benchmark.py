"""Compare raycluster with alternatives, interleaved in one run; prints a table.

    python jobs/benchmark.py ingest [small=URI] [photos=URI] [processes=2]
    python jobs/benchmark.py modes [steps=20]
    python jobs/benchmark.py embeddings data=URI out=DIR
    python jobs/benchmark.py kmeans [before=DIR/before.npy after=DIR/after.npy] [clusters=1000,10000] [rows=50000]
    python jobs/benchmark.py kmeans_memory [before=DIR/before.npy]
    python jobs/benchmark.py kmeans_pool [before=DIR/before.npy]
    python jobs/benchmark.py kmeans_tree [before=DIR/before.npy] [rows=100000] [sizes=10x1000]
    python jobs/benchmark.py agglomerative [before=DIR/before.npy] [rows=10000] [dim=256] [threshold=1.1]
    python jobs/benchmark.py pic [before=DIR/before.npy] [rows=100000] [probes=8,32]
    python jobs/benchmark.py partial_softmax [clusters=100000] [chosen=1000,10000]
    python jobs/benchmark.py patches [side=96] [size=32]
    python jobs/benchmark.py gpu [rows=1280000] [clusters=10000,80000]
    python jobs/benchmark.py guarantees [data=URI] [checkpoint_seconds=5]
    python jobs/benchmark.py scale [model=alexnet] [size=224] [global_batch=4096] [gigabits=10]
    python jobs/benchmark.py sinkhorn [features=DIR/before.npy] [sizes=100000x3000,50000x1000] [budget_seconds=300]
    python jobs/benchmark.py heads data=CIFAR [heads=1,4] [images=10000] [epochs=6] [seeds=3]
    python jobs/benchmark.py online_features data=CIFAR [images=10000] [epochs=6]
    python jobs/benchmark.py imbalance data=CIFAR [images=10000] [epochs=6]

Each benchmark is a module of `jobs/benchmarks/`, and its parameters are the arguments of its `run`.
"""

from benchmarks.parameters import find_benchmark, parse_arguments

from raycluster.cli import run_command


def main(name: str, *words: str) -> None:
    run = find_benchmark(name)
    print(run(**parse_arguments(run, words)))


if __name__ == "__main__":
    run_command(main)
