"""Settings: types, bounds, names of modules; every mistake told at once, with its path and the way out."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from raycluster.config import PluginField, dump, load, parse, settings
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

    seed: int = 0
    optimiser: Optimiser


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


def test_without_a_file_defaults_and_overrides_are_all() -> None:
    assert load(Root, None, ["optimiser.epochs=2"]).optimiser.epochs == 2


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "'1e-3'", "0.001", "1.0e-03", ".001"])
def test_numbers_as_people_write_them(number: str) -> None:
    assert parse(Root, f"optimiser: {{epochs: 3, lr: {number}}}").optimiser.lr == 0.001


def test_settings_are_frozen_and_travel() -> None:
    config = parse(Root, MINIMAL)
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config


def test_constructor_checks_too() -> None:
    with pytest.raises(ValidationError):
        Optimiser(epochs=0)


def test_all_mistakes_at_once() -> None:
    text = "optimizer: {}\noptimiser: {epochs: 0, lrr: 1, mode: fst, steps: [1, a]}\nsede: 1"
    told = config_errors(text, "nonsense", "seed.x=1")
    assert "configuration: 8 mistakes" in told
    for line in (
        "optimizer: seen {}; wanted one of the settings seed, optimiser; did you mean optimiser?",
        "optimiser.epochs: seen 0; wanted greater than or equal to 1",
        "optimiser.lrr: seen 1;",
        "did you mean lr?",
        "optimiser.mode: seen fst; wanted 'fast' or 'exact'; leave it out for the default fast",
        "optimiser.steps.1: seen a; wanted an integer",
        "did you mean seed?",
        "nonsense: seen an override of another form; wanted section.key=value",
        "seed: seen {x: 1}; wanted an integer",
    ):
        assert line in told


def test_missing_value_says_what_it_means() -> None:
    assert "optimiser: missing" in config_errors("seed: 1")
    told = config_errors(MINIMAL, "optimiser.workers={min: 1}")
    assert "optimiser.workers.max: missing; wanted the most, or so; add it" in told


def test_union_is_told_once() -> None:
    told = config_errors(MINIMAL, "optimiser.workers=-1")
    assert "1 mistake\n" in told
    assert "seen -1; wanted 'auto' or greater than or equal to 0 or a section" in told
    assert "1 mistake\n" in config_errors(MINIMAL, "optimiser.workers={min: 0, max: 3}")


def test_mistakes_between_fields_keep_their_words() -> None:
    told = config_errors(MINIMAL, "optimiser.mode=exact", "optimiser.head_lr=0.1")
    assert "optimiser: head_lr = ... has no effect with mode = exact; remove it" in told


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
    assert "not valid YAML" in config_errors("a: [")
    assert "wanted a mapping of sections" in config_errors("- 1")
    told = config_errors("seed: 1\noptimiser:\n  epochs: 3\n  epochs: 4\nseed: 2")
    assert "epochs: seen the same key twice; wanted each key once (lines 3 and 4)" in told
    assert "seed: seen the same key twice; wanted each key once (lines 1 and 5)" in told


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
def test_mistakes_in_a_named_section(section: str, words: str) -> None:
    assert words in config_errors("seed: 1", f"algorithm={section}", root=Chosen)


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
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
