PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
# DeepSpeed compiles its CPU communication op at first use. In a folder of this environment, since two environments that share one
# compile over each other, and a lock that a killed build left behind makes every later start wait for ever.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.venv/torch_extensions

.PHONY: install quickstart check test chaos gpu evidence lint format clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/accelerate launch --config_file launch/accelerate/cpu_zero3.yaml launch/train.py --config quickstart

# Before each commit: linters, types, and the tests that start no process. CHECK_WORKERS=0 runs them in order, in one process.
check: lint
	$(BIN)/python -m pytest -q -m "not processes and not slow" --numprocesses $${CHECK_WORKERS:-2} --dist worksteal

# First what starts no process, on two workers; then what has ranks of its own, a file on each of two workers, which most often wait:
# for imports, for each other, for a timeout. TEST_WORKERS=0 and RANK_WORKERS=0 run the two in order, in one process.
# The op before all: where a loaded machine makes a test give up on it, that test's ranks die with the lock in place.
test: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -c "from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder; ShareMemCommBuilder().load(verbose=False)"
	$(BIN)/python -m pytest -m "not processes" --numprocesses $${TEST_WORKERS:-2} --dist worksteal
	$(BIN)/python -m pytest -m processes --numprocesses $${RANK_WORKERS:-2} --dist loadfile --no-loadscope-reorder

# Scoring jobs killed 50 times, a training run 25 times, hosts lost, and what takes minutes under the real launcher. MRPO_CHAOS_SEED=n chooses other moments.
chaos: install
	MRPO_CHAOS_KILLS=$${MRPO_CHAOS_KILLS:-50} $(BIN)/python -m pytest tests/distributed/test_score_chaos.py tests/distributed/test_score_jobs.py
	MRPO_CHAOS_KILLS=$${MRPO_CHAOS_KILLS:-25} $(BIN)/python -m pytest tests/distributed/test_train_chaos.py tests/multihost

# Everything that waits for a GPU, in half an hour, results in runs/gpu; GPU='--dry_run' says what would run. docs/kernels.md
gpu: install
	$(BIN)/python benchmarks/gpu_session.py $(GPU)

# Tables and pictures of docs/evidence.md from the stored runs; SCALE=small runs a study of its own, with tiny models, from nothing.
evidence: install
	$(BIN)/python -m benchmarks.evidence.$(if $(filter small,$(SCALE)),small,report)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist runs .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
