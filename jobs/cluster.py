"""Cluster a file or folder of embeddings (.npy or Parquet), at a path or URI, by exact k-means.

    python jobs/cluster.py embeddings=URI num_clusters=10000 out=URI [iterations=20] [init=k-means++] [whiten=256]
    python jobs/cluster.py embeddings=URI num_clusters=10000 out=URI actors=8

Writes kmeans.npz (centroids; raycluster.load_kmeans), labels.parquet (sample, label) and progress.jsonl to out. Repeat
the command to resume an interrupted run. actors: number of Ray actors that share the rows, with the same result; 0 for
this process only.
"""

from raycluster.cli import run_command
from raycluster.config import load
from raycluster.distributed.cluster_files import ClusterSettings, cluster


def main(*settings: str) -> None:
    print(cluster(load(ClusterSettings, None, settings)))


if __name__ == "__main__":
    run_command(main)
