"""The learning pass against torch.topk and torch.argmax, where logits tie and where they are no numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specdec._jit import HAVE_NUMBA
from specdec.learning import top_k

pytestmark = pytest.mark.skipif(not HAVE_NUMBA, reason="without numba the pass is torch.topk itself")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 63, 64, 65, 1000])
@pytest.mark.parametrize("shift", [0.0, 50.0, -50.0])
def test_the_largest_logits_and_their_softmax(dtype: torch.dtype, width: int, shift: float) -> None:
    logits = (torch.randn(20, width, generator=torch.Generator().manual_seed(width)) * 4 + shift).to(dtype)
    found, expected = top_k(logits, 8), torch.topk(logits.double(), 8)
    values = logits.double().gather(1, torch.from_numpy(found.tokens).long())
    assert torch.equal(values, expected.values)  # the tokens may be others of equal logits
    assert all(len(set(row)) == 8 for row in found.tokens.tolist())
    np.testing.assert_allclose(found.probs, torch.softmax(expected.values, -1).numpy(), rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax_is_the_first_of_equals(dtype: torch.dtype) -> None:
    """A few levels only, positive and negative, so that every row ties."""
    logits = torch.randint(-3, 4, (200, 130), generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[logits == 0] = 7.0
    logits[100:] -= 20
    found = top_k(logits, 4)
    assert found.argmax is not None
    assert found.argmax.tolist() == logits.float().numpy().argmax(-1).tolist()
    assert found[100:150].argmax.tolist() == found.argmax[100:150].tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf", "zeros"])
def test_argmax_is_asked_where_a_plain_number_is_not_the_answer(dtype: torch.dtype, value: str) -> None:
    logits = torch.full((3, 100), -1.0, dtype=dtype)
    if value == "zeros":
        logits[1, 40], logits[1, 60] = -0.0, 0.0  # equal, and the first of them is the argmax
    elif value == "-inf":
        logits[1] = float("-inf")
    else:
        logits[1, 50] = float(value.removeprefix("-"))
        if value == "-nan":  # what inf - inf gives on x86
            logits.view({torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype])[1, 50] = -1
    found = top_k(logits, 8)
    assert found.argmax is not None
    assert found.argmax.tolist() == [0, -1, 0]
