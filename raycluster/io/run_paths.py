"""The layout of a run directory: the only module that knows where its files lie."""

from __future__ import annotations

from dataclasses import dataclass

from raycluster.io import storage


@dataclass(frozen=True)
class RunPaths:
    """URIs of the files in a run directory.

    directory: a path or URI, options included (`s3://bucket/run?region=eu-west-1`). A sweep directory holds its own
    files and a run directory per trial.
    """

    directory: str

    def _join(self, *parts: str) -> str:
        return storage.join(self.directory, *parts)

    @property
    def config(self) -> str:
        """Every setting, defaults included."""
        return self._join("config.yaml")

    @property
    def manifest(self) -> str:
        """The images, numbered."""
        return self._join("manifest.parquet")

    def test_manifest(self, digest: str) -> str:
        """The images of `evaluation.test_uri`; digest: of the settings that decide which."""
        return self._join(f"manifest-test-{digest}.parquet")

    @property
    def checkpoints(self) -> str:
        """Folder of checkpoints."""
        return self._join("checkpoints")

    @property
    def online_features(self) -> str:
        """Folder of features gathered while training."""
        return self._join("online-features")

    @property
    def metrics(self) -> str:
        """One JSON line per round."""
        return self._join("metrics.jsonl")

    @property
    def skipped(self) -> str:
        """One JSON line per image that could not be read."""
        return self._join("skipped.jsonl")

    @property
    def assignments(self) -> str:
        """Folder of Parquet files: the cluster of each image."""
        return self._join("assignments")

    @property
    def report(self) -> str:
        """Results of a finished run."""
        return self._join("report.json")

    @property
    def backbone_weights(self) -> str:
        """The exported backbone, safetensors."""
        return self._join("backbone.safetensors")

    @property
    def backbone_description(self) -> str:
        """The settings that rebuild the exported backbone."""
        return self._join("backbone.json")

    @property
    def status(self) -> str:
        """Progress, failures and cost of the run."""
        return self._join("status.json")

    @property
    def lease(self) -> str:
        """Which job works on the directory."""
        return self._join("lease.json")

    @property
    def tensorboard(self) -> str:
        """Folder of TensorBoard event files."""
        return self._join("tensorboard")

    def evaluation(self, digest: str) -> RunPaths:
        """Manifests of an evaluation on other data; digest: of its settings."""
        return RunPaths(self._join("evaluation", digest))

    @property
    def sweep_table(self) -> str:
        """Results of all trials of a sweep, JSON."""
        return self._join("sweep.json")

    @property
    def sweep_page(self) -> str:
        """Results of all trials of a sweep, HTML."""
        return self._join("sweep.html")

    @property
    def best_config(self) -> str:
        """The best configuration of a sweep."""
        return self._join("best.yaml")

    @property
    def best_link(self) -> str:
        """Link to the run directory of the best trial, on a local file system."""
        return self._join("best")

    @property
    def best_rerun(self) -> RunPaths:
        """Where `best_config` runs."""
        return RunPaths(self._join("best-again"))

    def trial(self, name: str) -> RunPaths:
        """The run directory of a trial of a sweep."""
        return RunPaths(self._join("trials", name))

    def trial_data(self, digest: str) -> RunPaths:
        """Manifests shared by the trials of a sweep; digest: of their data settings."""
        return RunPaths(self._join("data", digest))
