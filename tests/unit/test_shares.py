"""Shares: no one takes all, whatever the order."""

from hypothesis import given
from hypothesis import strategies as st

from kvmagent.shares import Shares

MOVES = st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 40)))


@given(MOVES, st.integers(1, 100))
def test_a_holder_has_at_most_as_many_as_are_left_free_and_nothing_is_lost(
    moves: list[tuple[bool, int, int]], total: int
) -> None:
    shares, held = Shares(total), list[tuple[int, int]]()
    for takes, holder, places in moves:
        if not takes and held:
            shares.leave(held[-1][0], places=held.pop()[1])
        elif takes and shares.has_room(holder, places=places):
            shares.take(holder, places=places)
            held.append((holder, places))
            assert shares.taken(holder) <= shares.free + 1
            assert shares.taken(holder) <= total // 2 + 1
        assert shares.free == total - sum(places for _, places in held) >= 0
        # Whoever has nothing yet gets one as long as there is one.
        assert shares.has_room("newcomer") is (shares.free > 0)


def test_what_counts_for_two_is_given_back_by_both() -> None:
    shares = Shares(8)
    shares.take("a", "b", places=3)
    assert (shares.free, shares.taken("a"), shares.taken("b")) == (5, 3, 3)
    assert not shares.has_room("a", "c", places=3)
    assert shares.has_room("c", places=3)
    assert not shares.has_room("c", places=3, part=0.5)
    shares.leave("a", "b", places=3)
    assert (shares.free, shares.taken("a"), shares.taken("b")) == (8, 0, 0)
