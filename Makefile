# Every target works alone from a fresh clone: it makes the virtual environment that it needs.
# A machine with a GPU should come with its own torch: make VENV=/path/to/environment, or TORCH="torch==x.y.z".

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
TASKS  ?= 5
BIN    := $(VENV)/bin

.PHONY: test demo ablation bench bench-disk bench-gpu lint clean

test: $(VENV)/.test
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py --tasks $(TASKS)

ablation: $(VENV)/.demo
	$(BIN)/python examples/ablation.py --tasks $(TASKS)

bench: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks
	$(BIN)/python benchmarks/merges.py
	$(BIN)/python benchmarks/memory.py

# 13 GB of disk; MERGEKIT=/path/to/bin/mergekit-yaml to compare
bench-disk: $(VENV)/.test $(VENV)/.bench
	$(BIN)/python benchmarks/from_disk.py $(if $(MERGEKIT),--mergekit $(MERGEKIT))

# on a machine with an NVIDIA GPU and a torch for it: make bench-gpu TORCH=torch==x.y.z
bench-gpu: $(VENV)/.test $(VENV)/.bench
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf $(VENV) .demo build *.egg-info

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

# one stamp per extra: .test, .demo, .bench
$(VENV)/.%: $(VENV)/.torch pyproject.toml setup.py
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
