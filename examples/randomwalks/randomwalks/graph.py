"""The task: a directed graph, random walks on it, and how good a walk is.

The graph and the walks are drawn in the order of trlX's `examples/randomwalks`, so that the numbers
compare with what others publish. A walk is text, one letter per node: `"hda"` goes from node 7 over
node 3 to the goal, node 0. Knows nothing of models, and needs numpy only.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NODES = 21
GOAL = 0
MAX_NODES = 10
"""A walk that has not arrived after this many nodes, its start included, has failed."""

SEED = 1000
LETTERS = "abcdefghijklmnopqrstuvwxyz"[:NODES]


@dataclass(frozen=True)
class Graph:
    """`successors[node]`: where one may go from a node; `shortest[node]`: nodes on its shortest way."""

    successors: tuple[tuple[int, ...], ...]
    shortest: tuple[int, ...]

    @property
    def starts(self) -> list[str]:
        """The letter of every node from which a walk may start: all but the goal."""
        return [LETTERS[node] for node in range(NODES) if node != GOAL]

    def length(self, walk: str) -> int | None:
        """Nodes from the start to the goal, both counted; None if a step is no edge or it never arrives.

        What follows the goal is not looked at: the goal is absorbing.
        """
        previous = None
        for count, letter in enumerate(walk, start=1):
            node = LETTERS.find(letter)
            if node < 0 or (previous is not None and node not in self.successors[previous]):
                return None
            if node == GOAL:
                return count
            previous = node
        return None

    def optimality(self, walk: str) -> float:
        """1 for a shortest way to the goal, less for a detour, 0 for one that is invalid or never arrives."""
        length = self.length(walk)
        if length is None or length > MAX_NODES:
            return 0.0
        return (MAX_NODES - length) / (MAX_NODES - self.shortest[LETTERS.index(walk[0])])


def random_walks(count: int = 1000) -> tuple[Graph, list[str]]:
    """The graph, always the same one, and `count` random walks on it."""
    rng = np.random.RandomState(SEED)
    graph = _draw_graph(rng)
    return graph, [_draw_walk(graph, rng) for _ in range(count)]


def _draw_graph(rng: np.random.RandomState, edge_probability: float = 0.1) -> Graph:
    """Draw again until every node leads somewhere; then make the goal absorbing."""
    while True:
        edges = rng.rand(NODES, NODES) > 1 - edge_probability
        np.fill_diagonal(edges, False)
        if edges.any(axis=1).all():
            break
    edges[GOAL] = False
    edges[GOAL, GOAL] = True
    successors = tuple(tuple(np.flatnonzero(row).tolist()) for row in edges)
    return Graph(successors, _shortest_lengths(successors))


def _draw_walk(graph: Graph, rng: np.random.RandomState) -> str:
    node = rng.randint(NODES)
    while node == GOAL:
        node = rng.randint(NODES)
    walk = LETTERS[node]
    while node != GOAL and len(walk) < MAX_NODES:
        node = int(rng.choice(graph.successors[node]))
        walk += LETTERS[node]
    return walk


def _shortest_lengths(successors: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Nodes on the shortest way from each node to the goal: breadth first, backwards from the goal."""
    lengths = {GOAL: 1}
    frontier = deque([GOAL])
    while frontier:
        node = frontier.popleft()
        for before in range(NODES):
            if before not in lengths and node in successors[before]:
                lengths[before] = lengths[node] + 1
                frontier.append(before)
    assert len(lengths) == NODES, "in this seed's graph every node has a way to the goal"
    return tuple(lengths[node] for node in range(NODES))
