"""Sweeps on Ray Tune. Every trial is an ordinary run; Ray Train owns the workers of a trial that has any."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from contextlib import ExitStack
from functools import partial
from hashlib import sha256
from typing import Any

import ray
import ray.tune
from ray.actor import ActorHandle
from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from raycluster.config import parse
from raycluster.data.manifest import DataSettings
from raycluster.distributed.errors import user_errors
from raycluster.distributed.features.trial_cache import SharedImages, SharingWorkers, start_feature_cache
from raycluster.distributed.session import TRAIN_SLOT, ray_session, request_stop
from raycluster.distributed.train.trainer import fit
from raycluster.events import Event, Round
from raycluster.io import storage
from raycluster.monitoring.console import ConsoleReporter
from raycluster.run.checkpoint import list_checkpoints
from raycluster.run.config import Config, Elastic
from raycluster.run.directory import read_config_text
from raycluster.run.loop import pretrain
from raycluster.sweep.config import SweepConfig
from raycluster.sweep.open import open_sweep
from raycluster.sweep.outputs import summary, trial_line, write_outputs
from raycluster.sweep.plan import Sweep
from raycluster.sweep.trials import ensure_prepared, manifest_uri
from raycluster.training.determinism import prepare_process
from raycluster.types import RunStopped, UserError

HEAD = "node:__internal_head__"  # a resource that every cluster has once and nothing else requests
TRIES = 3  # of a trial whose process dies
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the only way to silence it


def tune(config: SweepConfig) -> str:
    """Run a sweep, from the beginning or from the state in its directory; returns the summary to print.

    Raises UserError for users' errors, before any trial starts where that is possible.
    """
    _check_workers(config)
    sweep = open_sweep(config)
    workers = config.run.workers_wanted()[1]
    with ExitStack() as stack:
        slots = max(1, (os.cpu_count() or 1) // max(1, workers)) * workers
        stack.enter_context(ray_session(train_slots=slots, dashboard=workers > 0))
        stack.enter_context(user_errors())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="raycluster-", ignore_cleanup_errors=True))
        resources, concurrent = _resources(config)
        shared_images = SharedImages()
        if not workers:
            for uri in storage.list_files(storage.parent(manifest_uri(config, config.data))):
                shared_images.add(uri, config.data, min(config.views.train.size, config.views.eval.size))
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        remote: Any = ray.remote(num_cpus=0, max_restarts=-1)(StopRequests)
        stop_requests: ActorHandle | None = remote.remote() if workers else None
        run_trial = partial(
            _run_trial,
            data=config.data,
            shared_images=shared_images,
            feature_cache=start_feature_cache(),
            stop_requests=stop_requests,
        )
        stopper = _Stopper(sweep, stop_requests)
        tuner = Tuner(
            ray.tune.with_resources(run_trial, resources),
            tune_config=TuneConfig(
                search_alg=_Search(sweep),
                scheduler=stopper,
                num_samples=-1,
                max_concurrent_trials=concurrent,
                reuse_actors=not workers,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=RunConfig(storage_path=folder, verbose=0, failure_config=FailureConfig(max_failures=TRIES - 1)),
        )
        try:
            tuner.fit()
        except KeyboardInterrupt:
            raise RunStopped("interrupted; the same command resumes the sweep") from None
        except Exception:
            if stopper.config_error is None:
                raise
            raise stopper.config_error from None
    write_outputs(sweep)
    failed = [row.reason for row in sweep.rows() if row.status == "failed"]
    if failed and sweep.best() is None:
        raise UserError(f"no trial finished; the first that failed: {failed[0]}")
    return summary(sweep)


def _check_workers(config: SweepConfig) -> None:
    if isinstance(config.run.workers, Elastic):
        raise UserError(
            f"run.workers: seen {config.run.workers}; wanted a fixed number in a sweep, since two elastic trials would "
            "take workers from each other: 0 to train in the trial's own process, or the workers of each trial"
        )


def _resources(config: SweepConfig) -> tuple[dict[str, float], int | None]:
    """The resources a trial requests, and how many trials may run at a time (None: as many as the resources allow).

    A trial that trains in its own process requests its CPUs (and a GPU) and starts nothing else. One with training
    workers requests nothing that these, or reading, could wait for. Hence no trial ever waits for another.
    """
    total = ray.cluster_resources()
    workers = config.run.workers_wanted()[1]
    if not workers:
        most = max(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
        return {"CPU": min(float(config.training.threads), most), **({"GPU": 1.0} if total.get("GPU") else {})}, None
    kind = "GPU" if total.get("GPU") else TRAIN_SLOT
    if total.get(kind, 0) < workers:
        raise UserError(
            f"run.workers is {workers}, but the cluster has {total.get(kind, 0):g} {kind}; wanted one for every worker "
            "of a trial: add nodes, ask for fewer workers, or set run.workers=0"
        )
    return {HEAD: 0.001}, int(total[kind] // workers)


class _Unsaved:
    """Excludes state from Tune's snapshots, which are never read: a sweep resumes from its run directories."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Search(_Unsaved, Searcher):
    """Gives the trials of a sweep to Tune, and tells the sweep when they end."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__()
        self._sweep = sweep
        self._names: dict[str, str] = {}

    def suggest(self, trial_id: str) -> Any:
        trial = self._sweep.next()
        if trial is None:
            return Searcher.FINISHED if self._sweep.done else None
        ensure_prepared(self._sweep.config, trial)
        self._names[trial_id] = trial.name
        return {"name": trial.name, "run_dir": trial.run_dir}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = next(trial for trial in self._sweep.trials if trial.name == self._names[trial_id])
        reason = (result or {}).get("failed", "") or "its process died" * error
        self._sweep.close(trial.name, "failed" if reason else "finished", reason)
        print(trial_line(self._sweep, trial), flush=True)
        write_outputs(self._sweep)

    def save(self, checkpoint_path: str) -> None:
        """See `_Unsaved`."""

    def restore(self, checkpoint_path: str) -> None:
        """See `_Unsaved`."""


class StopRequests:
    """The names of trials that must stop themselves. If this actor is lost, they stop after their next round."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def add(self, name: str) -> None:
        self._names.add(name)

    def has(self, name: str) -> bool:
        return name in self._names


class _Stopper(_Unsaved, FIFOScheduler):
    """Asks the sweep after every round whether a trial continues.

    A trial with training workers is asked to stop. Tune would kill it, and Ray would then release the resources of its
    workers only where it has a dashboard.
    """

    def __init__(self, sweep: Sweep, stop_requests: ActorHandle | None) -> None:
        super().__init__()
        self._sweep, self._stop_requests = sweep, stop_requests
        self.config_error: UserError | None = None  # Tune would convert it to text

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        try:
            stop = "record" in result and self._sweep.tell(trial.config["name"], json.loads(result["record"]))
        except UserError as error:
            self.config_error = error
            raise
        if stop and self._stop_requests is not None:
            ray.get(self._stop_requests.add.remote(trial.config["name"]))
            return self.CONTINUE
        return self.STOP if stop else self.CONTINUE


class _TrialReporter(ConsoleReporter):
    """Shows a run, reports its rounds to Tune, and stops the run when the sweep asks for it."""

    def __init__(self, config: Config, name: str, stop_requests: ActorHandle | None) -> None:
        super().__init__(config)
        self._name, self._stop_requests = name, stop_requests

    def handle(self, event: Event) -> None:
        super().handle(event)
        if isinstance(event, Round):
            ray.tune.report({"record": json.dumps(event.record)})  # as text: Tune would flatten it
            # The report returns after the scheduler has decided.
            if self._stop_requests is not None and ray.get(self._stop_requests.has.remote(self._name)):
                request_stop("")


def _run_trial(
    trial: dict[str, str],
    *,
    data: DataSettings,
    shared_images: SharedImages,
    feature_cache: ActorHandle,
    stop_requests: ActorHandle | None,
) -> None:
    """The same run as `jobs/pretrain.py` with the configuration in the run directory."""
    prepare_process()
    run_dir = trial["run_dir"]
    config = parse(Config, read_config_text(run_dir))
    reporter = _TrialReporter(config, trial["name"], stop_requests)
    try:
        if config.run.workers_wanted()[1]:
            fit(config, reporter)
            return
        shared_images = shared_images if config.data == data else SharedImages()
        workers = SharingWorkers(shared_images, feature_cache, _key(config), begins=not list_checkpoints(run_dir))
        for event in pretrain(config, workers):
            reporter.handle(event)
    except RunStopped:  # at the request of the sweep
        return
    except UserError as error:  # not raised: Tune would retry the trial
        ray.tune.report({"failed": str(error)})
    finally:
        reporter.close()


def _key(config: Config) -> str:
    """Identifies all that first features depend on: images, views, weights, and the requested features."""
    method, evaluation = config.method, config.evaluation
    request = method.feature_request(0)
    parts = (config.data, config.views, config.model, config.seed, request, evaluation.layer, evaluation.test_uri)
    return sha256(repr(parts).encode()).hexdigest()[:16]
