VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ENGINE ?= out/demo-ort-cpu-fp32
IMAGE ?=
MODEL ?= qwen3-vl-2b

# The environment holds an editable install, so one that two checkouts shared would run the code of the last to install.
OWNER := $(shell cat '$(STAMP)' 2>/dev/null)
ifneq ($(or $(OWNER),$(CURDIR)),$(CURDIR))
$(error $(VENV) runs the code of $(OWNER), not of this checkout; choose another folder with VENV=... or remove it)
endif

.PHONY: setup demo test lint bench compare-setup gpu-check

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; choose one with PYTHON=...") if sys.version_info < (3, 11) else 0'
	@echo "Setting up $(VENV): PyTorch, transformers, ONNX Runtime and the development tools from the package index."
	@echo "About 3 GB to fetch on a first run, 6 GB on disk, most of it PyTorch's CUDA libraries."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[export,cpu,tensorrt-rtx,dev]'
	@echo '$(CURDIR)' > $@

demo: setup
	$(BIN)/python scripts/demo.py --output $(ENGINE) $(if $(IMAGE),--image '$(IMAGE)')

test: setup
	$(BIN)/python -m pytest -q -m 'not slow and not gpu'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks synthetic out/bench --model $(MODEL)
	$(BIN)/python -m benchmarks import
	$(BIN)/python -m benchmarks export --model $(MODEL) --no-weights --repeats 3
	$(BIN)/python -m benchmarks export --model $(MODEL) --checkpoint out/bench --repeats 2 --work-dir out
	$(BIN)/python -m benchmarks run --model $(MODEL) --checkpoint out/bench --work-dir out
	$(BIN)/python -m benchmarks report
	rm -r out/bench

compare-setup: setup
	@echo "Setting up build/peers: environments of onnxruntime-genai and OpenVINO, each with a PyTorch of its own."
	$(BIN)/python -m benchmarks compare-setup

# Beside the demo, the model that is asked for: MODEL=FOLDER, MODEL=owner/name, or MODEL=qwen3-vl-2b for random weights.
gpu-check: setup
	$(BIN)/python scripts/gpu_check.py $(if $(filter file,$(origin MODEL)),,--model '$(MODEL)')
