"""One `TorchTrainer.fit` per run: workers come and go, the train function means "go on from where it stands"."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from hashlib import sha256
from typing import Any, cast

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from raycluster.distributed.control.channel import WorkerClient, open_channel
from raycluster.distributed.control.driver import listen
from raycluster.distributed.control.stall_detector import StallDetector
from raycluster.distributed.errors import user_errors
from raycluster.distributed.features.feature_pool import FeaturePoolClient
from raycluster.distributed.features.pool_manager import FeaturePoolManager
from raycluster.distributed.session import TRAIN_SLOT, ray_session, request_stop, stop_on_signals, stop_reason
from raycluster.distributed.train.autoscaler import start_data_actors
from raycluster.distributed.train.policies import RetryFailurePolicy, is_loss, reason, scaling_policy
from raycluster.distributed.train.ray_env import prepare_environment
from raycluster.distributed.workers import RayWorkers
from raycluster.events import Event, Round, StatusNote
from raycluster.io import storage
from raycluster.io.retry import retry_context
from raycluster.monitoring.console import ConsoleReporter
from raycluster.monitoring.tracker import StatusWriter
from raycluster.run.lease import acquire_lease
from raycluster.run.loop import pretrain
from raycluster.run.state import Config, validate_and_initialize
from raycluster.training.determinism import prepare_process
from raycluster.types import RunStopped, UserError

_CLEANER_SECONDS = 0.5


def fit(config: Config, reporter: ConsoleReporter | None = None) -> str:
    """Pre-train as `config` says, from the beginning or from where its run directory stands; `reporter` sees it.

    Returns what to print at the end. Raises UserError for users' mistakes and Stopped when it was asked to stop.
    """
    prepare_environment()
    with ExitStack() as stack:
        stack.enter_context(acquire_lease(config.run.dir, lost=request_stop))
        validate_and_initialize(config)
        config = replace(config, run=replace(config.run, resume="auto"))  # whoever starts again goes on
        reporter = reporter or ConsoleReporter(config)
        stack.callback(reporter.close)
        with StatusWriter(config.run.dir) as status_writer:

            def handle(event: Event) -> None:
                status_writer.handle(event)
                reporter.handle(event)

            stack.enter_context(ray_session(train_slots=config.run.workers_wanted()[1]))
            stack.enter_context(stop_on_signals())  # after Ray, which has a handler of SIGTERM of its own
            stack.enter_context(user_errors())
            outcome, text = _fit(config, handle)
            if outcome == "mistake":
                raise UserError(text)
            if outcome == "stopped":
                if stop_reason():
                    raise UserError(stop_reason())
                raise RunStopped(text)
    return reporter.summary


def _fit(config: Config, handle: Callable[[Event], None]) -> tuple[str, str]:
    """One call of Ray Train, however many groups of workers come and go meanwhile: (outcome, text)."""
    least, most, on_gpu = _placement(config)
    start_data_actors()
    pool_manager = FeaturePoolManager(f"features-{uuid.uuid4().hex[:8]}", config.run.actors)
    loop: dict[str, Any] = {"config": config, "actors": pool_manager.actors}
    slot = "GPU" if on_gpu else TRAIN_SLOT
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="raycluster-", ignore_cleanup_errors=True))
        channel = open_channel() if most else None
        if channel is not None:
            loop["line"] = channel
            stack.enter_context(listen(channel, handle, pool_manager, StallDetector(slot, least)))
        else:
            loop["see"] = handle
        trainer = _Trainer(
            _train,  # type: ignore[arg-type]
            train_loop_config=loop,
            scaling_config=ScalingConfig(
                num_workers=most if least == most else (least, most),
                use_gpu=on_gpu,
                resources_per_worker={"GPU": 1} if on_gpu else {TRAIN_SLOT: 1, "CPU": 0},
                elastic_resize_monitor_interval_s=config.run.resize_seconds,
            ),
            run_config=RunConfig(  # type: ignore[arg-type]
                name=f"raycluster-{uuid.uuid4().hex[:12]}",  # a name Ray has seen would resume Ray's own snapshot
                storage_path=folder,
                failure_config=FailureConfig(max_failures=config.run.max_failures),
            ),
        )
        trainer.channel, trainer.requester = channel, sha256(storage.absolute(config.run.dir).encode()).hexdigest()[:16]
        try:
            found: tuple[str, str] = trainer.fit().return_value  # type: ignore[attr-defined]
        except TrainingFailedError as error:
            if not is_loss(error):
                raise
            raise UserError(
                f"training workers were lost more than run.max_failures = {config.run.max_failures} times, the last "
                f"time{reason(error)}. What was saved is safe: the same command goes on from the last checkpoint, with "
                "a larger run.max_failures or on machines that last longer"
            ) from error
    return found


class _Trainer(TorchTrainer):
    """With our policies in place of Ray's, without its handler of Ctrl-C, and at an end as soon as the workers are."""

    channel: ActorHandle | None = None
    requester = ""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if self.channel is not None:
            scaling, run = cast("ScalingConfig", self.scaling_config), cast("RunConfig", self.run_config)
            arguments["scaling_policy"] = scaling_policy(scaling, self.requester, self.channel)
            arguments["failure_policy"] = RetryFailurePolicy(run.failure_config or FailureConfig(), self.channel)
        return super()._initialize_and_run_controller(**arguments)  # type: ignore[misc]

    def _create_default_callbacks(self) -> list[Any]:
        """Ray's cleaner of reserved places, asked to end, first looks for a dashboard that may not be there: 12 s."""
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        for callback in callbacks:
            if isinstance(callback, PlacementGroupCleanerCallback):
                callback._stop_timeout = _CLEANER_SECONDS
        return callbacks

    def _register_sigint_handler(self, controller: object) -> None:
        """Leave Ctrl-C to `stop_on_signals`: Ray's own handler ends the workers where they are, unsaved."""


def _placement(config: Config) -> tuple[int, int, bool]:
    """(fewest workers, most workers, one GPU each?), checked against what the cluster has, or is said to get."""
    total, device = ray.cluster_resources(), config.run.device
    gpus = int(total.get("GPU", 0)) if device != "cpu" else 0
    least, most = config.run.workers_wanted()
    if config.run.workers == "auto":
        least, most = (1, gpus) if gpus > 1 else (0, 0)
    if most > config.training.num_microbatches:
        raise UserError(
            f"run.workers allows {most} workers, but a global batch of {config.training.global_batch} holds only "
            f"{config.training.num_microbatches} microbatches of {config.training.microbatch}; "
            "allow fewer workers or make training.microbatch smaller"
        )
    if most and not gpus and TRAIN_SLOT not in total and device == "auto":
        raise UserError(
            f"run.workers is {config.run.workers}, but no node of this cluster has GPUs or the resource {TRAIN_SLOT}; "
            f"start its nodes with --resources='{{\"{TRAIN_SLOT}\": 1}}', or set run.workers=0 to train in the job; "
            "where an autoscaler has yet to bring them, set run.device=gpu or run.device=cpu"
        )
    return least, most, bool(most and (gpus or device == "gpu"))


def _train(loop: dict[str, Any]) -> tuple[str, str]:
    """What every worker runs, from the top, whenever Ray starts the group."""
    prepare_process()
    config: Config = loop["config"]
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    worker_client = WorkerClient(loop["line"]) if "line" in loop else None
    handle = worker_client.publish if worker_client else loop["see"]
    retry_seconds = 60 * config.run.storage_minutes
    workers = RayWorkers(
        FeaturePoolClient(loop["actors"]),
        rank=rank,
        size=size,
        worker_client=worker_client,
        retry_seconds=retry_seconds,
    )
    workers.decode_cpus = config.run.decode_cpus
    try:
        with retry_context(retry_seconds, notify=lambda text: handle(StatusNote(text)), stopping=workers.stopping):
            for event in pretrain(config, workers):
                if rank == 0:
                    handle(event)
                if isinstance(event, Round):
                    figures = {key: value for key, value in event.record.items() if isinstance(value, (int, float))}
                    ray.train.report(figures)
    except UserError as error:  # raised, it would be taken for a lost worker and tried again
        return "mistake", str(error)
    except RunStopped as stop:
        return "stopped", str(stop)
    return "finished", ""
