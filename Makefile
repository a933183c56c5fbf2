# Everything runs in .venv, which each target creates if it is missing. PYTHON names another interpreter (3.11 or newer).
PYTHON ?= python3.11
ROOT ?= runs
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test test-long check ui clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[cluster,serve,losses,features,dev]'
	touch $@

demo: .venv/ready  ## the whole pipeline on handwritten digits, a few minutes on two CPU cores
	BLD_ROOT=$(ROOT) python pipelines/make_shards.py --images_per_shard 405 --output $(ROOT)/digits
	BLD_ROOT=$(ROOT) python pipelines/run_all.py --config configs/demo.yaml
	@echo 'report: $(abspath $(ROOT))/demo/evaluation/report.html'
	@echo to play with it: BLD_ROOT=$(ROOT) $(BIN)/python pipelines/serve.py --config configs/demo.yaml

test: .venv/ready  ## every module, and one real run of each stage and command; some minutes on two CPU cores
	pytest -m 'not long'

test-long: .venv/ready  ## outages, kills, photographs, long trainings; BLD_REAL_DATA names a folder of real image shards
	pytest -m long

check: .venv/ready  ## format, lint, types
	ruff format --check .
	ruff check .
	basedpyright

ui: .venv/ready  ## the MLflow page of the runs in ROOT, on http://127.0.0.1:5000
	mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///$(abspath $(ROOT))/mlflow.db \
		--default-artifact-root $(abspath $(ROOT))/mlflow-artifacts

clean:  ## delete the environment and caches; runs are kept
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
