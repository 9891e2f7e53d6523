# make quickstart   pretraining to report on real data, in minutes on two cores
# make test         the fast tests        make test-slow   the others
# make check        lint, format, types, layout
# Every target creates .venv itself.

# Where pip finds a CPU build of torch, if your index brings the CUDA one:
#   make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The teachers that label structures, where a target needs them.
TEACHERS := $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,labels]'
# Corpora in full, where they are not there yet.
built = for corpus in $(1); do \
	test -d corpora/full/$$corpus || $(BIN)/moiety data build $$corpus --profile full || exit; done
PEERS := .venv-peers
PEERS_INSTALLED := $(PEERS)/.installed
RUN ?= runs/quickstart
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

# Threads that spin while they wait cost more than they gain on few cores; glibc otherwise page-faults every tensor
# over 128 KiB (1.5 times slower).
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0
export MALLOC_MMAP_MAX_ := 0
export MALLOC_TRIM_THRESHOLD_ := 17179869184
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install quickstart test test-slow check format transfer transfer-quick recipes bridge pretraining-choices weights bench bench-gpu bench-accuracy report-png clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or newer is needed (Debian: apt-get install python3 python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) has no venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: $(INSTALLED)
	@bash launch/quickstart.sh

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_layout.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What pretraining is worth: paired runs of all methods on tasks of every domain; many hours.
transfer: $(INSTALLED)
	$(TEACHERS)
	$(call built,qm9 forces crystals proteins)
	$(BIN)/python benchmarks/transfer.py

transfer-quick: $(INSTALLED)
	$(TEACHERS)
	$(call built,qm9)
	$(BIN)/python benchmarks/transfer.py --quick

# The recipes that `make transfer` does not measure, as they stand, on their own test sets; hours.
recipes: $(INSTALLED)
	$(TEACHERS)
	$(call built,qm9 forces freesolv polarizabilities surfaces interactions s22 flows)
	$(BIN)/python benchmarks/recipes.py

# The text bridge and the controls that are trained as it is, one seed: trains, asks and tabulates.
bridge: $(INSTALLED)
	$(call built,isomers qm9 crystals ccd texts english)
	$(BIN)/python benchmarks/bridge.py

# Objectives at equal FLOPs, domains at equal exposure; needs the rates of `make transfer`. Hours.
pretraining-choices: $(INSTALLED)
	$(TEACHERS)
	$(call built,qm9 ccd crystals proteins forces gfn1 r2scan)
	$(BIN)/python benchmarks/pretraining.py

# What comes with the package, made again: pretraining by denoising (2.4 hours on a core), then with labels of teachers beside
# (five minutes on an H200, some six hours on a core by its nodes, untried; an hour on a core; an hour and three quarters on two),
# two adapters (half an hour each).
weights: $(INSTALLED)
	$(TEACHERS)
	$(call built,qm9 ccd crystals proteins forces gfn1 r2scan)
	$(BIN)/python pretrain/train.py --config pretrain/configs/released_denoising.yaml --out runs/released/denoising
	$(BIN)/python pretrain/train.py --config pretrain/configs/released_labels.yaml --out runs/released/labels
	$(BIN)/python pretrain/train.py --config pretrain/configs/released_continued.yaml --out runs/released/continued
	$(BIN)/deepspeed --num_accelerators 2 pretrain/train.py --config pretrain/configs/released.yaml --out runs/released/base
	$(BIN)/python finetune/lora.py --config finetune/configs/released_gap.yaml --out runs/released/gap
	$(BIN)/python finetune/lora.py --config finetune/configs/released_forces.yaml --out runs/released/forces
	$(BIN)/python pretrain/release.py runs/released/base tiny gap=runs/released/gap forces=runs/released/forces

# Speed and memory beside other models, which have an environment of their own.
bench: $(INSTALLED) $(PEERS_INSTALLED)
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/compiled.py

bench-gpu: $(INSTALLED) $(PEERS_INSTALLED)
	$(BIN)/python benchmarks/speed.py --device cuda
	$(BIN)/python benchmarks/compiled.py --device cuda --out benchmarks/results/compiled_gpu.json

# Accuracy for the same compute: pilots, then the matrix; many hours. What is finished is not run again.
bench-accuracy: $(INSTALLED) $(PEERS_INSTALLED)
	$(TEACHERS)
	$(call built,qm9 forces)
	test -f corpora/accuracy/forces.npz || $(BIN)/python benchmarks/accuracy/prepare.py
	$(BIN)/python benchmarks/accuracy.py --pilot
	$(BIN)/python benchmarks/accuracy.py

$(PEERS_INSTALLED): benchmarks/peers/requirements.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --no-deps --requirement $<
	@touch $@

# The picture of the README: the top of the report of RUN, through a browser.
report-png: $(INSTALLED)
	@test -n "$(CHROMIUM)" || { echo "make: report-png needs chromium (Debian: apt-get install chromium)" >&2; exit 1; }
	$(BIN)/moiety report $(RUN)
	$(CHROMIUM) --headless --no-sandbox --disable-gpu --use-angle=swiftshader --enable-unsafe-swiftshader \
		--disable-background-networking --no-first-run --user-data-dir=$$(mktemp -d) --hide-scrollbars \
		--window-size=1240,2050 --virtual-time-budget=15000 --screenshot=docs/report.png \
		file://$(abspath $(RUN))/report.html 2>/dev/null
	@ls -l docs/report.png

clean:
	rm -rf $(VENV) $(PEERS) dist .pytest_cache .ruff_cache
