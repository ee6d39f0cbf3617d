"""Where a run trains, from its settings and the resources of the cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from raycluster.distributed.train.trainer import Placement, place_workers
from raycluster.run.config import Config
from raycluster.types import UserError

IN_PROCESS = Placement(0, 0, False)
CPUS = {"CPU": 8.0}
SLOTS = {"CPU": 8.0, "train_slot": 3.0}


@pytest.mark.parametrize(
    ("overrides", "resources", "gpu_visible", "expected"),
    [
        ([], CPUS, False, IN_PROCESS),
        ([], {**CPUS, "GPU": 1.0}, True, IN_PROCESS),
        ([], {**CPUS, "GPU": 1.0}, False, Placement(1, 1, True)),  # the head has no GPU, another node has
        ([], {**CPUS, "GPU": 4.0}, True, Placement(1, 4, True)),
        ([], {**CPUS, "GPU": 4.0}, False, Placement(1, 4, True)),
        (["run.device=cpu"], {**CPUS, "GPU": 4.0}, False, IN_PROCESS),
        (["run.device=gpu"], CPUS, False, Placement(1, 1, True)),  # an autoscaler adds the GPU
        (["run.device=gpu"], {**CPUS, "GPU": 1.0}, True, IN_PROCESS),
        (["run.workers=0"], {**CPUS, "GPU": 4.0}, False, IN_PROCESS),
        (["run.workers=2"], SLOTS, False, Placement(2, 2, False)),
        (["run.workers={min: 1, max: 3}"], {**SLOTS, "GPU": 2.0}, False, Placement(1, 3, True)),
        (["run.workers={min: 1, max: 3}", "run.device=cpu"], {**SLOTS, "GPU": 2.0}, False, Placement(1, 3, False)),
    ],
)
def test_placement(
    tiny: Callable[..., Config],
    tmp_path: Path,
    overrides: list[str],
    resources: dict[str, float],
    gpu_visible: bool,
    expected: Placement,
) -> None:
    assert place_workers(tiny(tmp_path, *overrides), resources, gpu_visible=gpu_visible) == expected


def test_workers_that_do_not_fit_are_refused(tiny: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds only 4 microbatches"):
        place_workers(tiny(tmp_path), {"GPU": 8.0}, gpu_visible=True)
    with pytest.raises(UserError, match="no node of this cluster has GPUs or the resource train_slot"):
        place_workers(tiny(tmp_path, "run.workers=2"), CPUS, gpu_visible=False)
