"""Leave to restart the workers: given, taken, and taken back only while Ray has not acted on it; who is the pool."""

from raycluster.distributed.control.channel import ControlChannel
from raycluster.events import Progress


def test_leave_that_nobody_took_is_taken_back() -> None:
    channel = ControlChannel()
    assert not channel.propose(2), "nothing is saved yet"
    assert channel.allow_restart(True)
    assert channel.allow_restart(False)
    assert not channel.propose(2)


def test_leave_that_ray_has_taken_stays_taken_until_it_changes_its_mind() -> None:
    channel = ControlChannel()
    assert channel.allow_restart(True)
    assert channel.propose(2)
    assert not channel.allow_restart(False), "work done from here on would be lost"
    assert channel.propose(2)
    channel.withdraw()
    assert channel.allow_restart(False)
    assert not channel.proposed() and not channel.propose(2)


def test_a_pool_in_use_is_only_replaced_by_a_larger_one() -> None:
    channel = ControlChannel()
    assert channel.set_pool(b"three")
    assert channel.newest_pool() == 1
    channel.publish(Progress("extracting", 1, 2))
    assert not channel.set_pool(b"two", unless_in_use=True), "somebody fills the third"
    assert channel.set_pool(b"four")
    assert channel.newest_pool() == 2
    channel.publish(Progress("training", 1, 2))
    assert channel.set_pool(b"two", unless_in_use=True)
    assert channel.pool(channel.newest_pool()) == b"two"
