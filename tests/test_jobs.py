"""What a user gets wrong, through the real commands: exit code 2, a sentence on stderr, no traceback, nothing lost."""

from __future__ import annotations

import os
import re
import resource
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from raycluster.cli import run_command
from raycluster.config import load
from raycluster.run.checkpoint import list_checkpoints
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.run.state import Config

ROOT = Path(__file__).parent.parent
Outcome = tuple[int, str, str]
Command = Callable[..., Outcome]


@pytest.fixture(scope="module")
def yaml_file(tmp_path_factory: pytest.TempPathFactory, tiny_yaml: str) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(tiny_yaml)
    return path


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """(job, words...) -> (exit code, stdout, stderr), in this process."""

    def run(job: str, *words: object) -> Outcome:
        capfd.readouterr()  # what came before
        main = runpy.run_path(str(ROOT / "jobs" / f"{job}.py"))["main"]
        with pytest.raises(SystemExit) as caught:
            run_command(main, [str(word) for word in words])
        return (caught.value.code, *capfd.readouterr())  # type: ignore[return-value]

    return run


def assert_mistake(outcome: Outcome, *told: str) -> None:
    code, out, err = outcome
    assert code == 2, outcome
    assert "Traceback" not in out + err
    assert err.startswith("error: ")
    for pattern in told:
        assert re.search(pattern, err), err


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_mistakes_in_the_configuration_come_all_at_once(command: Command, yaml_file: Path, tmp_path: Path) -> None:
    words = ["training.epoch=3", "method.name=deepclustre", "training.lr=-1", "evaluation.probes=[kmn]"]
    outcome = command("pretrain", yaml_file, f"run.dir={tmp_path / 'run'}", *words)
    assert_mistake(
        outcome,
        r"4 mistakes",
        r"training\.epoch: .*did you mean epochs\?",
        r"method\.name: .*did you mean deepcluster\?",
        r"training\.lr: seen -1; wanted greater than 0",
        r"evaluation: probes: seen kmn; .*did you mean knn\?",
    )
    assert not (tmp_path / "run").exists()


def test_a_configuration_that_is_not_there(command: Command, yaml_file: Path) -> None:
    assert_mistake(
        command("pretrain", yaml_file.with_name("tinny.yaml")), "no configuration at .*tinny.yaml", "tiny.yaml"
    )


def test_data_that_cannot_be_used(command: Command, yaml_file: Path, tmp_path: Path, digits_folder: Path) -> None:
    """One after the other into the same run directory: a mistake leaves nothing behind that must be cleared away."""
    empty, texts, single = (tmp_path / name for name in ("empty", "texts", "single"))
    for folder in (empty, texts, single):
        folder.mkdir()
    (texts / "a.md").write_text("no picture")
    shutil.copy(digits_folder / "000.png", single)

    def run(*words: str) -> Outcome:
        return command("pretrain", yaml_file, f"run.dir={tmp_path / 'run'}", *words)

    assert_mistake(run(f"data.uri={tmp_path}/nothing"), "there is nothing at .*nothing")
    assert_mistake(run(f"data.uri={empty}"), "holds no files")
    assert_mistake(run(f"data.uri={texts}"), "holds no images but 1 x .md")
    assert_mistake(run(f"data.uri={single}"), "10 clusters, but .* holds 1 images")
    assert_mistake(run(f"data.uri={digits_folder}", "method.num_clusters=301"), "301 clusters, .* 300 images")
    assert_mistake(run("method.layer=conv7"), "method.layer: seen conv7", "conv1, conv2, conv3")
    assert_mistake(run("run.dir=/proc/run"), "/proc/run")
    assert_mistake(run("run.workers=0", "run.device=gpu"), "run.device: seen gpu; wanted auto where run.workers is 0")


def test_a_bucket_that_cannot_be_read(
    command: Command, yaml_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "nobody")
    uri = f"s3://bucket/pictures?endpoint_override=127.0.0.1:{closed_port()}&scheme=http"
    assert_mistake(command("pretrain", yaml_file, f"run.dir={tmp_path / 'run'}", f"data.uri={uri}"), "s3://bucket")


def test_other_jobs(command: Command, tmp_path: Path, digits_folder: Path) -> None:
    assert_mistake(command("evaluate", tmp_path / "nothing"), "nothing")
    assert_mistake(command("prepare", f"data.uri={digits_folder}"), "out: missing")
    assert_mistake(command("prepare", f"data.uri={digits_folder}", f"out={digits_folder}"), "choose an empty folder")


def test_as_a_shell_sees_it(yaml_file: Path, tmp_path: Path) -> None:
    words = [sys.executable, "jobs/pretrain.py", str(yaml_file), f"run.dir={tmp_path}", "data.uri=/nowhere"]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True, check=False
    )
    assert_mistake((done.returncode, done.stdout, done.stderr), r"^error: data.uri = /nowhere: there is nothing .*\n$")


def test_divergence(ray_cluster: None, command: Command, yaml_file: Path, tmp_path: Path) -> None:
    outcome = command("pretrain", yaml_file, f"run.dir={tmp_path}", "training.lr=1e6")
    assert_mistake(outcome, "training diverged", "Lower training.lr")


def test_a_full_disk_loses_nothing(yaml_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(yaml_file), f"run.dir={tmp_path}", "run.keep_checkpoints=9", "run.checkpoint_minutes=1e-9"]

    def run() -> Outcome:
        with pytest.raises(SystemExit) as caught:
            run_command(without_ray, words)
        return (caught.value.code, *capsys.readouterr())  # type: ignore[return-value]

    assert run()[0] == 0
    finished, first = (tmp_path / "metrics.jsonl").read_text(), list_checkpoints(str(tmp_path))[0]
    for uri in list_checkpoints(str(tmp_path))[1:]:
        Path(uri).unlink()
    (tmp_path / "report.json").unlink()

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (Path(first).stat().st_size // 2, unlimited[1]))
    try:
        outcome = run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert_mistake(outcome, "checkpoints/round-.*File too large")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [Path(first).name]

    assert run()[0] == 0
    assert assignments((tmp_path / "metrics.jsonl").read_text()) == assignments(finished)


def without_ray(path: str, *overrides: str) -> None:
    list(pretrain(load(Config, path, overrides), LocalWorkers()))


def assignments(lines: str) -> list[str]:
    return re.findall(r'"assignments": "(\w+)"', lines)
