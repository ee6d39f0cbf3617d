"""What every training worker runs, from the beginning, whenever Ray starts the group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import ray.train
from ray.actor import ActorHandle

from raycluster.distributed.control.channel import WorkerClient
from raycluster.distributed.features.feature_pool import FeaturePoolClient
from raycluster.distributed.workers import RayWorkers
from raycluster.events import Event, Finished, Round, StatusNote
from raycluster.io.retry import retry_context
from raycluster.run.config import Config
from raycluster.run.loop import pretrain
from raycluster.training.determinism import prepare_process
from raycluster.types import RunStopped, UserError


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended. text: of the error, or of the request to stop. report: of a finished run."""

    status: Literal["finished", "stopped", "user_error"]
    text: str = ""
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkerConfig:
    """What the job gives to its training workers: the run, the actors of the feature pool, the control channel."""

    config: Config
    actors: list[ActorHandle]
    channel: ActorHandle


def train_worker(settings: dict[str, WorkerConfig]) -> RunOutcome:
    """One training worker inside Ray Train, whose train_loop_config is `settings`; rank 0 publishes the events."""
    worker_config = settings["worker"]
    context, run = ray.train.get_context(), worker_config.config.run
    rank = context.get_world_rank()
    client = WorkerClient(worker_config.channel)
    prepare_process()
    workers = RayWorkers(
        FeaturePoolClient(worker_config.actors),
        rank=rank,
        size=context.get_world_size(),
        worker_client=client,
        decode_cpus=run.decode_cpus,
        retry_seconds=60 * run.storage_minutes,
    )

    def handle(event: Event) -> None:
        if rank == 0:
            client.publish(event)
        if isinstance(event, Round):
            ray.train.report({key: value for key, value in event.record.items() if isinstance(value, (int, float))})

    return run_to_outcome(worker_config.config, workers, handle, client.publish)


def train_in_process(config: Config, actors: list[ActorHandle], handle: Callable[[Event], None]) -> RunOutcome:
    """The only worker, in the job's process."""
    prepare_process()
    run = config.run
    workers = RayWorkers(FeaturePoolClient(actors), decode_cpus=run.decode_cpus, retry_seconds=60 * run.storage_minutes)
    return run_to_outcome(config, workers, handle, handle)


def run_to_outcome(
    config: Config, workers: RayWorkers, handle: Callable[[Event], None], notify: Callable[[Event], None]
) -> RunOutcome:
    """Train; errors of the user are returned, since Ray would take an exception for a lost worker and retry.

    handle: every event. notify: what this worker waits for while storage is unreachable.
    """
    report: dict[str, Any] = {}
    seconds = 60 * config.run.storage_minutes
    try:
        with retry_context(seconds, notify=lambda text: notify(StatusNote(text)), stopping=workers.stopping):
            for event in pretrain(config, workers):
                handle(event)
                if isinstance(event, Finished):
                    report = event.report
    except UserError as error:
        return RunOutcome("user_error", str(error))
    except RunStopped as stop:
        return RunOutcome("stopped", str(stop))
    return RunOutcome("finished", report=report)
