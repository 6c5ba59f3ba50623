"""The walk to ancestors, on graphs that chance draws."""

from hypothesis import given
from hypothesis import strategies as st

from aquilamoe.ancestors import ancestors


@st.composite
def graphs(draw: st.DrawFn) -> dict[int, list[int]]:
    """Parents of each of a few nodes; a node's parents have smaller numbers, and may be named twice."""
    size = draw(st.integers(1, 8))
    return {node: draw(st.lists(st.integers(0, node - 1), max_size=5)) if node else [] for node in range(size)}


def distances(graph: dict[int, list[int]], key: int) -> dict[int, int]:
    """Of every node that a path leads to, the length of the shortest: by all paths."""
    found: dict[int, int] = {}
    paths = [[key]]
    while paths:
        longer = [[*path, parent] for path in paths for parent in set(graph[path[-1]])]
        for path in longer:
            found[path[-1]] = min(found.get(path[-1], len(path)), len(path))
        paths = longer
    return found


@given(graphs())
def test_all_that_a_path_leads_to_is_an_ancestor_once_and_nearest_come_first(graph: dict[int, list[int]]) -> None:
    key = max(graph)
    expected = distances(graph, key)
    found = ancestors(key, graph.__getitem__)
    assert sorted(found) == sorted(expected)
    assert [expected[node] for node in found] == sorted(expected.values())


def test_a_circle_ends_the_walk_and_no_key_is_an_ancestor_of_itself() -> None:
    assert ancestors("a", {"a": ["b"], "b": ["c"], "c": ["a", "b"]}.__getitem__) == ["b", "c"]
