"""save_state / load_state: what comes back is what was written, and nothing else is accepted. share_state: nothing is lost."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specdec import Engine, SamplingParams
from specdec.state import load_state, save_state
from tiny_models import VOCAB, build

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


# ---- sharing --------------------------------------------------------------------------------------------------------------------


def learned(model: Any, *prompts: list[int], state: Path | None = None) -> Engine:
    engine = Engine(model, method="best_first", budget=6, state=state)
    for prompt in prompts:
        engine.generate(prompt, SamplingParams(max_new_tokens=8))
    return engine


def texts(engine: Engine) -> set[tuple[int, ...]]:
    """The finished texts that an engine keeps."""
    parts: list[list[int]] = [[]]
    for token in engine.builder.state()["shared.tokens"].tolist():
        if token == -1:
            parts.append([])
        else:
            parts[-1].append(token)
    return {tuple(part) for part in parts if part}


def rows_of(state: dict[str, np.ndarray]) -> dict[tuple[int, ...], tuple[int, list[int], list[float]]]:
    """The slow obvious table: context -> stamp, tokens, probabilities."""
    arrays = [state[f"table.{name}"].tolist() for name in ("keys", "stamps", "tokens", "probs")]
    return {tuple(key): (stamp, tokens, probs) for key, stamp, tokens, probs in zip(*arrays)}


def test_engines_take_in_what_others_learned(tmp_path: Path) -> None:
    model, shared = build("llama"), tmp_path / "shared"
    first = learned(model, [1, 2, 3, 4])
    first.share_state(shared)
    second, third = learned(model, [5, 6, 7], state=shared), learned(model, [8, 9, 1], [2, 3, 4], state=shared)
    own = [rows_of(engine.builder.state()) for engine in (second, third)]
    second.share_state(shared)
    third.share_state(shared)
    second.share_state(shared)
    assert texts(second) == texts(third) == texts(learned(model, [1, 2, 3, 4], [5, 6, 7], [8, 9, 1], [2, 3, 4]))
    found = [rows_of(engine.builder.state()) for engine in (second, third)]
    assert found[0].keys() == found[1].keys() == own[0].keys() | own[1].keys()
    for context, (stamp, tokens, probs) in found[1].items():
        rivals = [table[context] for table in own if context in table]
        assert stamp == max(rival[0] for rival in rivals) and (stamp, tokens, probs) in rivals
    before = texts(second), rows_of(second.builder.state())
    second.share_state(shared)
    assert (texts(second), rows_of(second.builder.state())) == before, "nothing is new"


def test_texts_do_not_depend_on_what_was_shared(tmp_path: Path) -> None:
    model, params = build("llama"), SamplingParams(max_new_tokens=24)
    plain = Engine(model, method="none").generate([1, 2, 3, 4], params)
    learned(model, [1, 2, 3, 4], [5, 6, 7]).share_state(tmp_path / "shared")
    engine = learned(model, [7, 7, 7])
    engine.share_state(tmp_path / "shared")
    result = engine.generate([1, 2, 3, 4], params)
    assert result.token_ids == plain.token_ids and result.steps < plain.steps


@pytest.mark.parametrize("method", ["goose", "token_recycling"])
def test_tables_of_pairs_keep_their_own_rows_and_take_the_others(method: str, tmp_path: Path) -> None:
    model = build("llama")
    first, second = (Engine(model, method=method, budget=6) for _ in range(2))
    first.generate([1, 2, 3, 4], SamplingParams(max_new_tokens=16))
    second.generate([5, 6, 3, 4], SamplingParams(max_new_tokens=8))
    theirs, own = first.builder.state(), second.builder.state()
    first.share_state(tmp_path / "shared")
    second.share_state(tmp_path / "shared")
    merged = second.builder.state()
    for keys, tokens in (("unigram_ids", "unigram_tokens"), ("bigram_keys", "bigram_tokens")):
        expected = {
            **dict(zip(theirs[keys].tolist(), theirs[tokens].tolist())),
            **dict(zip(own[keys].tolist(), own[tokens].tolist())),
        }
        assert dict(zip(merged[keys].tolist(), merged[tokens].tolist())) == expected
    counts = next(name for name in own if name.endswith("_counts"))
    np.testing.assert_array_equal(merged[counts], theirs[counts] if theirs[counts].sum() > own[counts].sum() else own[counts])


def test_a_method_that_cannot_merge_leaves_the_file(tmp_path: Path) -> None:
    engine = Engine(build("llama"), method="none")
    engine.share_state(tmp_path / "shared")
    written = (tmp_path / "shared").read_bytes()
    engine.share_state(tmp_path / "shared")
    assert (tmp_path / "shared").read_bytes() == written


def test_nothing_is_lost_when_many_share_at_once(tmp_path: Path) -> None:
    model = build("llama")
    prompts = [[number, number + 1, number + 2] for number in range(1, 25, 3)]
    engines = [learned(model, prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(engines)) as pool:
        list(pool.map(lambda engine: engine.share_state(tmp_path / "shared"), engines))
    assert texts(learned(model, state=tmp_path / "shared")) == set().union(*map(texts, engines)) and len(engines) == 8


def test_torn_and_hostile_files_change_nothing(tmp_path: Path) -> None:
    model, good, bad = build("llama"), tmp_path / "good", tmp_path / "bad"
    learned(model, [1, 2, 3, 4]).share_state(good)
    arrays = load_state(good, "best_first", VOCAB)
    victim = learned(model, [5, 6, 7])
    known = {name: array.copy() for name, array in victim.builder.state().items()}

    def hostile(name: str, value: Any) -> dict[str, np.ndarray]:
        array = arrays[name].copy()
        array.flat[0] = value
        return {**arrays, name: array}

    states = [
        hostile("shared.tokens", VOCAB), hostile("shared.tokens", -2), hostile("table.tokens", VOCAB), hostile("table.tokens", -5),
        hostile("table.keys", -7), hostile("table.keys", VOCAB), hostile("table.keys", -1), hostile("table.stamps", -1),
        hostile("table.clock", -1), hostile("table.probs", np.nan), hostile("table.probs", 7.0),
        hostile("calibration.weights", np.inf), hostile("calibration.trials", 0.0),
        {**arrays, "table.probs": arrays["table.probs"].astype(np.float64)}, {**arrays, "shared.tokens": arrays["shared.tokens"][None]},
        {**arrays, "table.keys": arrays["table.keys"][:, ::-1].copy()}, {name: arrays[name] for name in arrays if name != "table.keys"},
    ]  # fmt: skip
    for number, state in enumerate(states):
        save_state(state, bad, "best_first", VOCAB)
        for call in (victim.share_state, victim.load_state):
            with pytest.raises(ValueError):
                call(bad)
        for name, array in victim.builder.state().items():
            np.testing.assert_array_equal(array, known[name], err_msg=f"state {number}, {name}")
    whole = good.read_bytes()
    for size in (0, 7, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a safetensors file"):
            victim.share_state(bad)
        assert bad.read_bytes() == whole[:size]
