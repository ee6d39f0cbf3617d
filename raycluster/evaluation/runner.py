"""How good are the features: every evaluation in `evaluation/`, on the representation of any layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from raycluster.config import NonEmpty, settings
from raycluster.config.registry import did_you_mean
from raycluster.data.dataset import ImageDataset, open_dataset
from raycluster.data.folds import read_folds
from raycluster.data.transforms import View
from raycluster.evaluation.base import probe, probe_names
from raycluster.evaluation.metrics import label_free
from raycluster.features.extraction import FeatureSpec, SkippedImage, extract
from raycluster.io.run_paths import RunPaths
from raycluster.models.backbone import Backbone
from raycluster.runtime.workers import Workers
from raycluster.seeding import generator
from raycluster.types import UserError

_KINDS = {"vectors": "pooled", "maps": "flat", "quadrants": "quadrants"}  # of features, by what a probe reads


@dataclass(frozen=True)
class Labelled:
    """x: (n, ...) features. y: (n,) true classes. samples: (n,) ids of the images."""

    x: NDArray[np.float32]
    y: NDArray[np.int32]
    samples: NDArray[np.int64]

    def __getitem__(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> Labelled:
        return Labelled(self.x[rows], self.y[rows], self.samples[rows])


@settings
class EvaluationSettings:
    """How the finished network is compared with its untrained self. Needs labels, which nothing else uses.

    layer: whose global average pooled output is evaluated, null for the last. max_samples: at most so many images to
    learn from and to test on. test_fraction: share of them to test on. test_uri: labelled images to test on instead (at
    most as many again), read like `data.uri`. folds: learn from each of these folds of the images instead of all, and
    report means and standard deviations: a .txt file with a line of positions per fold (STL-10), or a Parquet column of
    numbers of folds. probes: modules of `raycluster/evaluation/probes/`.
    every_rounds: also evaluate the network after every so many rounds, and after the last, in metrics.jsonl: by scores
    that need no labels, and by the probes where there are labels; 0 for never.
    """

    layer: str | None = None
    max_samples: Annotated[int, Field(ge=1)] = 10_000
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    test_uri: NonEmpty | None = None
    folds: NonEmpty | None = None
    probes: Annotated[tuple[str, ...], Field(min_length=1)] = ("knn", "linear_probe")
    every_rounds: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.folds is not None and self.test_uri is None:
            raise UserError(f"folds: seen {self.folds} without test_uri; wanted other images to test on: set test_uri")
        known = probe_names()
        for name in self.probes:
            if name not in known:
                raise UserError(f"probes: seen {name}; wanted some of {', '.join(known)}{did_you_mean(name, known)}")


@dataclass(frozen=True)
class Evaluation:
    """Where and how networks are evaluated. Its methods are collective."""

    settings: EvaluationSettings
    view: View
    directory: str
    workers: Workers

    def compare(self, networks: dict[str, Backbone], dataset: ImageDataset) -> dict[str, dict[str, float]]:
        """The accuracies (shares) of several networks on the same images: {network: {probe: accuracy}}."""
        figures = {}
        for name, backbone in networks.items():
            figures[name] = self.probe(backbone, dataset, name)
        return figures

    def probe(self, backbone: Backbone, dataset: ImageDataset, name: str) -> dict[str, float]:
        """The metrics of all probes. name: the version that features are stored under."""
        metrics: dict[str, float] = {}
        for kind in ("vectors", "maps", "quadrants"):
            chosen = [one for one in self.settings.probes if probe(one).DECLARATION.input == kind]
            if chosen:
                train, test = self.train_and_test(backbone, dataset, name, kind)
                folds = self.folds(dataset)
                metrics |= self.workers.run_on_rank_zero(run_folds, train, test, chosen, folds)
        for one in self.settings.probes:
            if probe(one).DECLARATION.input == "network":
                metrics |= probe(one).evaluate(backbone, NetworkInput(self, dataset, self.test_dataset(dataset)))
        return metrics

    def after_round(
        self, backbone: Backbone, dataset: ImageDataset, clusters: NDArray[np.int32] | None, name: str
    ) -> dict[str, float]:
        """How good a network is while it trains: scores that need no labels, and accuracies where there are labels.

        clusters: (N,) what it was trained on, -1 for no cluster. name: the version that its features are stored under.
        """
        samples, x = self.features(backbone, dataset, name)
        figures = self.workers.run_on_rank_zero(label_free.evaluate, x, None if clusters is None else clusters[samples])
        if dataset.manifest.labels is not None:
            figures |= self.probe(backbone, dataset, name)
        return figures

    def train_and_test(
        self, backbone: Backbone, dataset: ImageDataset, name: str, kind: str = "vectors"
    ) -> tuple[Labelled, Labelled]:
        """Features to learn from and to test on. kind: `vectors` (n, D), `maps` (n, C, h, w) or `quadrants` (n, D)."""
        train, tests = self.represent(backbone, dataset, name, kind), self.test_dataset(dataset)
        if tests is None:
            return split(train, self.settings.test_fraction, dataset.seed)
        test = self.represent(backbone, tests, f"{name} test", kind)
        return train, replace(test, y=_translate(test.y, tests.manifest.classes, dataset.manifest.classes))

    def test_dataset(self, dataset: ImageDataset) -> ImageDataset | None:
        """The images of `test_uri`, if there is one."""
        if self.settings.test_uri is None:
            return None
        data = replace(dataset.settings, uri=self.settings.test_uri, max_samples=None)
        uri = RunPaths(self.directory).test_manifest(sha256(repr(data).encode()).hexdigest()[:8])
        return open_dataset(data, uri, self.workers, dataset.seed)

    def folds(self, dataset: ImageDataset) -> list[NDArray[np.int64]] | None:
        """The ids of the images of each fold to learn from; None if all are learned from together."""
        if self.settings.folds is None:
            return None
        if self.settings.max_samples < dataset.manifest.num_samples:
            raise UserError(
                f"evaluation.folds takes images from all {dataset.manifest.num_samples} of {dataset.settings.uri}, but "
                f"evaluation.max_samples = {self.settings.max_samples}; raise it"
            )
        return self.workers.run_on_rank_zero(read_folds, self.settings.folds, dataset.manifest)

    def check(self, dataset: ImageDataset) -> None:
        """UserError if these images, or those of `test_uri`, have no labels to evaluate with, or folds do not fit."""
        self.folds(dataset)
        if self.settings.test_uri is None:
            self._check_labels(dataset)
            return
        try:
            self._check_labels(dataset)
            tests = self.test_dataset(dataset)
            if tests is not None:
                self.labels(tests)
                _translate(np.empty(0, np.int32), tests.manifest.classes, dataset.manifest.classes)
        except UserError as error:
            raise UserError(
                f"{error}\nThe configuration tests on evaluation.test_uri = {self.settings.test_uri}. For other "
                "images, set evaluation.test_uri to labelled ones of the same classes, or to null to test on a share "
                "of data.uri if it has labels"
            ) from error

    def _check_labels(self, dataset: ImageDataset) -> None:
        known = self.labels(dataset) >= 0
        if known.sum() < 2:
            raise UserError(
                f"only {known.sum()} of the first {len(known)} images of {dataset.settings.uri} have labels, too few "
                "to evaluate with; raise evaluation.max_samples, or set data.labels=none to do without"
            )

    def labels(self, dataset: ImageDataset) -> NDArray[np.int32]:
        """True labels of the first `max_samples` images, -1 where unknown."""
        if dataset.manifest.labels is None:
            raise UserError(
                f"{dataset.settings.uri} has no labels to evaluate against; set data.labels to a column or `folder`"
            )
        return dataset.manifest.labels[dataset.manifest.evaluation_samples(self.settings.max_samples)]

    def represent(self, backbone: Backbone, dataset: ImageDataset, name: str, kind: str = "vectors") -> Labelled:
        """Features and true labels of those of the first `max_samples` images that have labels."""
        self.labels(dataset)
        samples, x = self.features(backbone, dataset, name, kind)
        assert dataset.manifest.labels is not None
        found = Labelled(x, dataset.manifest.labels[samples], samples)
        return found[found.y >= 0]

    def features(
        self, backbone: Backbone, dataset: ImageDataset, name: str, kind: str = "vectors"
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Sample ids (n,) and features of the first `max_samples` images, broken ones left out."""
        chosen = dataset.manifest.evaluation_samples(self.settings.max_samples)
        version = name if kind == "vectors" else f"{name} {kind}"
        events = extract(
            backbone,
            dataset,
            self.workers,
            feature_spec=FeatureSpec(self.view, self.settings.layer, _KINDS[kind]),
            version=version,
            shards=dataset.manifest.shards_of(chosen),
        )
        broken = [event.sample for event in events if isinstance(event, SkippedImage)]
        samples = np.setdiff1d(chosen, broken)
        rows = self.workers.run_on_rank_zero(_rows, self.workers, version, samples)
        return samples, rows.reshape(len(rows), *self._map_shape(backbone)) if kind == "maps" else rows

    def _map_shape(self, backbone: Backbone) -> tuple[int, ...]:
        """(C, h, w) of the evaluated layer; (D, 1, 1) where it has no maps."""
        image = torch.zeros(1, 3, self.view.size, self.view.size, dtype=torch.uint8, device=self.workers.device)
        with torch.no_grad():
            shape = tuple(backbone.eval()(image, self.settings.layer).shape[1:])
        return shape if len(shape) == 3 else (*shape, 1, 1)


@dataclass(frozen=True)
class NetworkInput:
    """What an evaluation of a whole network gets besides it. tests: the images of `evaluation.test_uri`, if any."""

    evaluation: Evaluation
    train: ImageDataset
    tests: ImageDataset | None


def _rows(workers: Workers, version: str, samples: NDArray[np.int64]) -> NDArray[np.float32]:
    return workers.features(version).rows(samples)


def _translate(labels: NDArray[np.int32], classes: Sequence[str], into: Sequence[str]) -> NDArray[np.int32]:
    """The same labels as numbers of other class lists."""
    unknown = sorted(set(classes) - set(into))
    if unknown:
        raise UserError(
            f"evaluation.test_uri has classes that data.uri lacks: {', '.join(unknown[:5])}; use matching labels"
        )
    return np.array([into.index(name) for name in classes], np.int32)[labels]


def split(labelled: Labelled, test_fraction: float, seed: int) -> tuple[Labelled, Labelled]:
    """A seeded cut into (train, test)."""
    order = generator(seed, "split").permutation(len(labelled.y))
    cut = max(1, round(len(order) * test_fraction))
    return labelled[order[cut:]], labelled[order[:cut]]


def run_folds(
    train: Labelled, test: Labelled, probes: Sequence[str], folds: Sequence[NDArray[np.int64]] | None
) -> dict[str, float]:
    """`run_probes` learning from each fold: means over folds, and standard deviations. folds: ids of images, None for
    one fold of all.
    """
    if folds is None:
        return run_probes(train, test, probes)
    found = [run_probes(train[np.isin(train.samples, fold)], test, probes) for fold in folds]
    values = {name: [one[name] for one in found] for name in found[0]}
    means = {name: float(np.mean(some)) for name, some in values.items()}
    return means | {f"{name}_deviation": float(np.std(some, ddof=1)) for name, some in values.items()}


def run_probes(train: Labelled, test: Labelled, probes: Sequence[str]) -> dict[str, float]:
    """The metrics of probes that read features, by name."""
    metrics: dict[str, float] = {}
    for name in probes:
        targets: Sequence[NDArray[Any]] = (train.y, test.y)
        if probe(name).DECLARATION.target == "label_matrix":
            identity = np.eye(int(max(labels.max() for labels in targets)) + 1, dtype=np.float32)
            targets = [identity[labels] for labels in targets]
        metrics |= probe(name).evaluate(train.x, targets[0], test.x, targets[1])
    return metrics
