"""User errors through the real commands: exit code 2, a message on stderr, no traceback, no data lost."""

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
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain

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
        capfd.readouterr()  # earlier output
        main = runpy.run_path(str(ROOT / "jobs" / f"{job}.py"))["main"]
        with pytest.raises(SystemExit) as caught:
            run_command(main, [str(word) for word in words])
        return (caught.value.code, *capfd.readouterr())  # type: ignore[return-value]

    return run


def assert_user_error(outcome: Outcome, *patterns: str) -> None:
    code, out, err = outcome
    assert code == 2, outcome
    assert "Traceback" not in out + err
    assert err.startswith("error: ")
    for pattern in patterns:
        assert re.search(pattern, err), err


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_configuration_errors_are_reported_together(command: Command, yaml_file: Path, tmp_path: Path) -> None:
    words = ["training.epoch=3", "method.name=deepclustre", "training.lr=-1", "evaluation.probes=[kmn]"]
    outcome = command("pretrain", yaml_file, f"run.dir={tmp_path / 'run'}", *words)
    assert_user_error(
        outcome,
        r"4 errors",
        r"training\.epoch: .*did you mean epochs\?",
        r"method\.name: .*did you mean deepcluster\?",
        r"training\.lr: seen -1; wanted greater than 0",
        r"evaluation: probes: seen kmn; .*did you mean knn\?",
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run.dir="], r"run\.dir: seen ''; wanted text that is not empty; is a shell variable unset\?"),
        (["data.uri="], r"data\.uri: seen ''; wanted text that is not empty"),
        (["evaluation.test_uri="], r"evaluation\.test_uri: seen ''; wanted text that is not empty; give null for none"),
        (["epochs=5"], r"epochs: seen 5; .*did you mean training\.epochs\?"),
        (
            ["training.epochs=999999999999"],
            r"training\.epochs: seen 999999999999; wanted less than or equal to 100000$",
        ),
        (["method.num_clusters=1"], r"method\.num_clusters: seen 1; wanted greater than or equal to 2$"),
        ([f"seed={2**63}"], rf"seed: seen {2**63}; wanted less than {2**63}$"),
    ],
)
def test_values_that_no_run_accepts(
    command: Command, yaml_file: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    assert_user_error(command("pretrain", yaml_file, f"run.dir={tmp_path / 'run'}", *words), r"1 error\n", message)


def test_a_recipe_on_other_images(command: Command, tmp_path: Path, digits_folder: Path) -> None:
    """The shipped recipe evaluates on test images that other data does not come with."""
    recipe = ROOT / "configs" / "deepcluster_cifar10.yaml"
    words = [f"run.dir={tmp_path / 'run'}", f"data.uri={digits_folder}"]
    assert_user_error(command("pretrain", recipe, *words), r"set evaluation\.test_uri to .*, or to null")


def test_missing_configuration(command: Command, yaml_file: Path) -> None:
    assert_user_error(
        command("pretrain", yaml_file.with_name("tinny.yaml")), "no configuration at .*tinny.yaml", "tiny.yaml"
    )


def test_unusable_data(command: Command, yaml_file: Path, tmp_path: Path, digits_folder: Path) -> None:
    """All in the same run directory: an error leaves nothing there that would have to be removed."""
    empty, texts, single = (tmp_path / name for name in ("empty", "texts", "single"))
    for folder in (empty, texts, single):
        folder.mkdir()
    (texts / "a.md").write_text("no image")
    shutil.copy(digits_folder / "000.png", single)

    def run(*words: str) -> Outcome:
        return command("pretrain", yaml_file, f"run.dir={tmp_path / 'run'}", *words)

    assert_user_error(run(f"data.uri={tmp_path}/nothing"), "there is nothing at .*nothing")
    assert_user_error(run(f"data.uri={empty}"), "holds no files")
    assert_user_error(run(f"data.uri={texts}"), "holds no images but 1 x .md")
    assert_user_error(run(f"data.uri={single}"), "10 clusters, but .* holds 1 images")
    assert_user_error(run(f"data.uri={digits_folder}", "method.num_clusters=301"), "301 clusters, .* 300 images")
    assert_user_error(run("method.layer=conv7"), "method.layer: seen conv7", "conv1, conv2, conv3")
    assert_user_error(run("run.dir=/proc/run"), "/proc/run")
    assert_user_error(
        run("run.workers=0", "run.device=gpu"), "run.device: seen gpu; wanted auto where run.workers is 0"
    )


def test_unreadable_bucket(command: Command, yaml_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "nobody")
    uri = f"s3://bucket/images?endpoint_override=127.0.0.1:{closed_port()}&scheme=http"
    assert_user_error(command("pretrain", yaml_file, f"run.dir={tmp_path / 'run'}", f"data.uri={uri}"), "s3://bucket")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sed=1"], r"sed: seen 1; wanted one of the settings seed, only, repeat, out; did you mean seed\?"),
        (["0"], r"0: seen an override of another form; wanted section\.key=value"),
        (["repeat=0", "seed=-1", "out="], "3 errors"),
        (["seed=2024-01-01"], "seed: seen .*; wanted an integer"),
    ],
)
def test_chaos_checks_its_settings(command: Command, words: list[str], message: str) -> None:
    assert_user_error(command("chaos", *words), message)


def test_chaos_lists_the_faults(command: Command) -> None:
    code, out, err = command("chaos", "only=nosuch")
    assert (code, out) == (2, "")
    assert "loading Ray and torch" in err.splitlines()[0], "a line appears before anything slow"
    assert "only: seen nosuch; wanted a part of the name of a fault: training worker killed" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nosuch"], "benchmark: seen nosuch; wanted one of agglomerative, embeddings, .*, sinkhorn"),
        (["ingst"], r"did you mean ingest\?"),
        (["ingest", "foo=1"], "foo: seen 1; wanted one of the settings small, photos, processes, repeats; remove it"),
        (["modes", "steps=many"], "steps: seen many; wanted an integer"),
        (["heads"], "data: missing"),
        (["heads", "data"], "wanted section.key=value"),
        (["ingest"], "nothing to measure"),
    ],
)
def test_benchmarks_check_their_parameters(command: Command, words: list[str], message: str) -> None:
    assert_user_error(command("benchmark", *words), message)


def test_other_jobs(command: Command, tmp_path: Path, digits_folder: Path) -> None:
    assert_user_error(command("evaluate", tmp_path / "nothing"), "nothing")
    assert_user_error(command("prepare", f"data.uri={digits_folder}"), "out: missing")
    assert_user_error(command("prepare", f"data.uri={digits_folder}", "out="), "out: seen ''; wanted text that")
    assert_user_error(command("cluster", "embeddings=", "out=", "num_clusters=3"), "2 errors")
    assert_user_error(command("prepare", f"data.uri={digits_folder}", f"out={digits_folder}"), "choose an empty folder")


def test_exit_code_in_a_shell(yaml_file: Path, tmp_path: Path) -> None:
    words = [sys.executable, "jobs/pretrain.py", str(yaml_file), f"run.dir={tmp_path}", "data.uri=/nowhere"]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True, check=False
    )
    assert_user_error(
        (done.returncode, done.stdout, done.stderr), r"^error: data.uri = /nowhere: there is nothing .*\n$"
    )


def test_divergence(ray_cluster: None, command: Command, yaml_file: Path, tmp_path: Path) -> None:
    outcome = command("pretrain", yaml_file, f"run.dir={tmp_path}", "training.lr=1e6")
    assert_user_error(outcome, "training diverged", "Lower training.lr")


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
    assert_user_error(outcome, "checkpoints/round-.*File too large")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [Path(first).name]

    assert run()[0] == 0
    assert assignments((tmp_path / "metrics.jsonl").read_text()) == assignments(finished)


def without_ray(path: str, *overrides: str) -> None:
    list(pretrain(load(Config, path, overrides), LocalWorkers()))


def assignments(lines: str) -> list[str]:
    return re.findall(r'"assignments": "(\w+)"', lines)
