"""The listener of the job survives a failing event handler, and stops the run because of it."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import pytest
import ray

from raycluster.distributed.control.channel import WorkerClient, open_channel
from raycluster.distributed.control.driver import listen
from raycluster.distributed.control.stall_detector import StallDetector
from raycluster.distributed.features.pool_manager import FeaturePoolManager
from raycluster.distributed.session import stop_on_signals, stop_requested
from raycluster.events import Event, StatusNote

pytestmark = pytest.mark.ray

WAIT_SECONDS = 120


def test_a_failing_handler_stops_the_run_and_is_raised_at_the_end(ray_cluster: None, tmp_path: Path) -> None:
    handled: list[Event] = []

    def handle(event: Event) -> None:
        handled.append(event)
        raise BrokenPipeError(f"event {len(handled)}")

    channel = open_channel()
    client = WorkerClient(channel)
    pool_manager = FeaturePoolManager(f"pool-{uuid.uuid4().hex[:8]}", 1)
    with stop_on_signals():
        with (
            pytest.raises(BrokenPipeError, match="event 1"),
            listen(channel, handle, pool_manager, StallDetector("train_slot", 1)),
        ):
            assert not client.stopping()
            client.publish(StatusNote("first"))
            until = time.monotonic() + WAIT_SECONDS
            while not client.stopping():
                assert time.monotonic() < until, "workers are not asked to stop"
                time.sleep(0.1)
            client.publish(StatusNote("second"))
        notes = [event.text for event in handled if isinstance(event, StatusNote)]
        assert notes == ["first", "second"], "events of the stopping workers are handled"
    assert not stop_requested(), "the request ended with the run"
    for actor in (channel, *pool_manager.actors):
        ray.kill(actor)
