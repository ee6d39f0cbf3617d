"""The configuration of a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from raycluster.config import NonEmpty, PluginField, Seed, settings
from raycluster.data.manifest import DataSettings
from raycluster.data.transforms import Views
from raycluster.evaluation.runner import EvaluationSettings
from raycluster.training.config import TrainingSettings
from raycluster.types import UserError


@settings
class Elastic:
    """Between `min` and `max` training workers, as machines come and go."""

    min: Annotated[int, Field(ge=1)]
    max: Annotated[int, Field(ge=1)]


@settings
class RunSettings:
    """Where and how to run. Nothing here changes a result.

    dir: the run directory, a path or any URI that all nodes can write. resume: `auto` resumes the run in it,
    if there is one, `never` refuses to. workers: training workers; 0 trains in the job itself, `{min, max}` is elastic,
    `auto` is 0 unless the cluster has several GPUs. device: what workers compute on; `auto` follows the nodes
    that are up, so set `gpu` or `cpu` where an autoscaler has yet to start them. decode_cpus: how many CPUs, in all,
    decoding may request from an autoscaler; 0 for those that are up. actors: of the feature pool, 0 for one a
    node. checkpoint_minutes: between checkpoints within a round. keep_checkpoints: how many stay. max_failures: how
    many lost workers end the run. resize_seconds: between checks whether the cluster offers another number of workers.
    storage_minutes: for how long unreachable storage is retried.
    """

    dir: NonEmpty
    resume: Literal["auto", "never"] = "auto"
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] | Elastic = "auto"
    device: Literal["auto", "gpu", "cpu"] = "auto"
    decode_cpus: Annotated[int, Field(ge=0)] = 0
    actors: Annotated[int, Field(ge=0)] = 0
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 10.0
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    max_failures: Annotated[int, Field(ge=0)] = 100
    resize_seconds: Annotated[float, Field(gt=0)] = 30.0
    storage_minutes: Annotated[float, Field(ge=0)] = 30.0

    def __post_init__(self) -> None:
        if self.workers == 0 and self.device != "auto":
            raise UserError(
                f"run.device: seen {self.device}; wanted auto where run.workers is 0: the job trains on what its own "
                "machine has. Set run.workers to at least 1, or leave run.device out"
            )

    def workers_wanted(self) -> tuple[int, int]:
        """(fewest, most) as far as the settings say; (0, 0) for `auto`."""
        if isinstance(self.workers, Elastic):
            return self.workers.min, self.workers.max
        return (0, 0) if self.workers == "auto" else (self.workers, self.workers)


@settings
class Config:
    """A whole run. Only the last section may differ between runs that must agree."""

    data: DataSettings
    views: Views
    model: Annotated[Any, PluginField("raycluster.models", "Model")]
    method: Annotated[Any, PluginField("raycluster.methods", "Method")]
    training: TrainingSettings
    run: RunSettings
    evaluation: EvaluationSettings = EvaluationSettings()
    seed: Seed = 0
