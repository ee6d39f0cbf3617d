"""Permission to restart the workers: revocable until Ray acts on it; and which feature pool is the newest."""

from raycluster.distributed.control.channel import ControlChannel
from raycluster.events import Progress


def test_permission_is_revocable_before_the_restart() -> None:
    channel = ControlChannel()
    assert not channel.propose(2), "nothing is saved yet"
    assert channel.allow_restart(True)
    assert channel.allow_restart(False)
    assert not channel.propose(2)


def test_permission_stays_once_the_restart_began_unless_withdrawn() -> None:
    channel = ControlChannel()
    assert channel.allow_restart(True)
    assert channel.propose(2)
    assert not channel.allow_restart(False), "work done after this point would be lost"
    assert channel.propose(2)
    channel.withdraw()
    assert channel.allow_restart(False)
    assert not channel.proposed() and not channel.propose(2)


def test_a_pool_in_use_is_not_trimmed() -> None:
    channel = ControlChannel()
    assert channel.set_pool(b"three")
    assert channel.newest_pool() == 1
    channel.publish(Progress("extracting", 1, 2))
    assert not channel.set_pool(b"two", unless_in_use=True), "workers fill the first pool"
    assert channel.set_pool(b"four")
    assert channel.newest_pool() == 2
    channel.publish(Progress("training", 1, 2))
    assert channel.set_pool(b"two", unless_in_use=True)
    assert channel.pool(channel.newest_pool()) == b"two"
