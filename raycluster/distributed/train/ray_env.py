"""Environment variables of Ray that differ from its defaults, and why.

Ray's controller and workers inherit them from the job. Variables that are already set keep their values.
"""

from __future__ import annotations

import os

SETTINGS = {
    # A node may die after Ray Train has decided the size of a group and before the group is placed. Ray would wait 60 s
    # for it; healthy nodes answer within a few seconds.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    # A spot notice may be as short as 30 s; Ray's polling interval of 5 s would waste a sixth of it.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # How soon a dead worker is noticed, and how often `report` is read. Polling every second is cheap.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # Relative paths must mean the same in workers and in the job; Ray would change the working directory.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # `ray job stop` kills 3 s after SIGTERM: too soon to write a checkpoint. Read by the head when it starts.
    "RAY_JOB_STOP_WAIT_TIME_S": "120",
}


def prepare_environment() -> None:
    """Set the variables that are not set; call before Ray starts."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
