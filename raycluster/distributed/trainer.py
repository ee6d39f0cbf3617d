"""One `TorchTrainer.fit` per run: workers come and go, the train function means "go on from where it stands"."""

from __future__ import annotations

import tempfile
import uuid
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from raycluster.distributed.errors import user_errors
from raycluster.distributed.line import Speaker, listening, open_line
from raycluster.distributed.pool import Pool, start_pool
from raycluster.distributed.session import TRAIN_SLOT, ray_session, stop_on_signals, stop_requested
from raycluster.distributed.workers import RayWorkers
from raycluster.pretrain import Round, pretrain
from raycluster.report import Watcher
from raycluster.run import Config, begin
from raycluster.training.process import prepare_process
from raycluster.types import Stopped, UserError


def fit(config: Config, watcher: Watcher | None = None) -> str:
    """Pre-train as `config` says, from the beginning or from where its run directory stands; `watcher` sees it.

    Returns what to print at the end. Raises UserError for users' mistakes and Stopped when it was asked to stop.
    """
    begin(config)
    config = replace(config, run=replace(config.run, resume="auto"))  # whoever starts again goes on
    watcher = watcher or Watcher(config)
    with ExitStack() as stack:
        stack.callback(watcher.close)
        stack.enter_context(ray_session(train_slots=config.run.workers_wanted()[1]))
        stack.enter_context(stop_on_signals())  # after Ray, which has a handler of SIGTERM of its own
        stack.enter_context(user_errors())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="raycluster-", ignore_cleanup_errors=True))
        least, most, on_gpu = _placement(config)
        actors = start_pool(f"features-{uuid.uuid4().hex[:8]}", config.run.actors or len(ray.nodes()))
        loop: dict[str, Any] = {"config": config, "actors": actors}
        if most:
            loop["line"] = open_line()
            stack.enter_context(listening(loop["line"], watcher))
        else:
            loop["watcher"] = watcher
        trainer = _Trainer(
            _train,  # type: ignore[arg-type]
            train_loop_config=loop,
            scaling_config=ScalingConfig(
                num_workers=most if least == most else (least, most),  # type: ignore[arg-type]
                use_gpu=on_gpu,
                resources_per_worker={"GPU": 1} if on_gpu else {TRAIN_SLOT: 1, "CPU": 0},
            ),
            run_config=RunConfig(
                name=f"raycluster-{uuid.uuid4().hex[:12]}",  # a name Ray has seen would resume Ray's own snapshot
                storage_path=folder,
                failure_config=FailureConfig(max_failures=config.run.max_failures),
            ),
        )
        outcome, text = trainer.fit().return_value  # type: ignore[attr-defined]
    if outcome == "mistake":
        raise UserError(text)
    if outcome == "stopped":
        raise Stopped(text)
    return watcher.summary


class _Trainer(TorchTrainer):
    def _register_sigint_handler(self, controller: object) -> None:
        """Leave Ctrl-C to `stop_on_signals`: Ray's own handler ends the workers where they are, unsaved."""


def _placement(config: Config) -> tuple[int, int, bool]:
    """(fewest workers, most workers, one GPU each?), checked against what the cluster has or could have."""
    total = ray.cluster_resources()
    gpus = int(total.get("GPU", 0))
    least, most = config.run.workers_wanted()
    if config.run.workers == "auto":
        least, most = (1, gpus) if gpus > 1 else (0, 0)
    if most > config.training.num_microbatches:
        raise UserError(
            f"run.workers allows {most} workers, but a global batch of {config.training.global_batch} holds only "
            f"{config.training.num_microbatches} microbatches of {config.training.microbatch}; "
            "allow fewer workers or make training.microbatch smaller"
        )
    if most and not gpus and TRAIN_SLOT not in total:
        raise UserError(
            f"run.workers is {config.run.workers}, but no node of this cluster has GPUs or the resource {TRAIN_SLOT}; "
            f"start its nodes with --resources='{{\"{TRAIN_SLOT}\": 1}}', or set run.workers=0 to train in the job"
        )
    return least, most, bool(most and gpus)


def _train(loop: dict[str, Any]) -> tuple[str, str]:
    """What every worker runs, from the top, whenever Ray starts the group."""
    prepare_process()
    config: Config = loop["config"]
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    speaker = Speaker(loop["line"]) if "line" in loop else None
    workers = RayWorkers(
        Pool(loop["actors"]), rank=rank, size=size, stopping=speaker.stopping if speaker else stop_requested
    )
    see = speaker.tell if speaker else loop["watcher"].see
    try:
        for event in pretrain(config, workers):
            if rank == 0:
                see(event)
            if isinstance(event, Round):
                ray.train.report({key: value for key, value in event.record.items() if isinstance(value, (int, float))})
    except UserError as error:  # raised, it would be taken for a lost worker and tried again
        return "mistake", str(error)
    except Stopped as stop:
        return "stopped", str(stop)
    return "finished", ""
