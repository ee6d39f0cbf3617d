"""Pre-training on Ray: one `TorchTrainer.fit` per run. Whenever its workers start, they resume from the latest
checkpoint."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from hashlib import sha256

import ray
import torch
from ray.actor import ActorHandle
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from raycluster.distributed import ray_internals
from raycluster.distributed.control.channel import open_channel
from raycluster.distributed.control.driver import listen
from raycluster.distributed.control.stall_detector import StallDetector
from raycluster.distributed.errors import user_errors
from raycluster.distributed.features.pool_manager import FeaturePoolManager
from raycluster.distributed.session import TRAIN_SLOT, ray_session, request_stop, stop_on_signals, stop_reason
from raycluster.distributed.train.ray_env import prepare_environment
from raycluster.distributed.train.worker_errors import describe_loss, is_worker_loss
from raycluster.distributed.train.worker_loop import RunOutcome, WorkerConfig, train_in_process, train_worker
from raycluster.events import Event
from raycluster.io import storage
from raycluster.monitoring.console import ConsoleReporter, summary
from raycluster.monitoring.tracker import StatusWriter
from raycluster.run.config import Config
from raycluster.run.lease import acquire_lease
from raycluster.run.validation import validate_and_initialize
from raycluster.types import RunStopped, UserError


@dataclass(frozen=True)
class Placement:
    """How many training workers a run has, and whether each has a GPU; none: it trains in the job's process."""

    min_workers: int = 0
    max_workers: int = 0
    use_gpu: bool = False

    @property
    def resource(self) -> str:
        """The resource of which every worker takes one."""
        return "GPU" if self.use_gpu else TRAIN_SLOT


def fit(config: Config, reporter: ConsoleReporter | None = None) -> str:
    """Pre-train as `config` says, from the beginning or from the latest checkpoint of its run directory.

    reporter: shows the events. Returns the summary to print at the end. Raises UserError for users' errors and
    RunStopped when asked to stop, with everything saved.
    """
    prepare_environment()
    with ExitStack() as stack:
        stack.enter_context(acquire_lease(config.run.dir, lost=request_stop))
        validate_and_initialize(config)
        config = replace(config, run=replace(config.run, resume="auto"))  # workers that restart must resume
        reporter = reporter or ConsoleReporter(config)
        stack.callback(reporter.close)
        status_writer = stack.enter_context(StatusWriter(config.run.dir))

        def handle(event: Event) -> None:
            status_writer.handle(event)
            reporter.handle(event)

        stack.enter_context(ray_session(train_slots=config.run.workers_wanted()[1]))
        stack.enter_context(stop_on_signals())  # after Ray, which installs its own handler of SIGTERM
        stack.enter_context(user_errors())
        outcome = _run(config, handle)
        if outcome.status == "user_error":
            raise UserError(outcome.text)
        if outcome.status == "stopped":
            if stop_reason():
                raise UserError(stop_reason())
            raise RunStopped(outcome.text)
    return summary(outcome.report, config.run.dir)


def _run(config: Config, handle: Callable[[Event], None]) -> RunOutcome:
    placement = place_workers(config, ray.cluster_resources(), gpu_visible=torch.cuda.is_available())
    with closing(FeaturePoolManager(f"features-{uuid.uuid4().hex[:8]}", config.run.actors)) as pool_manager:
        if not placement.max_workers:
            return train_in_process(config, pool_manager.actors, handle)
        return _run_on_workers(config, placement, pool_manager, handle)


def _run_on_workers(
    config: Config, placement: Placement, pool_manager: FeaturePoolManager, handle: Callable[[Event], None]
) -> RunOutcome:
    ray_internals.check()
    ray_internals.start_data_actors()
    channel = open_channel()
    stall_detector = StallDetector(placement.resource, placement.min_workers)
    with (
        tempfile.TemporaryDirectory(prefix="raycluster-", ignore_cleanup_errors=True) as folder,
        listen(channel, handle, pool_manager, stall_detector),
    ):
        trainer = _trainer(WorkerConfig(config, pool_manager.actors, channel), placement, folder)
        try:
            outcome: RunOutcome = trainer.fit().return_value  # type: ignore[attr-defined]
        except TrainingFailedError as error:
            if not is_worker_loss(error):
                raise
            raise UserError(
                f"training workers were lost more than run.max_failures = {config.run.max_failures} times, the last "
                f"time{describe_loss(error)}. The checkpoints are safe: the same command resumes from the latest one, "
                "with a larger run.max_failures or on more reliable machines"
            ) from error
    return outcome


class _Trainer(ray_internals.TrainerHooks, TorchTrainer):
    """TorchTrainer with policies of our own."""


def _trainer(worker_config: WorkerConfig, placement: Placement, folder: str) -> _Trainer:
    run, least, most = worker_config.config.run, placement.min_workers, placement.max_workers
    scaling = ScalingConfig(
        num_workers=most if least == most else (least, most),
        use_gpu=placement.use_gpu,
        resources_per_worker={"GPU": 1} if placement.use_gpu else {TRAIN_SLOT: 1, "CPU": 0},
        elastic_resize_monitor_interval_s=run.resize_seconds,
    )
    failure = FailureConfig(max_failures=run.max_failures)
    return _Trainer(
        train_worker,
        train_loop_config={"worker": worker_config},
        scaling_config=scaling,
        run_config=RunConfig(
            name=f"raycluster-{uuid.uuid4().hex[:12]}",  # a name Ray has seen would resume Ray's own snapshot
            storage_path=folder,
            failure_config=failure,
        ),
        policies=_policies(scaling, failure, run.dir, worker_config.channel),
    )


def _policies(scaling: ScalingConfig, failure: FailureConfig, run_dir: str, channel: ActorHandle) -> dict[str, object]:
    """Our policies, as far as the installed Ray has what they need; it uses its own for the rest."""
    policies: dict[str, object] = {}
    # Imported here: these modules derive from private classes of Ray, which runs without workers do not need.
    if ray_internals.available("scaling policy"):
        from raycluster.distributed.train.scaling_policy import scaling_policy

        requester = sha256(storage.absolute(run_dir).encode()).hexdigest()[:16]
        policies["scaling_policy"] = scaling_policy(scaling, requester, channel)
    if ray_internals.available("failure policy"):
        from raycluster.distributed.train.failure_policy import RetryFailurePolicy

        policies["failure_policy"] = RetryFailurePolicy(failure, channel)
    return policies


def place_workers(config: Config, resources: Mapping[str, float], *, gpu_visible: bool) -> Placement:
    """The workers of a run on a cluster with these total resources.

    gpu_visible: whether the job's own process can use a GPU. `run.workers: auto` trains there, unless the cluster has
    several GPUs or its only one is on another node. Raises UserError if the settings and the cluster do not fit.
    """
    run, training = config.run, config.training
    gpus = int(resources.get("GPU", 0)) if run.device != "cpu" else 0
    least, most = run.workers_wanted()
    if run.workers == "auto" and (gpus > 1 or not gpu_visible):
        wanted = max(gpus, 1 if run.device == "gpu" else 0)
        least, most = min(1, wanted), wanted
    if most > training.num_microbatches:
        raise UserError(
            f"run.workers allows {most} workers, but a global batch of {training.global_batch} holds only "
            f"{training.num_microbatches} microbatches of {training.microbatch}; "
            "allow fewer workers or make training.microbatch smaller"
        )
    if most and not gpus and TRAIN_SLOT not in resources and run.device == "auto":
        raise UserError(
            f"run.workers is {run.workers}, but no node of this cluster has GPUs or the resource {TRAIN_SLOT}; "
            f"start its nodes with --resources='{{\"{TRAIN_SLOT}\": 1}}', or set run.workers=0 to train in the job; "
            "where an autoscaler has yet to add them, set run.device=gpu or run.device=cpu"
        )
    return Placement(least, most, bool(most and (gpus or run.device == "gpu")))
