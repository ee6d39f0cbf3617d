"""Ray's own settings for runs that must survive anything, and why they differ from Ray's defaults.

They reach Ray's controller and workers through the environment of the job; what is set there already is left alone.
"""

from __future__ import annotations

import os

SETTINGS = {
    # Ray Train decides on the size of a group with what it knows of the cluster, and a node may die before the group is
    # placed. Ray would wait 60 s for it; whole nodes answer in a few seconds or not at all.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    # A spot notice may be no longer than 30 s, of which polling at Ray's 5 s would waste a sixth.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # How soon a dead worker is noticed, and how often `report` gets through: a second is cheap.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # The working directory of a worker would be a folder of Ray's; relative paths must mean what they mean in the job.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # `ray job stop` kills 3 s after SIGTERM: too soon to write a checkpoint. Read by the head when it starts.
    "RAY_JOB_STOP_WAIT_TIME_S": "120",
}


def prepare_environment() -> None:
    """Set what is not set yet; before Ray starts or is joined."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
