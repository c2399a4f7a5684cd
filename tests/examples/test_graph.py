"""The random-walks task: its graph, its walks, and what a walk is worth."""

from types import SimpleNamespace

import pytest
from randomwalks.graph import MAX_NODES, NODES, Graph, random_walks
from randomwalks.reward import optimality

# a <- b <- c, and b -> d -> b: from b the shortest way has two nodes, from c three; d leads back to b.
SMALL = Graph(successors=((0,), (0, 3), (1,), (1,)), shortest=(1, 2, 3, 3))


@pytest.mark.parametrize(
    ("walk", "expected"),
    [
        ("ba", 1.0),
        ("cba", 1.0),
        ("bdba", (10 - 4) / (10 - 2)),
        ("cbdba", (10 - 5) / (10 - 3)),
        ("babdc", 1.0),  # what follows the goal does not count
        ("bca", 0.0),  # no edge from b to c
        ("cbd", 0.0),  # never arrives
        ("bdbdbdbdba", 0.0),  # arrives at the last moment
        ("bdbdbdbdbdba", 0.0),  # arrives too late
        ("b?a", 0.0),
        ("", 0.0),
    ],
)
def test_a_walk_is_worth_what_its_length_makes_it_worth(walk: str, expected: float) -> None:
    assert SMALL.optimality(walk) == pytest.approx(expected)


def test_the_graph_and_the_walks_are_those_of_the_yardstick() -> None:
    graph, walks = random_walks()
    assert graph.shortest == (1, 3, 4, 2, 4, 3, 5, 5, 3, 3, 3, 4, 4, 2, 5, 4, 4, 4, 3, 4, 4)
    assert len(graph.starts) == NODES - 1
    assert walks[:3] == ["sda", "fda", "ebjnbdtkna"]
    assert len(walks) == 1000
    assert max(map(len, walks)) == MAX_NODES
    assert sum(map(graph.optimality, walks)) / len(walks) == pytest.approx(0.3515, abs=1e-4)


def test_every_walk_steps_along_edges_and_stops_at_the_goal() -> None:
    graph, walks = random_walks(200)
    for walk in walks:
        assert (graph.length(walk) is not None) == ("a" in walk)
        assert "a" not in walk[:-1]


def test_the_plug_in_scores_prompt_and_response_together() -> None:
    graph, _ = random_walks()
    batch = SimpleNamespace(prompts=["s", "s", "f"], responses=["da", "a", "da"])
    assert graph.optimality("sda") == 1.0
    assert optimality()(batch) == [1.0, 0.0, 1.0]
