"""Every private name of Ray that raycluster uses, and what is used instead where a release lacks it.

Private names are grouped into features. A feature whose names are all there with the expected signatures is available;
without it Ray's public behaviour is used, and `check` says once what is lost. Nothing of Ray Train or Ray Data is
imported before a feature is used: tasks that only decode images, and runs without training workers, never pay for it.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import ray

_ANSWER_SECONDS = 10.0
_STATUS_SECONDS = 5
_CLEANER_SECONDS = 0.5

_TRAIN = "ray.train.v2._internal"
_POLICY = f"{_TRAIN}.execution.scaling_policy"
_FAILURE = f"{_TRAIN}.execution.failure_handling"
_TRAINER = "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer"
_COORDINATOR = "ray.data._internal.cluster_autoscaler"

ELASTIC_POLICY = f"{_POLICY}:ElasticScalingPolicy"
FIXED_POLICY = f"{_POLICY}:FixedScalingPolicy"
FAILURE_POLICY = f"{_FAILURE}.failure_policy:FailurePolicy"
_NOOP = f"{_POLICY}:NoopDecision"
_CLIENT = f"{_POLICY}.autoscaling_coordinator_client:TrainAutoscalingCoordinatorClient"
_FAILURE_DECISION = f"{_FAILURE}.failure_policy:FailureDecision"
_RETRYABLE = f"{_FAILURE}.default:RETRYABLE_CONTROLLER_ERRORS"
_IS_PREEMPTION = f"{_FAILURE}.default:_is_preemption_failure"
_HEALTH_CHECK_FAILED = f"{_TRAIN}.exceptions:WorkerHealthCheckFailedError"
_DRAINING_NODES = "ray._private.state:state.get_draining_nodes"
_GCS_CLIENT = "ray._raylet:GcsClient"
_STATUS_REPLY = "ray.core.generated.autoscaler_pb2:GetClusterStatusReply"
_CLEANER = f"{_TRAIN}.callbacks.placement_group_callback:PlacementGroupCleanerCallback"
_STATS_ACTOR = "ray.data._internal.stats:get_or_create_stats_actor"
_COORDINATOR_ACTOR = f"{_COORDINATOR}:get_or_create_autoscaling_coordinator"
_BUFFER = "_max_num_blocks_in_streaming_gen_buffer"


@dataclass(frozen=True)
class Name:
    """A private name: `path` is "module:attribute.attribute".

    parameters: what raycluster passes to it or Ray passes to the override, None if it is not called. mentions:
    attributes and keywords that only the code of this function shows.
    """

    path: str
    parameters: tuple[str, ...] | None = None
    mentions: tuple[str, ...] = ()

    def is_usable(self) -> bool:
        """Whether the installed Ray has it, with this signature."""
        try:
            found = find(self.path)
        except (ImportError, AttributeError):
            return False
        if self.parameters is not None and not _accepts(found, self.parameters):
            return False
        if not self.mentions:
            return True
        code = getattr(inspect.unwrap(found), "__code__", None)
        return code is not None and set(self.mentions) <= {*code.co_names, *code.co_consts}


@dataclass(frozen=True)
class Feature:
    """Private names that are used together. lost: what raycluster does worse without them."""

    names: tuple[Name, ...]
    lost: str


_RUN_CONTROLLER = Name(f"{_TRAINER}._initialize_and_run_controller", ("scaling_policy", "failure_policy"))

FEATURES = {
    "scaling policy": Feature(
        (
            _RUN_CONTROLLER,
            Name(_NOOP),
            Name(_CLIENT, ("requester_id",)),
            Name(ELASTIC_POLICY, ("scaling_config",)),
            Name(FIXED_POLICY, ("scaling_config",)),
            Name(f"{_POLICY}:ScalingPolicy.__init__", mentions=("_requester_id", "_coordinator_client")),
            Name(f"{ELASTIC_POLICY}.after_controller_start", ("train_run_context",)),
            Name(
                f"{ELASTIC_POLICY}.make_decision_for_running_worker_group",
                ("worker_group_state", "worker_group_status"),
            ),
            Name(f"{ELASTIC_POLICY}.make_decision_for_non_running_worker_group", ()),
            Name(f"{ELASTIC_POLICY}._get_num_workers_for_resource_request", ()),
            Name(f"{ELASTIC_POLICY}._maybe_send_resource_request", ()),
            Name(f"{ELASTIC_POLICY}._send_resource_request", ()),
            Name(f"{ELASTIC_POLICY}._get_reserved_resources", ()),
            Name(f"{ELASTIC_POLICY}._count_possible_workers", ("reserved_resources",)),
            Name(f"{ELASTIC_POLICY}._get_resize_decision", ("num_workers",)),
        ),
        "workers are resized without a checkpoint first, an autoscaler is asked for all of run.workers at once, and a "
        "restarted job may wait 3 minutes for the resource request of a killed one to expire",
    ),
    "fresh reservations": Feature(
        (
            Name(f"{ELASTIC_POLICY}._autoscaling_coordinator"),
            Name(
                f"{_COORDINATOR}.default_autoscaling_coordinator:_AutoscalingCoordinatorActor.get_reserved_resources",
                ("requester_id", "recompute"),
            ),
        ),
        "after a lost node, workers may be scheduled for up to 20 s on resources that no longer exist",
    ),
    "failure policy": Feature(
        (
            _RUN_CONTROLLER,
            Name(FAILURE_POLICY, ("failure_config",)),
            Name(f"{FAILURE_POLICY}.make_decision", ("training_failed_error",)),
            Name(f"{_FAILURE_DECISION}.RETRY"),
            Name(f"{_FAILURE_DECISION}.RAISE"),
            Name(_RETRYABLE),
            Name(_IS_PREEMPTION, ("training_failed_error",)),
        ),
        "Ray's FailureConfig(max_failures) counts failures, and the status does not list them",
    ),
    "health check failures": Feature(
        (Name(_HEALTH_CHECK_FAILED),), "a worker whose node died is reported as an error of Ray"
    ),
    "draining nodes": Feature(
        (Name(_DRAINING_NODES, ()),), "workers and feature actors may be placed on a node that is about to be removed"
    ),
    "infeasible requests": Feature(
        (Name(_GCS_CLIENT), Name("ray._raylet:InnerGcsClient.get_cluster_status", ("timeout_s",)), Name(_STATUS_REPLY)),
        "an autoscaler that cannot provide the maximum of run.workers may provide none",
    ),
    "Ray Data's actors": Feature(
        (Name(_STATS_ACTOR, ()), Name(_COORDINATOR_ACTOR, ())),
        "Ray Data may keep an idle node from being removed",
    ),
    "cleaner timeout": Feature(
        (Name(f"{_TRAINER}._create_default_callbacks", ()), Name(f"{_CLEANER}.__init__", mentions=("_stop_timeout",))),
        "without a dashboard, a run takes 12 s longer to end",
    ),
    "interrupt handler": Feature(
        (Name(f"{_TRAINER}._register_sigint_handler", ("controller",)),),
        "Ctrl-C may end the workers before they save; send SIGTERM instead",
    ),
    "read-ahead": Feature(
        (Name("ray.data:DataContext.__post_init__", mentions=(_BUFFER,)),), "images are decoded with less read-ahead"
    ),
    "session folder": Feature(
        (Name("ray:init", mentions=("_temp_dir",)),), "Ray leaves its session files in its default folder"
    ),
}


def find(path: str) -> Any:
    """The object at "module:attribute.attribute"; raises ImportError or AttributeError."""
    module, _, attributes = path.partition(":")
    found: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found


def base_class(path: str) -> Any:
    """The class at `path` to derive from, or `object` where this Ray has none: the feature is then unavailable."""
    try:
        return find(path)
    except (ImportError, AttributeError):
        return object


def _accepts(function: Any, parameters: tuple[str, ...]) -> bool:
    """Whether all of `parameters` can be passed by name, and no other is required."""
    try:
        found = [one for one in inspect.signature(function).parameters.values() if one.name != "self"]
    except (TypeError, ValueError):
        return False
    if any(one.kind is one.VAR_KEYWORD for one in found):
        return True
    required = {one.name for one in found if one.default is one.empty and one.kind is not one.VAR_POSITIONAL}
    return required <= set(parameters) <= {one.name for one in found}


@cache
def missing(feature: str) -> tuple[str, ...]:
    """The private names of `feature` that this Ray lacks, or has with another signature."""
    names = FEATURES[feature].names
    return tuple(".".join([name.path.replace(":", "."), *name.mentions]) for name in names if not name.is_usable())


def available(feature: str) -> bool:
    """Whether all private names of `feature` can be used."""
    return not missing(feature)


@cache
def check() -> None:
    """Log one line of warning, once per process, if this Ray lacks private names: which, and what is lost."""
    lacking = {feature: missing(feature) for feature in FEATURES if not available(feature)}
    if not lacking:
        return
    names = dict.fromkeys(name for names in lacking.values() for name in names)
    lost = "; ".join(FEATURES[feature].lost for feature in lacking)
    logging.getLogger(__name__).warning(
        "Ray %s lacks %s, or has it with another signature. Ray's public behaviour is used instead: %s",
        ray.__version__,
        ", ".join(names),
        lost,
    )


# ------------------------------------------------------------------------------------------------------------ Ray Train


class TrainerHooks:
    """Mixin of TorchTrainer. policies: `scaling_policy` and `failure_policy` in place of Ray's, each optional."""

    def __init__(self, *args: Any, policies: Mapping[str, object], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._own_policies = policies

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        return cast("Any", super())._initialize_and_run_controller(**{**arguments, **self._own_policies})

    def _create_default_callbacks(self, *args: Any, **kwargs: Any) -> Any:
        """Shorten the end: Ray's cleaner of placement groups looks for a dashboard that may not exist, for 12 s."""
        callbacks = cast("Any", super())._create_default_callbacks(*args, **kwargs)
        if available("cleaner timeout"):
            for callback in callbacks:
                if isinstance(callback, find(_CLEANER)):
                    callback._stop_timeout = _CLEANER_SECONDS
        return callbacks

    def _register_sigint_handler(self, *args: Any, **kwargs: Any) -> None:
        """Leave Ctrl-C to `stop_on_signals`: Ray's own handler ends the workers before they save."""


class RequesterHooks:
    """Mixin of Ray's scaling policies: resources are requested under the name of the run.

    A job that resumes a run then replaces the request of one that was killed. Ray names requests after the job: the old
    one would hold its resources until it expires, after three minutes.
    """

    def __init__(self, scaling_config: Any, requester: str) -> None:
        cast("Any", super()).__init__(scaling_config)
        self._requester = requester

    def after_controller_start(self, train_run_context: Any) -> None:
        self._requester_id = f"raycluster-{self._requester}"
        self._coordinator_client = find(_CLIENT)(self._requester_id)
        cast("Any", self)._send_resource_request()


class ElasticHooks(RequesterHooks):
    """Mixin of Ray's elastic policy: what a subclass may ask and override, under names that are not Ray's."""

    scaling_config: Any

    def workers_to_request(self) -> int:
        """How many workers the autoscaler is asked for."""
        return int(self.scaling_config.max_workers)

    def update_request(self) -> bool:
        """Called a few times a second; returns whether `workers_to_request` changed."""
        return False

    def send_request(self) -> None:
        """Request resources if the number changed, or the last request is about to expire."""
        self._maybe_send_resource_request()

    def possible_workers(self) -> int | None:
        """How many workers the resources reserved for the run would hold, None if that is unknown."""
        reserved = self._get_reserved_resources()
        return None if reserved is None else int(cast("Any", self)._count_possible_workers(reserved))

    def resize_to(self, num_workers: int) -> Any:
        """The decision to restart the group with so many workers."""
        return cast("Any", self)._get_resize_decision(num_workers)

    def _get_num_workers_for_resource_request(self) -> int:
        return self.workers_to_request()

    def _maybe_send_resource_request(self) -> None:
        if self.update_request():
            cast("Any", self)._send_resource_request()
        else:
            cast("Any", super())._maybe_send_resource_request()

    def _get_reserved_resources(self) -> Any:
        """Ray's answer may be 20 s old; this one is without nodes that died or are being drained."""
        if not available("fresh reservations"):
            return cast("Any", super())._get_reserved_resources()
        try:
            reserved = ray.get(
                cast("Any", self)._autoscaling_coordinator.get_reserved_resources.remote(
                    self._requester_id, recompute=True
                ),
                timeout=_ANSWER_SECONDS,
            )
            leaving = draining_nodes()
        except Exception:  # the head is busy or restarting; asked again at the next poll
            return None
        return {node: resources for node, resources in reserved.items() if node not in leaving}


def no_decision() -> Any:
    """The decision to leave the group as it is."""
    return find(_NOOP)()


def is_no_decision(decision: Any) -> bool:
    """Whether a scaling decision leaves the group as it is."""
    return isinstance(decision, find(_NOOP))


def failure_decision(restart: bool) -> Any:
    """The decision to restart the group or to raise the error."""
    decisions = find(_FAILURE_DECISION)
    return decisions.RETRY if restart else decisions.RAISE


def is_preemption(error: BaseException) -> bool:
    """Whether a failure of training was caused by a preempted node."""
    return bool(find(_IS_PREEMPTION)(error))


def is_retryable_controller_failure(failure: BaseException) -> bool:
    """Whether the controller failed to start the group in time, which may succeed later."""
    return isinstance(failure, find(_RETRYABLE))


def is_health_check_failure(failure: object) -> bool:
    """Whether Ray Train lost contact with this worker."""
    return available("health check failures") and isinstance(failure, find(_HEALTH_CHECK_FAILED))


# ---------------------------------------------------------------------------------------------------------- the cluster


def draining_nodes() -> set[str]:
    """Nodes that are about to be removed."""
    return set(find(_DRAINING_NODES)()) if available("draining nodes") else set()


def is_infeasible(resources: Mapping[str, float], count: int) -> bool:
    """Whether the autoscaler reports that the cluster can never have `count` bundles of these resources."""
    if not available("infeasible requests"):
        return False
    bundle = {name: amount for name, amount in resources.items() if amount > 0}
    try:
        client = find(_GCS_CLIENT)(address=ray.get_runtime_context().gcs_address)
        reply = find(_STATUS_REPLY).FromString(client.get_cluster_status(timeout_s=_STATUS_SECONDS))
    except Exception:  # the head is busy or restarting; asked again at the next poll
        return False
    return any(
        dict(by_count.request.resources_bundle) == bundle and by_count.count >= count
        for constraint in reply.autoscaling_state.infeasible_cluster_resource_constraints
        for by_count in constraint.resource_requests
    )


def start_data_actors() -> None:
    """Start Ray Data's long-lived actors on this node, where the job is.

    Ray Data creates them where data is first read, for the lifetime of the cluster: on a node that could otherwise
    become idle and be removed.
    """
    if available("Ray Data's actors"):
        find(_STATS_ACTOR)()
        find(_COORDINATOR_ACTOR)()


# ------------------------------------------------------------------------------------------------ Ray Data and Ray Core


def unlimited_read_ahead(context: Any) -> None:
    """Let tasks of this DataContext run ahead without limit; at Ray's two blocks, ordered tasks would idle."""
    if available("read-ahead"):
        setattr(context, _BUFFER, None)


def temp_dir_option(folder: str) -> dict[str, str]:
    """The keyword of `ray.init` that places Ray's session files in `folder`."""
    return {"_temp_dir": folder} if available("session folder") else {}
