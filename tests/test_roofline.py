"""The roofline model's arithmetic, by hand."""

from __future__ import annotations

import json

import pytest

from bench import roofline
from bench.roofline import DEVICES, SHAPES, Shape, bytes_moved, estimate, operations, packed_rows

LLAMA = next(shape for shape in SHAPES if shape.name == "Llama-3-8B")


def test_one_key_by_hand() -> None:
    tiny = Shape("tiny", query_heads=2, kv_heads=1, head_dim=64)
    # 1 key and value, 2 queries and outputs, of 64 numbers of 2 bytes; 2 products of 64 multiplications and additions a head.
    assert bytes_moved(tiny, prefix=0, nodes=1) == 2 * 64 * (2 + 4)
    assert operations(tiny, prefix=0, nodes=1) == 2 * 2 * 2 * 64


def test_64_nodes_with_4_heads_a_key_are_compute_bound_on_an_a100_only() -> None:
    a100, h100 = (estimate(device, LLAMA, 32768, 64) for device in DEVICES)
    assert a100["intensity"] == pytest.approx(256, rel=0.01)
    assert (a100["bound"], h100["bound"]) == ("compute", "memory")
    assert a100["model_us"] == pytest.approx(4 * 32 * 64 * (32768 + 64) * 128 / 312e12 * 1e6)


@pytest.mark.parametrize(
    ("nodes", "expected"), [(1, (16, 1)), (4, (16, 1)), (5, (32, 1)), (8, (32, 1)), (9, (64, 1)), (17, (128, 2))]
)
def test_packed_rows(nodes: int, expected: tuple[int, int]) -> None:
    assert packed_rows(LLAMA, nodes) == expected


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--prefixes", "1024", "--nodes", "8"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["model"] is True and len(printed["rows"]) == len(SHAPES) * len(DEVICES)
