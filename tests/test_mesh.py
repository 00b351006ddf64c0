"""The mesh: who stands where, and beside whom."""

import itertools

import pytest

from unisono.mesh import AXES, HOLDERS, Divided, Mesh

MESH = Mesh(replica=2, shard=3, context=2, tensor=2)


def test_every_axis_divides_the_ranks() -> None:
    for count in range(len(AXES) + 1):
        for axes in itertools.combinations(AXES, count):
            groups = MESH.groups(*axes)
            assert sorted(r for g in groups for r in g) == list(range(24))
            assert {len(g) for g in groups} == {
                (2 if "replica" in axes else 1) * (3 if "shard" in axes else 1)
                * (2 if "context" in axes else 1) * (2 if "tensor" in axes else 1)
            }  # fmt: skip
            assert all(g == sorted(g) for g in groups)


def test_what_talks_most_stands_closest() -> None:
    assert MESH.groups("tensor")[0] == [0, 1]
    assert MESH.groups("context")[0] == [0, 2]
    assert MESH.groups("shard")[0] == [0, 4, 8]
    assert MESH.groups("shard", "context")[0] == [0, 2, 4, 6, 8, 10]
    assert MESH.groups("replica")[0] == [0, 12]
    assert MESH.groups(*HOLDERS) == [list(range(0, 24, 2)), list(range(1, 24, 2))]


def test_ranks_of_one_data_rank_are_neighbours_and_one_of_them_leads() -> None:
    assert (MESH.size, MESH.data, MESH.inner, MESH.holders) == (24, 6, 4, 12)
    assert [MESH.data_rank(r) for r in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [r for r in range(24) if MESH.leads(r)] == [0, 4, 8, 12, 16, 20]
    assert [MESH.context_rank(r) for r in range(5)] == [0, 0, 1, 1, 0]
    assert [MESH.tensor_rank(r) for r in range(5)] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("mesh", "told"), [(Mesh(), "one rank"), (Mesh(shard=2, tensor=4), "shard 2 x tensor 4")]
)
def test_a_mesh_in_words(mesh: Mesh, told: str) -> None:
    assert str(mesh) == told


def test_bytes_of_divided_matrices_by_hand() -> None:
    divided = Divided(values=100, sent=10, again=4, calls=3, shared=6)
    assert divided.sent_bytes(7, passes=2, width=4, ranks=1, recompute=False) == 0
    assert divided.sent_bytes(7, passes=2, width=4, ranks=2, recompute=False) == (280 + 96) // 2
    assert divided.sent_bytes(7, passes=2, width=2, ranks=4, recompute=True) == (196 + 96) * 3 // 4
