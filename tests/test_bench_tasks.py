"""The prompts of a benchmark: splits, whole sets, a user's own file, second turns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.tasks import DEFAULT_DATA, NAMES, Task, encode, load_tasks, random_tasks

MIX = {
    "templates": {"spec-bench": "{turns[0]}", "code-edit": "Fix:\n{declaration}{buggy_solution}", "gsm8k": "{question}"},
    "report": [
        {"group": "qa", "file": "spec-bench/question.jsonl", "id": 7},
        {"group": "qa", "file": "spec-bench/question.jsonl", "id": 8},
        {"group": "code-edit", "file": "humanevalfix/humanevalpack_python.jsonl", "id": "Python/0"},
        {"group": "gsm8k", "file": "gsm8k/test.jsonl", "id": 1},
    ],
    "tune": [],
}
FILES = {
    "spec-bench/question.jsonl": [
        {"question_id": 7, "category": "roleplay", "turns": ["who?", "why?"]},
        {"question_id": 8, "category": "qa", "turns": ["when?\u2028now"]},
    ],
    "humanevalfix/humanevalpack_python.jsonl": [
        {"task_id": "Python/0", "declaration": "def f():\n", "buggy_solution": "    return {1}", "bug_type": "value misuse"},
    ],
    "gsm8k/test.jsonl": [{"question": "1 + 1"}, {"question": "2 + 2"}],
    "humaneval/HumanEval.jsonl": [{"task_id": "HumanEval/0", "prompt": "def f():\n"}],
    "math500/test.jsonl": [{"problem": "x?", "subject": "Algebra", "unique_id": "test/algebra/1.json"}],
    "long-qmsum/qmsum_ami_icsi_10.jsonl": [
        {
            "id": "ES1",
            "general_query_list": [{"query": "Summarize."}],
            "meeting_transcripts": [{"speaker": "A", "content": "Hi."}, {"speaker": "B", "content": "Bye."}],
        }
    ],
}


@pytest.fixture
def data(tmp_path):
    for name, rows in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "mix.json").write_text(json.dumps(MIX))
    return tmp_path


def test_tasks_follow_mix_json(data):
    tasks = load_tasks(data, "report")
    assert [(task.id, task.text) for task in tasks] == [
        ("qa/7", "who?"),
        ("qa/8", "when?\u2028now"),
        ("code-edit/Python/0", "Fix:\ndef f():\n    return {1}"),
        ("gsm8k/1", "2 + 2"),
    ]
    one_of_each_group = ["qa/7", "code-edit/Python/0", "gsm8k/1"]
    assert [task.id for task in load_tasks(data, "report", limit=3)] == one_of_each_group
    assert [task.id for task in load_tasks(data, "report", groups=["qa"])] == ["qa/7", "qa/8"]


def test_tasks_errors(data):
    with pytest.raises(ValueError, match="tasks must be one of report, tune, random, spec-bench, .* got 'test'"):
        load_tasks(data, "test")
    with pytest.raises(ValueError, match="tasks report have no group law; they have code-edit, gsm8k, qa"):
        load_tasks(data, "report", groups=["law"])
    with pytest.raises(ValueError, match="--data"):
        load_tasks(data / "absent", "report")


def test_random_tasks_are_fixed():
    assert random_tasks() == random_tasks()
    assert len({task.text for task in random_tasks()}) == len(random_tasks())


def test_encode_keeps_the_last_tokens(tiny_tokenizer):
    assert tiny_tokenizer.decode(encode(tiny_tokenizer, Task("t", "g", "hello"))) == "<user>hello<assistant>"
    long = encode(tiny_tokenizer, Task("t", "g", "x" * 3000))
    assert len(long) == 1500 and tiny_tokenizer.decode(long).endswith("x<assistant>")


@pytest.mark.skipif(not (DEFAULT_DATA / "mix.json").is_file(), reason="needs ../shared/data")
def test_the_real_mix():
    report_tasks, tune_tasks = load_tasks(DEFAULT_DATA, "report"), load_tasks(DEFAULT_DATA, "tune")
    assert len(report_tasks) == len(tune_tasks) == 54
    assert not {task.id for task in report_tasks} & {task.id for task in tune_tasks}
    assert len({task.group for task in load_tasks(DEFAULT_DATA, "report", limit=9)}) == 9


def write(folder: Path, *rows: object) -> str:
    """A file of the user's; a row that is text is written as it is."""
    path = folder / "mine.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "spec-bench",
            [
                Task("mt-bench/7", "mt-bench", "who?", "roleplay"),
                Task("mt-bench/7/turn-2", "mt-bench", "why?", "roleplay", follows="mt-bench/7"),
                Task("qa/8", "qa", "when?\u2028now"),
            ],
        ),
        ("humaneval", [Task("humaneval/HumanEval/0", "humaneval", "Complete this Python function:\ndef f():\n")]),
        ("gsm8k", [Task("gsm8k/0", "gsm8k", "1 + 1"), Task("gsm8k/1", "gsm8k", "2 + 2")]),
        ("math500", [Task("math500/test/algebra/1.json", "math500", "x?", "Algebra")]),
        (
            "humanevalfix",
            [
                Task(
                    "humanevalfix/Python/0",
                    "humanevalfix",
                    "Fix the bug and return the whole function:\ndef f():\n    return {1}",
                    "value misuse",
                )
            ],
        ),
        ("long-qmsum", [Task("long-qmsum/ES1", "long-qmsum", "A: Hi.\nB: Bye.\n\nSummarize.", whole=True)]),
    ],
)
def test_whole_sets(data, name, expected):
    assert load_tasks(data, name) == expected


def test_the_second_turn_stays_with_the_first(data):
    assert [task.id for task in load_tasks(data, "spec-bench", limit=1)] == ["mt-bench/7", "mt-bench/7/turn-2"]
    assert [task.id for task in load_tasks(data, "spec-bench", groups=["qa"])] == ["qa/8"]


def test_own_file(tmp_path, data):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    path = write(
        tmp_path, {"prompt": "first"}, "", {"id": "x", "group": "law", "category": "tax", "prompt": "p"}, {"messages": chat}
    )
    assert load_tasks(data, path) == [
        Task("mine/1", "mine", "first", whole=True),
        Task("law/x", "law", "p", "tax", whole=True),
        Task("mine/4", "mine", "a", before=(chat[0],), whole=True),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "mine.jsonl, line 1 is not JSON"),
        ([{"prompt": "a"}, {"text": "b"}], 'line 2 must be an object with either "prompt" or "messages"'),
        ([{"prompt": "a", "messages": []}], "line 1 must be an object with either"),
        (["[1]"], "line 1 must be an object"),
        ([{"prompt": 3}], "line 1: a prompt is text"),
        ([{"messages": []}], "line 1: a prompt is text"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "end with the user's"),
        ([{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}], "has the id '1' more than once"),
        ([], "holds no prompt"),
    ],
)
def test_own_file_errors(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load_tasks(tmp_path, write(tmp_path, *rows))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="a .jsonl file that is there, got '.*absent.jsonl'"):
        load_tasks(tmp_path, str(tmp_path / "absent.jsonl"))
    with pytest.raises(ValueError, match="folder with math500/test.jsonl for the tasks math500.*--data"):
        load_tasks(tmp_path, "math500")
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        load_tasks(tmp_path, "random", limit=0)


def test_prompts_are_cut_to_what_fits(tiny_tokenizer):
    whole, cut = (Task("t", "g", "x" * 3000, whole=each) for each in (True, False))
    assert len(encode(tiny_tokenizer, whole)) == len("<user>" + "x" * 3000 + "<assistant>")
    assert len(encode(tiny_tokenizer, whole, window=2000)) == 2000
    assert len(encode(tiny_tokenizer, cut, window=2000)) == 1500
    assert len(encode(tiny_tokenizer, cut, window=100)) == 100


def test_messages_come_before_the_turn(tiny_tokenizer):
    before = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    own = Task("t", "g", "c", before=before)
    assert tiny_tokenizer.decode(encode(tiny_tokenizer, own)) == "<user>a<assistant>b<user>c<assistant>"
    assert encode(tiny_tokenizer, Task("t", "g", "c"), before) == encode(tiny_tokenizer, own)


@pytest.mark.skipif(not (DEFAULT_DATA / "mix.json").is_file(), reason="needs ../shared/data")
@pytest.mark.parametrize("name", NAMES)
def test_every_name_loads(name):
    """Ids are unique; Spec-Bench has its six groups, 13 categories and both turns of MT-Bench."""
    tasks = load_tasks(DEFAULT_DATA, name)
    assert tasks and len({task.id for task in tasks}) == len(tasks)
    if name == "spec-bench":
        assert len(tasks) == 480 + 80
        assert len({task.group for task in tasks}) == 6
        assert len({task.category or task.group for task in tasks}) == 13
