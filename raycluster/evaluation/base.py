"""What an evaluation declares: its metrics and their direction, what it reads of a network, and what it compares with.

One file per evaluation, in `probes/` if it learns from labelled images, else in `metrics/`: a constant `DECLARATION`
and a function `evaluate` that returns the declared metrics. Tables, sweeps and pages read the declarations.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Literal

from raycluster.config import PluginField

PROBES, METRICS = "raycluster.evaluation.probes", "raycluster.evaluation.metrics"


@dataclass(frozen=True)
class Metric:
    """One number that an evaluation returns.

    title: in tables. higher_is_better: the direction. percent: a share, shown in percent. headline: shown in tables and
    compared in sweeps; others only appear in files.
    """

    name: str
    title: str
    higher_is_better: bool = True
    percent: bool = False
    headline: bool = True


@dataclass(frozen=True)
class Declaration:
    """metrics: what `evaluate` returns. input: what it reads of each image: pooled feature `vectors` (n, D), feature
    `maps` (n, C, h, w), the maxima of the `quadrants` of the maps of all layers (n, D), its `clusters` (n,), or the
    `network` itself, with the data set. target: true `classes` (n,),
    the same as a 0/1 `label_matrix` (n, classes), the `clusters` that the network was trained on, or `none`.
    """

    metrics: tuple[Metric, ...]
    input: Literal["vectors", "maps", "quadrants", "clusters", "network"] = "vectors"
    target: Literal["classes", "label_matrix", "clusters", "none"] = "classes"


def probe_names() -> list[str]:
    """The evaluations that learn from labelled images."""
    return PluginField(PROBES, "evaluate").modules()


def probe(name: str) -> ModuleType:
    """The module of a probe, with its DECLARATION and `evaluate`."""
    return importlib.import_module(f"{PROBES}.{name}")


@cache
def declared_metrics() -> dict[str, Metric]:
    """Every metric that some evaluation declares, by name, and the deviation over folds of those of probes."""
    declared = [metric for declaration in _declarations() for metric in declaration.metrics]
    deviations = [deviation(metric) for name in probe_names() for metric in probe(name).DECLARATION.metrics]
    return {metric.name: metric for metric in (*declared, *deviations)}


def deviation(metric: Metric) -> Metric:
    """The standard deviation of a metric over folds."""
    return replace(metric, name=f"{metric.name}_deviation", title=f"{metric.title} +-", higher_is_better=False)


def label_free_metrics() -> list[str]:
    """Headline metrics that need no true classes."""
    return [
        metric.name
        for declaration in _declarations()
        for metric in declaration.metrics
        if metric.headline and declaration.target in ("clusters", "none")
    ]


def labelled_metrics() -> list[str]:
    """Headline metrics of the probes."""
    return [metric.name for name in probe_names() for metric in probe(name).DECLARATION.metrics if metric.headline]


def _declarations() -> list[Declaration]:
    names = [module.name for module in pkgutil.iter_modules(importlib.import_module(METRICS).__path__)]
    metrics = [importlib.import_module(f"{METRICS}.{name}") for name in names]
    return [module.DECLARATION for module in (*metrics, *map(probe, probe_names()))]
