# `make demo` and `make test` need Python >= 3.10 and make; they install the rest into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo docs test test-slow test-faults test-oldest soak lint clean

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: .venv/installed
	bash recipes/shapes.sh

# Numbers, code and pictures of docs/retinanet*.md; the last picture needs a trained detector.
docs: .venv/installed
	test -f runs/docs/best.pth || $(BIN)/python train.py --dataset shapes \
		--model retinanet_resnet18_fpn --min-size 128 --max-size 128 --batch-size 4 --workers 0 \
		--opt adamw --lr 5e-4 --wd 0.05 --clip-grad-norm 1 --amp bf16 --epochs 5 --lr-steps 4 \
		--warmup-steps 60 --eval-every 5 --keep-checkpoints 1 --box-subnet dense \
		--output-dir runs/docs --resume auto
	$(BIN)/python -m docs.explain

test: .venv/installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal \
		-m "not slow and (not faults or smoke)"

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

test-faults: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m faults \
		tests/test_faults.py tests/test_two_nodes.py

# Once per release: the oldest PyTorch that pyproject.toml allows, in a .venv-oldest of its own.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' \
		torch==2.10.0 torchvision==0.25.0
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n auto --dist worksteal \
		-m "not slow and not faults"

# Half an hour and more; CYCLES and SEED may be given.
soak: .venv/installed
	PYTHONPATH=. $(BIN)/python tests/soak.py --cycles $(or $(CYCLES),200) --seed $(or $(SEED),0)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-oldest runs build *.egg-info
