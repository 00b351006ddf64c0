# make demo | test | check | bench | drill: each sets up what is missing in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of this version is the one to pick where there is no NVIDIA driver: pip takes it by
# itself wherever it can see it (as a file, or on PyTorch's CPU index in PIP_EXTRA_INDEX_URL).
CPU_TORCH := torch==2.13.0
GPU := $(wildcard /proc/driver/nvidia)
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt

.PHONY: demo test check bench drill clean

demo: $(VENV)/.demo
	$(BIN)/unisono train shakespeare --replicas 2

test: $(VENV)/.dev
	$(BIN)/pytest --durations=10

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/efficiency.py
	$(BIN)/python benchmarks/links.py --json benchmarks/results/links.json

drill: $(VENV)/.dev
	$(BIN)/pytest -m slow --durations=10
	$(BIN)/python benchmarks/hangs.py

# torch comes first and is pinned, so that nothing installed later replaces its build.
$(VENV)/constraints.txt:
	$(PYTHON) -m venv $(VENV)
	echo "$(if $(GPU),,$(CPU_TORCH))" > $@.new
	$(BIN)/pip install --quiet --disable-pip-version-check "$(if $(GPU),torch>=2.11,$(CPU_TORCH))"
	mv $@.new $@

$(VENV)/.demo: pyproject.toml | $(VENV)/constraints.txt
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/constraints.txt
	$(PIP) -e '.[demo,dev,data,gguf,lora,tensorboard,prometheus]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
