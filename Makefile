# Each target sets up what it needs, once: .venv is made anew only when its inputs change.
#   make test             everything that CI runs
#   make demo             the main job, on whatever machine this is
#   make test-vllm        the plugin for vLLM in the real engine, on the CPU; VLLM=0.32.0 for another version
#   make PYTHON=python3.12 test
# The versions installed are those of constraints.txt, which need Python 3.11 or later.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
TRITONS := 3.6.0 3.7.1 3.8.0 3.9.0
VLLM ?= 0.25.0
VLLM_BIN := .venv-vllm/$(VLLM)/bin
VLLM_ALSO_0.25.0 := openai-harmony==0.0.8
VLLM_ALSO_0.32.0 := oss-harmony==0.0.11

.PHONY: test test-vllm test-sglang lint demo long bench-cpu compile-matrix clean
.DELETE_ON_ERROR:

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(READY)
	$(BIN)/anystride demo

# Random problems, many of them. A failure prints the seed that brings it back.
long: export ANYSTRIDE_PROPERTY_EXAMPLES ?= 20000
long: export ANYSTRIDE_PROPERTY_SEED ?= $(shell date +%s)
long: $(READY)
	@echo "$$ANYSTRIDE_PROPERTY_EXAMPLES examples, seed $$ANYSTRIDE_PROPERTY_SEED"
	$(BIN)/python -m pytest -n 2 tests/test_properties.py

bench-cpu: $(READY)
	$(BIN)/anystride bench --suite cpu

# Compiles the kernels for GPUs that are not here, with every Triton that is supported. With
# PYTEST_ADDOPTS=--slow for more of their variants.
compile-matrix: $(TRITONS:%=.triton/%/.ready) $(READY)
	for version in $(TRITONS); do \
		echo "Triton $$version"; \
		PYTHONPATH=.triton/$$version $(BIN)/python -m pytest -n 2 tests/test_compile.py tests/test_driver.py tests/test_hopper.py || exit 1; \
	done

# Downloads vLLM's wheel, 250 to 330 MB, into an environment of its own. Another version than these two needs
# its own line VLLM_ALSO_.
test-vllm: .venv-vllm/$(VLLM)/.ready
	$(VLLM_BIN)/python -m pytest tests/vllm_engine

.venv-vllm/%/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm/$* || { $(PYTHON) -m venv --clear --without-pip .venv-vllm/$* && \
		$(PYTHON) -m pip --python .venv-vllm/$*/bin/python install pip; }
	.venv-vllm/$*/bin/python -m pip install --requirement constraints-vllm.txt $(VLLM_ALSO_$*)
	.venv-vllm/$*/bin/python -m pip install --no-deps vllm==$* --editable .
	touch $@

# The back end of SGLang against SGLang's own classes, on a CPU. SGLang pins PyTorch for CUDA and much that only
# a server needs, so it and torchvision come without what they depend on.
test-sglang: .sglang/.ready
	.sglang/bin/python -m pytest -W ignore tests/test_adapters_sglang.py

# Some Linux distributions take ensurepip out of venv: then pip comes from outside.
$(BIN)/python:
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --clear --without-pip .venv && \
		$(PYTHON) -m pip --python $(BIN)/python install pip; }

$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

.sglang/.ready: pyproject.toml constraints.txt tests/sglang_requirements.txt
	$(PYTHON) -m venv .sglang
	.sglang/bin/python -m pip install -r tests/sglang_requirements.txt
	.sglang/bin/python -m pip install --no-deps sglang==0.5.23 torchvision==0.15.2 --editable .
	touch $@

.triton/%/.ready: | $(BIN)/python
	rm -rf .triton/$*
	$(BIN)/python -m pip install --no-deps --target .triton/$* triton==$*
	touch $@

clean:
	rm -rf .venv .venv-vllm .sglang .triton build dist src/*.egg-info anystride-demo.png .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples -name __pycache__ -prune -exec rm -rf {} +
