"""Leave to restart the workers: given, taken, and taken back only while Ray has not acted on it; who is the pool."""

from raycluster.distributed.control.channel import Line
from raycluster.events import Progress


def test_leave_that_nobody_took_is_taken_back() -> None:
    line = Line()
    assert not line.propose(2), "nothing is saved yet"
    assert line.let_go(True)
    assert line.let_go(False)
    assert not line.propose(2)


def test_leave_that_ray_has_taken_stays_taken_until_it_changes_its_mind() -> None:
    line = Line()
    assert line.let_go(True)
    assert line.propose(2)
    assert not line.let_go(False), "work done from here on would be lost"
    assert line.propose(2)
    line.withdraw()
    assert line.let_go(False)
    assert not line.proposed() and not line.propose(2)


def test_a_pool_in_use_is_only_replaced_by_a_larger_one() -> None:
    line = Line()
    assert line.appoint(b"three")
    assert line.newest_crew() == 1
    line.tell(Progress("extracting", 1, 2))
    assert not line.appoint(b"two", unless_in_use=True), "somebody fills the third"
    assert line.appoint(b"four")
    assert line.newest_crew() == 2
    line.tell(Progress("training", 1, 2))
    assert line.appoint(b"two", unless_in_use=True)
    assert line.crew(line.newest_crew()) == b"two"
