"""specdec.linear: the op against float64, its batch invariance, its errors, and the swap of a model's nn.Linear."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from specdec import linear as linear_module
from specdec.linear import HAVE_OP, FastLinear, instruction_set, linear, linear_reference, measure_advantage, winning_rows

needs_op = pytest.mark.skipif(not HAVE_OP, reason="specdec._C is not built")

# Largest error in units of sqrt(in_features), the standard deviation of an output: half a rounding step of the dtype at the
# largest of the outputs (about 6 deviations), and for float32 the rounding of the sums.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 3e-3, torch.bfloat16: 2.4e-2}
DTYPES = list(TOLERANCE)


def data(rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal x [rows, in], weight [out, in] and bias [out]."""
    generator = torch.Generator().manual_seed(rows * 7919 + in_features * 31 + out_features)
    shapes = ((rows, in_features), (out_features, in_features), (out_features,))
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight, bias


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@needs_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (7, 3), (16, 8), (31, 33), (64, 70), (577, 5), (577, 34)])
def test_equals_float64(dtype, in_features, out_features):
    for rows in (1, 2, 3, 4, 5, 6, 8, 9, 13, 97, 200):
        x, weight, bias = data(rows, in_features, out_features, dtype)
        for b in (None, bias):
            y = linear(x, weight, b)
            assert y.dtype == dtype and y.shape == (rows, out_features)
            error = (y.double() - linear_reference(x, weight, b)).abs().max().item()
            assert error <= TOLERANCE[dtype] * max(in_features, 2) ** 0.5, (rows, b is None)


@needs_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("in_features", "out_features"), [(576, 40), (96, 26), (1000, 13), (5, 9)])
def test_a_row_has_the_same_bits_for_every_number_of_rows_and_threads(dtype, in_features, out_features):
    x, weight, bias = data(128, in_features, out_features, dtype)
    alone = torch.cat([linear(row, weight, bias) for row in x.split(1)])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16, 31, 64, 97, 128):
            assert torch.equal(linear(x[:rows], weight, bias), alone[:rows]), rows
            assert torch.equal(linear(x[-rows:], weight, bias), alone[-rows:]), rows
        torch.set_num_threads(3)
        assert torch.equal(linear(x, weight, bias), alone)
    finally:
        torch.set_num_threads(threads)


def smaller_instruction_sets() -> list[str]:
    """Those that this CPU has beside the one in use, which every other test runs on."""
    names = ["portable", "avx2", "avx512", "avx512_bf16"]
    return names[: names.index(instruction_set() or "portable")]


@needs_op
@pytest.mark.parametrize("name", smaller_instruction_sets())
def test_smaller_instruction_sets(name):
    """The choice is made at first use, hence a process for each."""
    code = (
        "import torch; from specdec.linear import *; print(instruction_set())\n"
        "torch.manual_seed(0); torch.set_grad_enabled(False)\n"
        "for dtype in (torch.float32, torch.float16, torch.bfloat16):\n"
        "    x, w, b = torch.randn(9, 77).to(dtype), torch.randn(21, 77).to(dtype), torch.randn(21).to(dtype)\n"
        "    y = linear(x, w, b); torch.testing.assert_close(y, linear_reference(x, w, b).to(dtype))\n"
        "    assert torch.equal(y, torch.cat([linear(row, w, b) for row in x.split(1)]))"
    )
    environment = os.environ | {"SPECDEC_CPU_ISA": name, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [name]


@needs_op
def test_shapes_of_x_and_empty_ones():
    x, weight, bias = data(6, 12, 5, torch.float32)
    assert torch.equal(linear(x.view(2, 3, 12), weight, bias), linear(x, weight, bias).view(2, 3, 5))
    assert torch.equal(linear(x[0], weight, bias), linear(x, weight, bias)[0])
    assert linear(x[:0], weight, bias).shape == (0, 5)
    assert torch.equal(linear(torch.ones(3, 0), torch.ones(5, 0), bias), bias.expand(3, 5))
    strided = torch.randn(12, 6).T
    assert torch.equal(torch.ops.specdec.linear(strided, weight), linear(strided.contiguous(), weight))


@needs_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nans_stay_in_their_row(dtype):
    x, weight, bias = data(4, 21, 9, dtype)
    clean = linear(x, weight, bias)
    x[1, 20], x[2, 3] = float("nan"), float("inf")
    y = linear(x, weight, bias)
    assert y[1].isnan().all() and y[2].isinf().all()
    assert torch.equal(y[[0, 3]], clean[[0, 3]])


@needs_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_features", [16, 21, 48])
def test_neighbours_of_a_weight_in_memory_do_not_count(dtype, in_features):
    """The kernel loads some elements before those it multiplies: the previous row's last, and other tensors' memory never."""
    x, weight, _ = data(5, in_features, 7, dtype)
    around = torch.full((3, 7 * in_features), float("nan"), dtype=dtype)
    around[1] = weight.flatten()
    inside = around[1].view(7, in_features)
    assert torch.equal(linear(x, inside), linear(x, weight))
    inside[2] = float("inf")
    others = [0, 1, 3, 4, 5, 6]
    assert torch.equal(linear(x, inside)[:, others], linear(x, weight)[:, others])


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (torch.ones(2, 3), torch.ones(4), None, "weight has shape"),
        (torch.ones(2, 3), torch.ones(4, 5), None, "x has shape"),
        (torch.tensor(1.0), torch.ones(4, 5), None, "x has shape"),
        (torch.ones(2, 5).bfloat16(), torch.ones(4, 5), None, "x is torch.bfloat16 and weight torch.float32"),
        (torch.ones(2, 5), torch.ones(4, 5), torch.ones(5), "bias is"),
        (torch.ones(2, 5), torch.ones(4, 5), torch.ones(4).half(), "bias is"),
    ],
)
def test_errors_name_the_argument(x, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        linear(x, weight, bias)
    if HAVE_OP:
        with pytest.raises(RuntimeError, match=message.split()[0]):
            torch.ops.specdec.linear(x, weight, bias)


def test_gradients_and_other_dtypes_take_torchs_way():
    x, weight, bias = data(3, 8, 4, torch.float32)
    with torch.enable_grad():
        y = linear(x, weight.requires_grad_(), bias)
        y.sum().backward()
    assert weight.grad is not None
    assert linear(x.double(), weight.detach().double()).dtype == torch.float64


@needs_op
def test_opcheck():
    x, weight, bias = data(3, 8, 4, torch.bfloat16)
    torch.library.opcheck(torch.ops.specdec.linear.default, (x, weight, bias))


@needs_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_of_one_input_have_the_bits_that_each_has_alone(dtype):
    for rows in (1, 4, 9, 100):
        layers = [data(rows, 577, out_features, dtype)[1:] for out_features in (70, 1, 33)]
        x = data(rows, 577, 1, dtype)[0].reshape(1, rows, 577)
        biases = [layers[0][1], None, layers[2][1]]
        together = torch.ops.specdec.linears(x, [weight for weight, _ in layers], biases)
        assert [y.shape for y in together] == [(1, rows, 70), (1, rows, 1), (1, rows, 33)]
        for y, (weight, _), bias in zip(together, layers, biases):
            assert torch.equal(y, torch.ops.specdec.linear(x, weight, bias))


@needs_op
def test_layers_of_one_input_are_checked():
    (x, weight, bias), (_, other, _) = data(9, 8, 4, torch.float32), data(9, 7, 4, torch.float32)
    op = torch.ops.specdec.linears
    torch.library.opcheck(op.default, (x, [weight, weight[:3]], [bias, None]))
    assert all(
        torch.equal(y, functional.linear(x, weight)) for y in op(x, [weight, weight], [None, None], 8)
    )  # torch's, from 9 rows on
    assert [y.shape for y in op(x[:0], [weight], [bias])] == [(0, 4)]
    for weights, biases in (([], []), ([weight], []), ([weight, other], [None, None]), ([weight], [bias[:3]])):
        with pytest.raises(RuntimeError, match="specdec::linear"):
            op(x, weights, biases)


class Model(nn.Module):
    """Two plain linear layers, one of a subclass, one whose forward is taken; the head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(19, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.special = type("Special", (nn.Linear,), {})(8, 8)
        self.hooked = nn.Linear(8, 8)
        self.hooked.forward = self.hooked.forward
        self.head = nn.Linear(8, 19, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hooked(self.special(self.second(self.first(self.embedding(ids))))))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Numbers of rows of the calls that torch's own linear serves."""
    seen: list[int] = []
    original = functional.linear

    def spy(x, weight, bias=None):
        seen.append(x.numel() // x.shape[-1])
        return original(x, weight, bias)

    monkeypatch.setattr(linear_module.functional, "linear", spy)
    return seen


@needs_op
def test_active_swaps_the_plain_modules_and_restores_them(model, calls):
    ids = torch.arange(5)
    expected = model(ids)
    before = [dict(module.__dict__) for module in model.modules()]
    fast = FastLinear(model, max_rows=8)
    assert len(fast) == 3
    calls.clear()
    with fast.active(), fast.active():
        torch.testing.assert_close(model(ids), expected)
        assert calls == [5, 5]  # the subclass and the hooked one
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert torch.equal(model(ids), expected)


@needs_op
def test_active_restores_after_an_exception(model):
    fast = FastLinear(model, max_rows=8)
    with pytest.raises(KeyError), fast.active():
        assert "forward" in model.first.__dict__
        raise KeyError
    assert "forward" not in model.first.__dict__ and "forward" in model.hooked.__dict__


@needs_op
def test_many_rows_gradients_and_replaced_weights_fall_through(model, calls):
    fast = FastLinear(model, max_rows=8)
    with fast.active():
        model.first(torch.ones(9, 8))
        model.first(torch.ones(8, 9)[:, :8])
        with torch.enable_grad():
            assert model.first(torch.ones(2, 8)).requires_grad
        assert calls == [9, 8, 2]
        model.double()
        assert model.first(torch.ones(2, 8, dtype=torch.float64)).dtype == torch.float64


def test_without_the_op_everything_is_torchs(model, monkeypatch):
    monkeypatch.setattr(linear_module, "HAVE_OP", False)
    fast = FastLinear(model)
    assert len(fast) == 0 and fast.max_rows == 0 and instruction_set() is None
    assert winning_rows([(8, 8)], torch.float32) == 0
    assert measure_advantage([(8, 8)], torch.float32, rows=(1, 2)) == {1: 0.0, 2: 0.0}
    x, weight, bias = data(3, 8, 4, torch.float32)
    with fast.active():
        assert torch.equal(linear(x, weight, bias), functional.linear(x, weight, bias))


@needs_op
def test_measure_advantage(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(linear_module, "PROBE_BYTES", 1 << 18)
    advantage = measure_advantage([(64, 32), (100000, 16)], torch.bfloat16, rows=(1, 4), repeats=1)
    assert set(advantage) == {1, 4} and all(value > 0 for value in advantage.values())
    monkeypatch.setattr(linear_module, "measure_advantage", lambda *_: {1: 0.95, 8: 3.0, 64: 0.97, 256: 0.5})
    assert winning_rows([(64, 32)], torch.bfloat16) == 8
    monkeypatch.setattr(linear_module, "measure_advantage", lambda *_: {1: 0.5, 8: 3.0, 64: 3.0, 256: 3.0})
    assert winning_rows([(64, 33)], torch.bfloat16) == 0


@needs_op
def test_one_disturbed_look_does_not_settle_the_winner(monkeypatch, tmp_path):
    """Seen: a spell of another program during the timing of one row, and torch's product, five times slower, was kept for good."""
    looks = [{1: 0.7, 64: 5.0, 256: 5.0}] + [{1: 1.2, 64: 5.0, 256: 5.0}] * 4
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(linear_module, "measure_advantage", lambda *_: looks.pop(0))
    assert winning_rows([(40, 24)], torch.bfloat16) == linear_module.UNLIMITED
    assert not looks


@needs_op
def test_the_winner_is_measured_once_a_machine(monkeypatch, tmp_path):
    """What is about equally fast would else now win and now lose, and bfloat16 texts with it."""

    def another_process(advantages):
        linear_module._winning_rows.cache_clear()
        monkeypatch.setattr(linear_module, "measure_advantage", lambda *_: advantages)
        return winning_rows([(24, 40)], torch.bfloat16)

    fast, slow = {1: 1.0, 64: 1.2, 256: 1.1}, {1: 1.0, 64: 1.1, 256: 0.8}
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    assert another_process(fast) == another_process(slow) == linear_module.UNLIMITED
    (file,) = (tmp_path / "linear").iterdir()
    file.write_text("{ damaged")
    assert another_process(slow) == another_process(fast) == 64
    monkeypatch.setattr(linear_module, "build", lambda: "another library")
    assert another_process(fast) == linear_module.UNLIMITED
    monkeypatch.setenv("SPECDEC_CACHE", "/dev/null/specdec")  # nothing can be kept there
    assert [another_process(fast), another_process(slow)] == [linear_module.UNLIMITED, 64]
    linear_module._winning_rows.cache_clear()


def test_negative_max_rows(model):
    with pytest.raises(ValueError, match="max_rows is -1"):
        FastLinear(model, max_rows=-1)
