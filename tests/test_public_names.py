"""The names that `import raycluster` offers."""

from __future__ import annotations

from importlib import import_module

import pytest

import raycluster


@pytest.mark.parametrize("name", raycluster.__all__)
def test_public_names_are_importable(name: str) -> None:
    assert callable(getattr(raycluster, name))


def test_pretrain_is_that_of_the_loop() -> None:
    from raycluster import pretrain

    assert pretrain is import_module("raycluster.run.loop").pretrain


def test_other_names_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="no attribute 'kmean'"):
        raycluster.kmean  # noqa: B018
