"""Settings: types, bounds, plugins; all errors are reported together, each with its path and remedy."""

from __future__ import annotations

import pickle
import time
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from raycluster.config import NonEmpty, PluginField, Seed, dump, load, parse, settings
from raycluster.seeding import generator
from raycluster.types import UserError


@settings
class Span:
    """min: the least. max: the most, or so. unit: of both."""

    min: Annotated[int, Field(ge=1)]
    max: int


@settings
class Optimiser:
    """lr: the learning rate."""

    lr: Annotated[float, Field(gt=0)] = 0.05
    epochs: Annotated[int, Field(ge=1)]
    mode: Literal["fast", "exact"] = "fast"
    head_lr: float | None = None
    steps: tuple[int, ...] = (10, 20)
    nesterov: bool = False
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] | Span = "auto"

    def __post_init__(self) -> None:
        if self.head_lr is not None and self.mode == "exact":
            raise UserError("head_lr = ... has no effect with mode = exact; remove it")


@settings
class Root:
    """The smallest root."""

    seed: Seed = 0
    optimiser: Optimiser
    out: NonEmpty = "out"
    tests: NonEmpty | None = None


@settings
class Chosen:
    """A root with a section whose class has a name."""

    seed: int = 0
    algorithm: Annotated[Any, PluginField("toy_algorithms", "Algorithm")]


MINIMAL = "optimiser:\n  epochs: 3\n"


@pytest.fixture
def toy_algorithms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "toy_algorithms"
    package.mkdir()
    decorated = "from raycluster.config import settings\n@settings\n"
    source = decorated + "class Algorithm:\n    name: str\n    num_clusters: int = {}\n"
    (package / "kmeans.py").write_text(source.format(10))
    (package / "sinkhorn.py").write_text(source.format(20))
    (package / "shared.py").write_text("raise ImportError('not one of the choices')\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def config_errors(text: str, *overrides: str, root: type[Any] = Root) -> str:
    with pytest.raises(UserError) as caught:
        parse(root, text, overrides)
    return str(caught.value)


def test_file_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 3\noptimiser:\n  epochs: 3\n")
    config = load(Root, path, ["optimiser.lr=1e-3", "optimiser.steps=[1, 2]", "optimiser.head_lr=null"])
    assert config == Root(seed=3, optimiser=Optimiser(epochs=3, lr=0.001, steps=(1, 2)))


def test_overrides_without_a_file() -> None:
    assert load(Root, None, ["optimiser.epochs=2"]).optimiser.epochs == 2


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "'1e-3'", "0.001", "1.0e-03", ".001"])
def test_numbers_as_people_write_them(number: str) -> None:
    assert parse(Root, f"optimiser: {{epochs: 3, lr: {number}}}").optimiser.lr == 0.001


def test_settings_are_frozen_and_picklable() -> None:
    config = parse(Root, MINIMAL)
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config


def test_constructor_checks_too() -> None:
    with pytest.raises(ValidationError):
        Optimiser(epochs=0)


def test_all_errors_are_reported_together() -> None:
    text = "optimizer: {}\noptimiser: {epochs: 0, lrr: 1, mode: fst, steps: [1, a]}\nsede: 1"
    message = config_errors(text, "nonsense", "seed.x=1")
    assert "configuration: 8 errors" in message
    for line in (
        "optimizer: seen {}; wanted one of the settings seed, optimiser, out, tests; did you mean optimiser?",
        "optimiser.epochs: seen 0; wanted greater than or equal to 1",
        "optimiser.lrr: seen 1;",
        "did you mean lr?",
        "optimiser.mode: seen fst; wanted 'fast' or 'exact'; leave it out for the default fast",
        "optimiser.steps.1: seen a; wanted an integer",
        "did you mean seed?",
        "nonsense: seen an override of another form; wanted section.key=value",
        "seed: seen {x: 1}; wanted an integer",
    ):
        assert line in message


def test_missing_value_says_what_it_means() -> None:
    assert "optimiser: missing" in config_errors("seed: 1")
    message = config_errors(MINIMAL, "optimiser.workers={min: 1}")
    assert "optimiser.workers.max: missing; wanted the most, or so; add it" in message


def test_a_union_gives_one_error() -> None:
    message = config_errors(MINIMAL, "optimiser.workers=-1")
    assert "1 error\n" in message
    assert "seen -1; wanted 'auto' or greater than or equal to 0 or a section" in message
    assert "1 error\n" in config_errors(MINIMAL, "optimiser.workers={min: 0, max: 3}")


def test_errors_between_fields_keep_their_message() -> None:
    message = config_errors(MINIMAL, "optimiser.mode=exact", "optimiser.head_lr=0.1")
    assert "optimiser: head_lr = ... has no effect with mode = exact; remove it" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimiser.epochs=yes", "optimiser.epochs: seen true; wanted a number"),
        ("optimiser.lr=.nan", "optimiser.lr: seen .nan; wanted a finite number"),
        ("optimiser.epochs=1.5", "optimiser.epochs: seen 1.5; wanted an integer"),
        ("optimiser=", "optimiser: seen ''; wanted a section"),
        ("optimiser=null", "optimiser: seen null; wanted a section"),
        ("seed.deep.er=1", "seed.deep.er: seen seed = 0; wanted seed to be a section"),
        ("seed=[1", "seed: seen [1; wanted a value in YAML"),
        ("seed={a: 1, a: 2}", "a: seen the same key twice"),
        ("--seed=1", "--seed=1: seen an override of another form"),
    ],
)
def test_bad_overrides(override: str, words: str) -> None:
    assert words in config_errors(MINIMAL + "seed: 0", override)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "near.yaml").write_text("")
    with pytest.raises(UserError, match=r"no configuration at .*far.yaml: there are .*near.yaml"):
        load(Root, tmp_path / "far.yaml")
    with pytest.raises(UserError, match="cannot read the configuration"):
        load(Root, tmp_path)
    assert "wanted a mapping of sections" in config_errors("- 1")
    message = config_errors("seed: 1\noptimiser:\n  epochs: 3\n  epochs: 4\nseed: 2")
    assert "epochs: seen the same key twice; wanted each key once (lines 3 and 4)" in message
    assert "seed: seen the same key twice; wanted each key once (lines 1 and 5)" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not valid YAML: line 1, column 5: "),
        ("seed: 1\nout: a\x01b", "not valid YAML: unacceptable character #x0001"),
        ("? [seed]\n: 1", "a key that is a list or mapping (line 1); wanted text as a key"),
        ("optimiser:\n  ? {a: 1}\n  : 1", "optimiser: seen a key that is a list or mapping (line 2)"),
        ("optimiser: &o {epochs: *o}", "optimiser.epochs: seen a cycle (line 1)"),
        ("optimiser: &o {<<: *o, epochs: 1}", "optimiser.<<: seen a cycle"),
        ("seed: !!int x", "seed: seen x; wanted a value of the type int"),
        ("seed: 0x_", "seed: seen 0x_; wanted a value of the type int"),
        (f"seed: {'9' * 5000}", "seed: seen 5000 characters; wanted a value of the type int"),
        ("seed: !!binary aGk=", "seed: seen a value of the type tag:yaml.org,2002:binary; wanted text, a number"),
        ("seed: !!python/name:os.system x", "seed: seen a value of the type tag:yaml.org,2002:python/name"),
        (f"seed: {'[' * 100}{']' * 100}", "seen deeper nesting; wanted at most 50 levels"),
        (f"seed: {'[' * 9000}{']' * 9000}", "YAML: seen deeper nesting; wanted at most 50 levels"),
        ("seed: 1 # " + "x" * 300_000, "characters; wanted at most 200000"),
        ("1: 2\nnull: 3", "1: seen 2; wanted one of the settings"),
    ],
)
def test_malformed_yaml(text: str, words: str) -> None:
    """Every malformed text is one line of the report, beside the errors of the overrides."""
    message = config_errors(text, "nonsense")
    assert words in message
    assert "nonsense: seen an override of another form" in message


@pytest.mark.parametrize("width", [9, 100])
def test_expanding_aliases_are_bounded(width: int) -> None:
    levels = [f"a0: &a0 [{'x,' * width}]"]
    levels += [f"a{level}: &a{level} [{f'*a{level - 1},' * width}]" for level in range(1, 10)]
    started = time.perf_counter()
    assert "YAML: seen more values; wanted at most 20000" in config_errors("\n".join(levels))
    assert "seed: seen more values" in config_errors(MINIMAL, f"seed={{{', '.join(levels)}}}")
    assert time.perf_counter() - started < 5


def test_many_errors_are_reported_quickly() -> None:
    started = time.perf_counter()
    message = config_errors("\n".join(f"key{number}: 1" for number in range(5_000)))
    assert time.perf_counter() - started < 5
    assert len(message.splitlines()) == 52 and message.endswith(" more")


def test_aliases_and_merged_sections_work() -> None:
    text = "optimiser: {<<: [&a {epochs: 3, lr: 0.1}, {lr: 0.2}], mode: exact}\nout: &d x\ntests: *d"
    config = parse(Root, text)
    assert config == Root(optimiser=Optimiser(epochs=3, lr=0.1, mode="exact"), out="x", tests="x")


@pytest.mark.parametrize("text", ["2024-13-01", "2024-01-31", "2001-12-14 21:59:43"])
def test_dates_are_text(text: str) -> None:
    assert parse(Root, MINIMAL, [f"out={text}"]).out == text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("out=", "out: seen ''; wanted text that is not empty; is a shell variable unset?"),
        ("tests=", "tests: seen ''; wanted text that is not empty; give null for none"),
        ("out=5", "out: seen 5; wanted a string; quote it if it is text"),
        ("seed=-1", "seed: seen -1; wanted greater than or equal to 0"),
        (f"seed={2**63}", f"seed: seen {2**63}; wanted less than {2**63}"),
        ("optimiser.lr=0", "optimiser.lr: seen 0; wanted greater than 0"),
        ("epochs=5", "did you mean optimiser.epochs?"),
        ("epoch=5", "did you mean optimiser.epochs?"),
        ("optimiser.min=5", "did you mean optimiser.workers.min?"),
        ("xyzzy=5", "; remove it"),
        ("out=a\x01b", 'out: seen "a\\x01b"; wanted a value in YAML'),
        ("seed.x." + ".".join("y" * 60) + "=1", "an override of another form"),
    ],
)
def test_values_out_of_bounds_and_unknown_keys(override: str, words: str) -> None:
    message = config_errors(MINIMAL, override)
    assert "1 error\n" in message and words in message
    assert "leave it out" not in message


def test_the_largest_seed_works() -> None:
    assert parse(Root, MINIMAL, [f"seed={2**63 - 1}"]).seed == 2**63 - 1
    generator(2**63 - 1, "augment", 0)


def test_similar_names_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Suggestions come from the folder of the path and from configs/, never from hidden files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".pre-commit-config.yaml").write_text("")
    with pytest.raises(UserError, match=r"no configuration at confg.yaml: give the path of a YAML file$"):
        load(Root, "confg.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "config.yaml").write_text("")
    (tmp_path / "configs" / "sela.yaml").write_text("")
    with pytest.raises(UserError, match=r"no configuration at confg.yaml: did you mean configs/config.yaml\?$"):
        load(Root, "confg.yaml")


@pytest.mark.usefixtures("toy_algorithms")
def test_name_is_module() -> None:
    config = parse(Chosen, "algorithm: {name: sinkhorn}")
    assert type(config.algorithm).__module__ == "toy_algorithms.sinkhorn"
    assert config.algorithm.num_clusters == 20
    assert parse(Chosen, dump(config)) == config
    assert Chosen(algorithm=config.algorithm) == config


@pytest.mark.usefixtures("toy_algorithms")
def test_a_name_alone_is_a_section_of_defaults() -> None:
    short, long = (parse(Chosen, "seed: 1", [f"algorithm={text}"]) for text in ("kmeans", "{name: kmeans}"))
    assert short == long


@pytest.mark.usefixtures("toy_algorithms")
@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("{name: kmean}", "algorithm.name: seen kmean; wanted a name, one of kmeans, sinkhorn; did you mean kmeans?"),
        ("{num_clusters: 3}", "algorithm: seen {num_clusters: 3}; wanted a name, one of kmeans, sinkhorn"),
        ("kmean", "algorithm: seen kmean; wanted a name, one of kmeans, sinkhorn; did you mean kmeans?"),
        ("3", "algorithm: seen 3; wanted a section with the key `name`"),
        ("{name: kmeans, num_cluster: x}", "wanted one of the settings name, num_clusters; did you mean num_clusters?"),
        ("{name: kmeans, num_clusters: true}", "algorithm.num_clusters: seen true; wanted a number"),
    ],
)
def test_errors_in_a_plugin_section(section: str, words: str) -> None:
    assert words in config_errors("seed: 1", f"algorithm={section}", root=Chosen)


@given(
    seed=st.integers(0, 2**63 - 1),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    head_lr=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    steps=st.lists(st.integers(), max_size=4).map(tuple),
    workers=st.just("auto") | st.integers(0, 9) | st.builds(Span, min=st.integers(1, 9), max=st.integers()),
)
def test_dump_and_parse_agree(
    seed: int, lr: float, head_lr: float | None, steps: tuple[int, ...], workers: Any
) -> None:
    config = Root(seed=seed, optimiser=Optimiser(epochs=1, lr=lr, head_lr=head_lr, steps=steps, workers=workers))
    again = parse(Root, dump(config))
    assert again == config
    assert dump(again) == dump(config)
