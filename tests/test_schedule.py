"""What a pass of branches computes in which layer, planned without a model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mmlens.branching.packing import Packing
from mmlens.branching.schedule import Schedule, Start


@st.composite
def passes(draw):
    """Branches in the order of their layers, the positions that are read, layers and positions."""
    n_layers, n_pos = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    position = st.integers(0, n_pos - 1)
    read = draw(st.lists(position, min_size=1, max_size=3))
    starts = []
    for layer in sorted(draw(st.lists(st.integers(-1, n_layers), min_size=1, max_size=6))):
        first = draw(position)
        starts.append(Start(layer, min(first, *read), draw(st.integers(first, n_pos - 1))))
    starts = [Start(each.layer, each.first, min(each.tail, *read)) for each in starts]
    return starts, read, n_layers, n_pos


def entries(packing: Packing) -> list[tuple[int, int]]:
    """Branch and position of every packed entry."""
    return [
        (i, position)
        for i, start in enumerate(packing.starts)
        for position in range(start, packing.n_pos)
    ]


@given(passes())
def test_each_layer_computes_what_differs_there(given):
    starts, read, n_layers, n_pos = given
    schedule = Schedule.of(*given)
    lowest = max(starts[0].layer, 0)
    layers = [layer for step in schedule.steps for layer in step.layers]
    assert layers == list(range(lowest, n_layers))
    assert [i for step in schedule.steps for i in step.joining] == list(range(len(starts)))
    for step in schedule.steps:
        for layer in step.layers or [n_layers]:
            there = [(i, start) for i, start in enumerate(starts) if start.layer <= layer]
            differ = [(i, p) for i, start in there for p in range(start.first, n_pos)]
            needed = [(i, p) for i, start in there for p in range(start.tail, n_pos)]
            assert entries(step.keys) == (differ if layer < n_layers else needed)
            assert entries(step.queries) == (differ if layer < n_layers - 1 else needed)
        for i in step.joining:  # not before its own layer, nor later
            assert max(starts[i].layer, 0) == (step.layers or [n_layers])[0]
    assert not schedule.steps[-1].layers
    last = entries(schedule.steps[-1].queries)
    assert [last[at] for at in schedule.read] == [(i, p) for i in range(len(starts)) for p in read]


@given(passes())
def test_what_leaves_a_step_enters_the_next(given):
    schedule = Schedule.of(*given)
    stream: list[tuple[int, int]] = []
    for step in schedule.steps:
        firsts = schedule.firsts if step.layers else schedule.tails
        stream += [entry for entry in entries(firsts) if entry[0] in step.joining]
        assert stream == entries(step.keys)
        stream = [entry for entry in stream if entry in entries(step.queries)]
        assert stream == entries(step.queries)
