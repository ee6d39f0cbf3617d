"""Launching on clouds, checked without one: Ray's own schemas and scheduler, KubeRay's structure, the image's files."""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint

from raycluster.config import load
from raycluster.run.config import Config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "cluster"
LAUNCHED = ["aws", "gcp"]


def read(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text()))


def checked(name: str) -> dict[str, Any]:
    """What the autoscaler gets to see, after all of Ray's own checks."""
    if name == "kuberay":
        cluster = copy.deepcopy(read(name)[0])
        cluster["metadata"]["namespace"] = "default"
        return _derive_autoscaling_config_from_ray_cr(cluster)
    config = prepare_config(read(name)[0])
    validate_config(config)
    return config


def launched(name: str, resources: dict[str, int], count: int, *, failing: str = "") -> dict[str, int]:
    """Which nodes Ray's scheduler would start for so many bundles, the nodes of one type failing to come up."""
    config = AutoscalingConfig(checked(name))
    types = config.get_node_type_configs()
    [head] = [kind for kind in types if kind.startswith("head")]
    bundles = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(resources)] * count)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs={kind: found for kind, found in types.items() if kind != head},
        max_num_nodes=config.get_max_num_worker_nodes(),
        cluster_resource_constraints=[ClusterResourceConstraint(resource_requests=bundles)],
        recoverable_resource_availabilities={failing: 0.0} if failing else {},
    )
    reply = ResourceDemandScheduler().schedule(request)
    assert bool(reply.infeasible_cluster_resource_constraints) != bool(reply.to_launch)
    return {launch.instance_type.replace("-", "_"): launch.count for launch in reply.to_launch}


@pytest.mark.parametrize("name", [*LAUNCHED, "kuberay"])
def test_nodes_that_a_run_gets(name: str) -> None:
    worker, decoding = {"GPU": 1}, {"CPU": 1}
    assert launched(name, worker, 1) == {"gpu_spot": 1}
    spot = next(kind for kind in checked(name)["available_node_types"] if re.fullmatch("gpu.spot", kind))
    assert launched(name, worker, 1, failing=spot) == {"gpu_on_demand": 1}
    assert launched(name, worker, 10) == {"gpu_spot": 8, "gpu_on_demand": 2}
    assert launched(name, worker, 11) == {}  # all or nothing: raycluster then asks for fewer
    assert launched(name, decoding, 30) == {"decode_spot": 2}


@pytest.mark.parametrize("name", [*LAUNCHED, "kuberay"])
def test_nothing_runs_on_the_head_but_jobs(name: str) -> None:
    config = checked(name)
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"]["CPU"] == 0 and "GPU" not in head["resources"]
    assert all(kind.get("min_workers", 0) == 0 for kind in config["available_node_types"].values())
    assert config["idle_timeout_minutes"] == 5


@pytest.mark.parametrize("name", LAUNCHED)
@pytest.mark.parametrize("change", [{"max_worker": 3}, {"head_node_type": "heads"}, {"max_workers": "many"}])
def test_errors_would_be_found(name: str, change: dict[str, Any]) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(prepare_config({**read(name)[0], **change}))


# -------------------------------------------------------------------------------------------------------------- KubeRay


def strict(required: str = "", **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def many(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


TEXT, WHOLE, YES = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
AMOUNTS = {"type": "object", "additionalProperties": {"type": ["integer", "string"]}}
RESOURCES = strict(requests=AMOUNTS, limits=AMOUNTS)
CONTAINER = strict(
    "name image",
    name=TEXT,
    image=TEXT,
    ports=many(strict("containerPort", containerPort=WHOLE, name={"type": "string", "maxLength": 15})),
    env=many(strict("name", name=TEXT, value=TEXT)),
    envFrom=many(strict(secretRef=strict(name=TEXT, optional=YES))),
    resources=RESOURCES,
    volumeMounts=many(strict("name mountPath", name=TEXT, mountPath=TEXT)),
)
POD = strict(
    "containers",
    containers=many(CONTAINER),
    volumes=many(strict("name", name=TEXT, emptyDir=strict(medium=TEXT))),
    restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
    terminationGracePeriodSeconds=WHOLE,
    nodeSelector=TEXTS,
    tolerations=many(strict(key=TEXT, operator={"enum": ["Exists", "Equal"]}, effect=TEXT, value=TEXT)),
)
GROUP = {"rayStartParams": TEXTS, "template": strict("spec", metadata={"type": "object"}, spec=POD)}
CLUSTER = strict(
    "headGroupSpec",
    rayVersion=TEXT,
    enableInTreeAutoscaling=YES,
    autoscalerOptions=strict(
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=WHOLE,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        resources=RESOURCES,
    ),
    headGroupSpec=strict("rayStartParams template", **GROUP),
    workerGroupSpecs=many(
        strict(
            "groupName minReplicas maxReplicas rayStartParams template",
            groupName=TEXT,
            replicas=WHOLE,
            minReplicas=WHOLE,
            maxReplicas=WHOLE,
            **GROUP,
        )
    ),
)
JOB = strict(
    entrypoint=TEXT,
    clusterSelector=TEXTS,
    submitterConfig=strict(backoffLimit=WHOLE),
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
)
# The part of the published definitions (KubeRay 1.6, ray.io/v1) that the file uses; what is not named here is refused.
KINDS = {
    kind: strict(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=strict("name", name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}),
        spec=spec,
    )
    for kind, spec in (("RayCluster", CLUSTER), ("RayJob", JOB))
}


def test_kuberay_structure() -> None:
    documents = read("kuberay")
    for document in documents:
        jsonschema.validate(document, KINDS[document["kind"]])
    cluster, job = documents
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    for group in [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} <= volumes


def test_kuberay_entrypoint_is_a_run_that_loads() -> None:
    python, job, path, *overrides = shlex.split(read("kuberay")[1]["spec"]["entrypoint"])
    assert python == "python" and in_repository(job).exists()
    config = load(Config, in_repository(path), overrides)
    assert config.run.device == "gpu" and config.run.workers_wanted() == (1, 10)


# ----------------------------------------------------------------------------------------------------------- the image


def in_repository(path: str) -> Path:
    return ROOT / path.removeprefix("/raycluster/")


def copied() -> list[str]:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    return [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]


def test_the_image_copies_what_is_there_and_all_that_is_named() -> None:
    admitted = re.findall("^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    for source in copied():
        assert (ROOT / source).exists()
        assert source in admitted, f"{source} is hidden by .dockerignore"
    for file in FOLDER.iterdir():
        for path in re.findall(r"/raycluster/[\w./-]+\.\w+", file.read_text()):
            assert in_repository(path).exists(), path
            assert any(fnmatch(path.removeprefix("/raycluster/"), f"{source}*") for source in copied()), path


def test_arguments_of_the_image() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for name in re.findall(r"^ARG (\w+)", text, re.MULTILINE):
        assert f"${{{name}}}" in text and re.search(rf"^# .*\b{name}\b", text, re.MULTILINE)
    images = set(re.findall(r"REGISTRY/raycluster:\w+", text))
    for file in FOLDER.glob("*.yaml"):
        assert set(re.findall(r"REGISTRY/raycluster:\w+", file.read_text())) == images


# ----------------------------------------------------------------------------------------------------------- the notice


class Metadata(BaseHTTPRequestHandler):
    """The metadata servers of both clouds, before and after the notice."""

    noticed = threading.Event()

    def do_PUT(self) -> None:
        self._answer(200, "a token")

    def do_GET(self) -> None:
        if self.path.endswith("/preempted"):
            self._answer(200, str(self.noticed.is_set()).upper())
        elif self.headers.get("X-aws-ec2-metadata-token") != "a token":
            self._answer(401, "")
        else:
            self._answer(200 if self.noticed.is_set() else 404, "")

    def _answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[str]:
    Metadata.noticed.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_spot_notice_becomes_a_drain(metadata: str, tmp_path: Path) -> None:
    told = tmp_path / "told"
    (tmp_path / "ray").write_text(f'#!/bin/sh\necho "$@" >> {told}\n')
    (tmp_path / "ray").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "METADATA": metadata}
    waiting = [subprocess.Popen([str(FOLDER / "spot_notice.sh"), cloud], env=environment) for cloud in LAUNCHED]
    with pytest.raises(subprocess.TimeoutExpired):
        waiting[0].wait(timeout=0.5)
    assert not told.exists()
    Metadata.noticed.set()
    assert [process.wait(timeout=20) for process in waiting] == [0, 0]
    lines = sorted(told.read_text().splitlines())
    assert all(line.startswith("drain-node --reason DRAIN_NODE_REASON_PREEMPTION") for line in lines)
    assert [line.split()[-1] for line in lines] == ["110", "25"]
