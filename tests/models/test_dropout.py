from __future__ import annotations

import pytest
import torch

from raycluster.models.dropout import SeededDropout


def test_masks_belong_to_the_microbatch_not_to_its_company() -> None:
    dropout, values = SeededDropout(0), torch.ones(8, 100)
    dropout.seeds = [11, 22]
    together = dropout(values)
    dropout.seeds = [22]
    assert torch.equal(together[4:], dropout(values[4:]))
    assert not torch.equal(together[:4], together[4:])


def test_layers_are_masked_differently() -> None:
    first, second, values = SeededDropout(0), SeededDropout(1), torch.ones(4, 100)
    first.seeds = second.seeds = [5]
    assert not torch.equal(first(values), second(values))


def test_scale_and_share() -> None:
    dropout = SeededDropout(0, p=0.25)
    dropout.seeds = [1]
    out = dropout(torch.ones(100, 1000))
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert out.mean().item() == pytest.approx(1, abs=0.01)


def test_evaluation_changes_nothing() -> None:
    values = torch.randn(3, 4)
    assert torch.equal(SeededDropout(0).eval()(values), values)


@pytest.mark.parametrize("seeds", [[], [1, 2]])
def test_missing_seeds_are_an_error(seeds: list[int]) -> None:
    dropout = SeededDropout(0)
    dropout.seeds = seeds
    with pytest.raises(ValueError, match="one per microbatch"):
        dropout(torch.ones(3, 4))
