"""DraftTree: flat arrays, checked once, against the obvious walks over them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.draft_tree import NO_PARENT, ROOT, DraftTree, Kind, Source

PATHS = st.lists(st.lists(st.integers(0, 5), max_size=5), max_size=8)


def test_worked_example() -> None:
    tree = DraftTree.from_paths(10, [[11, 13], [12]])
    assert tree.tokens.tolist() == [10, 11, 13, 12] and tree.parents.tolist() == [-1, 0, 1, 0]
    assert tree.depths.tolist() == [0, 1, 2, 1]
    assert tree.ancestor_mask().astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    assert tree.child(0, 12) == 3 and tree.child(1, 13) == 2 and tree.child(0, 13) == -1 and tree.child(2, 10) == -1
    assert tree.children(0).tolist() == [1, 3] and tree.children(2).tolist() == []
    assert tree.path(2) == [0, 1, 2] and tree.path(ROOT) == [0]
    assert tree.tokens.dtype == np.int64 and tree.parents.dtype == tree.depths.dtype == np.int32


@given(paths=PATHS)
def test_a_trie_holds_its_paths_and_nothing_else(paths: list[list[int]]) -> None:
    tree = DraftTree.from_paths(9, paths)
    expected = {tuple(path[:end]) for path in paths for end in range(1, len(path) + 1)}
    found = [tuple(tree.tokens[tree.path(node)[1:]].tolist()) for node in range(1, len(tree))]
    assert set(found) == expected and len(found) == len(expected)  # siblings carry distinct tokens
    mask = tree.ancestor_mask()
    for node in range(len(tree)):
        path = tree.path(node)
        assert np.flatnonzero(mask[node]).tolist() == path and tree.depths[node] == len(path) - 1
        assert path == sorted(path)  # parents precede children
        for child in tree.children(node):
            assert tree.child(node, int(tree.tokens[child])) == child and tree.parents[child] == node


@given(paths=PATHS, count=st.integers(1, 50))
def test_the_first_nodes_are_a_tree(paths: list[list[int]], count: int) -> None:
    tree = DraftTree.from_paths(9, paths)
    cut = tree.prefix(count)
    kept = min(count, len(tree))
    assert (
        len(cut) == kept and np.array_equal(cut.tokens, tree.tokens[:kept]) and np.array_equal(cut.parents, tree.parents[:kept])
    )
    assert np.array_equal(cut.ancestor_mask(), tree.ancestor_mask()[:kept, :kept])
    assert cut.source is not None and len(cut.source) == kept


def test_prefix_keeps_every_field() -> None:
    ones = np.ones(3, np.int32)
    tree = DraftTree(
        np.arange(3), np.array([-1, 0, 0]), source=ones.astype(np.uint8), kind=np.full(3, Kind.IID, np.uint8), draw_index=ones, multiplicity=ones,
        virtual=ones.astype(bool), probs=np.ones((3, 4), np.float32), evidence="why",
    )  # fmt: skip
    cut = tree.prefix(2)
    for array in (cut.source, cut.kind, cut.draw_index, cut.multiplicity, cut.virtual, cut.probs):
        assert array is not None and len(array) == 2
    assert cut.evidence == "why"


def test_chain_and_root_only() -> None:
    chain = DraftTree.chain([4, 5, 5])
    assert (
        chain.parents.tolist() == [NO_PARENT, 0, 1]
        and chain.source is not None
        and chain.source.tolist() == [Source.ROOT, Source.CONTEXT, Source.CONTEXT]
    )
    root = DraftTree.root_only(7)
    assert len(root) == 1 and root.tokens.tolist() == [7] and root.ancestor_mask().tolist() == [[True]]
    assert len(DraftTree.from_paths(7, [])) == len(DraftTree.from_paths(7, [[]])) == 1


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([], [], "at least a root"),
        ([1, 2], [-1], "2 tokens and 1 parents"),
        ([1], [0], "parents must be"),
        ([1, 2], [-1, -1], "parents must be"),
        ([1, 2], [-1, 1], "parents must be"),
        ([1, 2, 3], [-1, 2, 0], "parents must be"),
    ],
)
def test_what_is_no_tree_is_refused(tokens: list[int], parents: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DraftTree(np.array(tokens, np.int64), np.array(parents, np.int32))


def test_networkx() -> None:
    pytest.importorskip("networkx")
    graph = DraftTree.from_paths(10, [[11, 13], [12]], Source.TABLE).to_networkx()
    assert sorted(graph.edges) == [(0, 1), (0, 3), (1, 2)]
    assert graph.nodes[2] == {"token": 13, "depth": 2, "source": "table"} and graph.nodes[0]["source"] == "root"
