"""Leave to restart the workers: given, taken, and taken back only while Ray has not acted on it."""

from raycluster.distributed.line import Line


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
