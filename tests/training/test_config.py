from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from raycluster.training.config import TrainingSettings
from raycluster.types import UserError


def test_defaults_are_consistent() -> None:
    settings = TrainingSettings()
    assert settings.num_microbatches == 8
    assert settings.microbatches_per_forward(1) == 8


def test_microbatches_per_forward() -> None:
    assert TrainingSettings(forward_rows=64).microbatches_per_forward(1) == 2
    assert TrainingSettings(mode="exact").microbatches_per_forward(1) == 1
    assert TrainingSettings(global_batch=1024, microbatch=512).microbatches_per_forward(1) == 1


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"global_batch": 250}, "224 or 256"),
        ({"global_batch": 16}, "32 or 64"),
        ({"mode": "exact", "precision": "fp16"}, "bf16"),
        ({"mode": "exact", "forward_rows": 64}, "no effect"),
        ({"forward_rows": 48}, "not a multiple"),
        ({"schedule": "step"}, "needs milestones"),
        ({"milestones": (3,)}, "no effect"),
        ({"decay": 0.5}, "no effect"),
        ({"schedule": "step", "milestones": (5, 3)}, "must increase"),
        ({"schedule": "step", "milestones": (100,)}, "less than epochs 100"),
        ({"warmup_epochs": 200}, "less than epochs"),
    ],
)
def test_faults_are_named_with_the_remedy(fields: dict[str, Any], wanted: str) -> None:
    with pytest.raises((UserError, ValidationError), match=wanted):
        TrainingSettings(**fields)


@pytest.mark.parametrize("field", ["lr", "epochs", "microbatch", "threads", "momentum"])
def test_bounds(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        TrainingSettings(**{field: -1})
