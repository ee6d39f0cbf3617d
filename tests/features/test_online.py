from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from raycluster.features.matrix import sample_ids
from raycluster.features.online import OnlineFeatureBank
from raycluster.run.local_workers import LocalWorkers
from raycluster.types import FeatureRequest


def test_visits_of_long_ago_do_not_count(tmp_path: Path) -> None:
    bank = OnlineFeatureBank(str(tmp_path), FeatureRequest(None, "activations", online=True))
    for time, samples in ((0, [0, 1, 2, 3]), (4, [2, 3])):
        bank.register_batch(np.array(samples), first_time=time)
        bank(nn.Identity(), (torch.full((len(samples), 3), time + 1.0),))
    workers, shards, nobody = LocalWorkers(), [(0, 2), (2, 4)], np.empty(0, np.int64)
    assert bank.put(workers, "all", shards, nobody) == []
    assert workers.features("all").rows(np.arange(4))[:, 0].tolist() == [1, 1, 5, 5]
    assert bank.put(workers, "late", shards, nobody, oldest=4) == [0]
    assert sorted(sample_ids(workers.features("late"))) == [2, 3]
