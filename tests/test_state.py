"""save_state / load_state: what comes back is what was written, and nothing else is accepted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from specdec.state import load_state, save_state

ARRAYS = {
    "table": np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2],
    "scores": np.array([0.5, np.nan], np.float32),
    "empty": np.zeros((0, 4), np.uint8),
}


def test_round_trip(tmp_path: Path) -> None:
    save_state(ARRAYS, tmp_path / "state", "goose", 97)
    found = load_state(str(tmp_path / "state"), "goose", 97)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_nothing_learned_is_a_state_too(tmp_path: Path) -> None:
    save_state({}, tmp_path / "state", "none", 97)
    assert load_state(tmp_path / "state", "none", 97) == {}


@pytest.mark.parametrize(
    ("method", "vocab_size", "message"), [("suffix", 97, "method 'goose'"), ("goose", 98, "vocab_size '97'")]
)
def test_a_state_of_another_engine_is_refused(tmp_path: Path, method: str, vocab_size: int, message: str) -> None:
    save_state(ARRAYS, tmp_path / "state", "goose", 97)
    with pytest.raises(ValueError, match=message):
        load_state(tmp_path / "state", method, vocab_size)


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(FileNotFoundError, match="missing"):
        load_state(tmp_path / "missing", "goose", 97)
    (tmp_path / "text").write_text("not a state")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_state(tmp_path / "text", "goose", 97)
    save_file({"weight": np.zeros(3)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="format None"):
        load_state(tmp_path / "weights", "goose", 97)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    save_state(ARRAYS, path, "goose", 97)
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("specdec.state.os.replace", full)
    with pytest.raises(OSError, match="no space"):
        save_state({"table": np.zeros(1)}, path, "goose", 97)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["state"]
