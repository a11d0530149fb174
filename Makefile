VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
ENGINE ?= out/demo-ort-cpu-fp32
IMAGE ?=
MODEL ?= qwen3-vl-2b
TRANSFORMERS ?=
INPUTS ?= 20000
SEED ?= 0
FAMILIES ?=
CASE ?=
SM ?= 90
DRY_RUN ?=

CHECK_PYTHON := import sys; sys.exit(f"{sys.executable}: Python 3.11 to 3.14 is needed; choose one with PYTHON=... or another folder with VENV=...") if not (3, 11) <= sys.version_info < (3, 15) else 0
# Names of files reach the recipes through the environment: they may hold any character.
export IMAGE ENGINE

# The environment holds an editable install, so one that two checkouts shared would run the code of the last to install.
OWNER := $(shell cat '$(STAMP)' 2>/dev/null)
ifneq ($(or $(OWNER),$(CURDIR)),$(CURDIR))
$(error $(VENV) runs the code of $(OWNER), not of this checkout; choose another folder with VENV=... or remove it)
endif

# The library of own kernels: `pip install` builds it where it can, and says nothing where it cannot.
LIBRARY := runtime/native/libqwen3vl_cpu.so

.PHONY: setup native wheel release site demo lock test test-slow fuzz fuzz-replay test-newest test-oldest test-transformers test-clients test-cluster test-triton lint bench compare-setup test-peers gpu-check gpu-pack

setup: $(DEV_STAMP) $(LIBRARY)

# ONNX Runtime has no wheel for Python 3.15 yet. Without build isolation: setuptools, too, is the one of the lock.
$(STAMP): pyproject.toml locks/demo.txt
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	@echo "Setting up $(VENV) from locks/demo.txt: PyTorch, ONNX and ONNX Runtime from the package index."
	@echo "About 3.1 GB to fetch on a first run, 5.7 GB on disk, nearly all of it PyTorch and its CUDA libraries."
	$(BIN)/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv '$(VENV)'
	@$(BIN)/python -c '$(CHECK_PYTHON)'
	$(BIN)/python $(PIP_INSTALL) -r locks/demo.txt
	$(BIN)/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@echo '$(CURDIR)' > $@

$(DEV_STAMP): $(STAMP) locks/dev.txt
	@echo "Adding what the tests need from locks/dev.txt: transformers, torchvision, TensorRT-RTX, optimum, Polygraphy, development tools."
	@echo "About 360 MB to fetch on a first run, 1.3 GB on disk."
	$(BIN)/python $(PIP_INSTALL) -r locks/dev.txt
	@touch $@

# Without a compiler, engines are built with ONNX Runtime's kernels; sources that do not compile end this.
$(LIBRARY): setup.py $(wildcard native/*.cpp native/*.h native/*.toml) | $(STAMP)
	@if command -v "$${CXX:-g++}" >/dev/null; then $(BIN)/python setup.py --quiet build_ext --inplace --strict && touch $@; \
	else echo "note: no $${CXX:-g++}, so the own kernels ($@) are not built; apt-get install g++, then make native"; fi

native: $(LIBRARY)

# A wheel for manylinux, checked: see docs/cpu_kernels.md.
wheel: setup
	$(BIN)/python scripts/wheels.py

# At a commit with a tag; at others with DRY_RUN=1. Nothing is uploaded: CONTRIBUTING.md says how.
release: setup
	$(BIN)/python -m scripts.release check $(if $(DRY_RUN),--dry-run)

# The documentation as a site, in build/site; a warning fails. PyTorch is not imported: names are read, not run.
site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

demo: $(STAMP) $(LIBRARY)
	$(BIN)/python scripts/demo.py --output "$$ENGINE" $(if $(IMAGE),--image "$$IMAGE")

lock: setup
	$(BIN)/python scripts/lock.py

# Two processes: engines are built once in each, so a file's tests stay together. Files run in the order of tests/conftest.py,
# which begins with those that take longest.
test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow and not gpu'

# Matrices in full, more canvases and seeds, models of full size. Each behaviour has a test in `make test`, too.
test-slow: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m 'slow and not gpu'

# The next three run tests in environments that share the PyTorch of $(VENV), which takes gigabytes. Of the test files only
# those with a test that is asked for are read: others import what an environment may lack.
files-with = $(shell grep -rlE --include='test_*.py' 'mark\.($(1))\b' tests)
SHARED := -c build/shared-torch/constraints.txt

# The newest release of all else that the ranges in pyproject.toml allow today, whatever the locks say.
test-newest: setup
	$(BIN)/python scripts/share_torch.py build/newest
	build/newest/bin/python $(PIP_INSTALL) $(SHARED) -e '.[export,cpu,verify,video,structured,heif,serve,test]'
	build/newest/bin/python -m pytest -q -m '(judge or portable) and not gpu' $(call files-with,judge|portable)

# The lowest releases: without transformers and torchvision, with a PyTorch of its own; then with the lowest transformers.
test-oldest: build/oldest/.installed build/oldest-transformers/.installed
	build/oldest/bin/python -m pytest -q -m 'portable and not gpu' $(call files-with,portable)
	build/oldest-transformers/bin/python -m pytest -q -m 'judge and not gpu' $(call files-with,judge)

build/oldest/.installed: pyproject.toml locks/oldest.txt | $(DEV_STAMP)
	$(BIN)/python -m venv --clear $(@D)
	$(@D)/bin/python $(PIP_INSTALL) -r locks/oldest.txt
	$(@D)/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

build/oldest-transformers/.installed: pyproject.toml locks/oldest-transformers.txt | $(DEV_STAMP)
	$(BIN)/python scripts/share_torch.py $(@D)
	$(@D)/bin/python $(PIP_INSTALL) $(SHARED) -r locks/oldest-transformers.txt
	$(@D)/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

# One release of transformers: make test-transformers TRANSFORMERS=5.0.0
test-transformers: setup
	@test -n '$(TRANSFORMERS)' || { echo 'error: which release? make test-transformers TRANSFORMERS=5.0.0' >&2; exit 2; }
	$(BIN)/python scripts/share_torch.py build/transformers-$(TRANSFORMERS)
	build/transformers-$(TRANSFORMERS)/bin/python $(PIP_INSTALL) $(SHARED) -e '.[export,cpu,verify,video,structured,heif,serve,test]' 'transformers==$(TRANSFORMERS)'
	build/transformers-$(TRANSFORMERS)/bin/python -m pytest -q -m 'judge and not gpu' $(call files-with,judge)

# The server with the clients that users have: OpenAI's, langchain's, llama-index's; and schemathesis.
test-clients: setup
	$(BIN)/python scripts/share_torch.py build/clients
	build/clients/bin/python $(PIP_INSTALL) $(SHARED) -e '.[export,cpu,video,structured,serve,test]' openai langchain-openai llama-index-llms-openai-like schemathesis
	build/clients/bin/python -m pytest -q tests/runtime/server/test_clients.py

# With Ray and with the schemas of Triton Inference Server, in an environment without PyTorch; engines are those of `make setup`.
test-cluster: setup build/cluster/.installed
	$(BIN)/qwen3vl-export demo --target ort-cpu-fp32 --output build/cluster/engine --quiet
	build/cluster/bin/python -m pytest -q -m cluster $(call files-with,cluster)

build/cluster/.installed: pyproject.toml locks/cluster.txt
	$(PYTHON) -m venv build/cluster
	build/cluster/bin/python $(PIP_INSTALL) -r locks/cluster.txt
	build/cluster/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

# A packaged model in a real Triton Inference Server: that of NVIDIA's wheel of PyTriton, whose Python backend wants NumPy 1.
test-triton: setup build/triton/.installed
	$(BIN)/qwen3vl-export demo --target ort-cpu-fp32 --output build/triton/engine --quiet
	build/triton/bin/python -m pytest -q -m cluster tests/runtime/integrations/test_triton_server.py

build/triton/.installed:
	$(PYTHON) -m venv build/triton
	build/triton/bin/python $(PIP_INSTALL) nvidia-pytriton==0.7.0 'numpy<2' onnxruntime tokenizers jinja2 pillow typer rich fastapi pydantic uvicorn prometheus-client pytest hypothesis psutil
	@touch $@

# Hostile inputs of every kind; findings are files under build/fuzz/.
fuzz: setup
	PYTHONPATH=.:tests $(BIN)/python -m fuzz --inputs $(INPUTS) --seed $(SEED) $(FAMILIES)

# One finding again: make fuzz-replay CASE=build/fuzz/images-memory-1.json
fuzz-replay: setup
	@test -n '$(CASE)' || { echo 'error: which finding? make fuzz-replay CASE=build/fuzz/....json' >&2; exit 2; }
	PYTHONPATH=.:tests $(BIN)/python -m fuzz --replay '$(CASE)'

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
	@echo "Setting up build/peers: environments of onnxruntime-genai and OpenVINO, which share the PyTorch of $(VENV)."
	$(BIN)/python -m benchmarks compare-setup

# What the peers can and cannot do, where that decides what we offer.
test-peers: compare-setup
	$(BIN)/python -m pytest -q tests/benchmarks/test_genai_deepstack.py

# Beside the demo, the model that is asked for: MODEL=FOLDER, MODEL=owner/name, or MODEL=qwen3-vl-2b for random weights.
gpu-check: setup
	$(BIN)/python -m benchmarks gpu-check $(if $(filter file,$(origin MODEL)),,--model '$(MODEL)')

# What measures a machine with a GPU and without a package index; see docs/benchmarks.md. SM is the GPU's: 90 for H100 and H200.
gpu-pack: setup
	$(BIN)/python -m benchmarks gpu-pack --sm $(SM)
