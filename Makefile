# make                  set up .venv, convert and evaluate the bundled Keras model; only pip needs the network
# make MODEL=model.h5   the same for another Keras file; writes model.pt beside it
#   ARGS="--std 255"    options of convert.py, here for a model trained on pixels / 255
# make setup-tests      also install what the tests, and .tflite, .onnx and .safetensors files, need
# make test             run the test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: all setup setup-tests test lint train bench recipes clean

CHECKPOINT := $(if $(MODEL),$(basename $(MODEL)).pt)
all: setup
	$(BIN)/python convert.py $(if $(MODEL),"$(MODEL)" -o "$(CHECKPOINT)") $(ARGS)
	$(BIN)/python evaluate.py $(if $(MODEL),"$(CHECKPOINT)")

setup: $(VENV)/.installed
setup-tests: $(VENV)/.installed-tests

$(VENV)/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -r requirements.txt
	touch $@

$(VENV)/.installed-tests: $(VENV)/.installed tests/requirements.txt
	$(BIN)/pip install -r tests/requirements.txt
	touch $@

test: $(VENV)/.installed-tests
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Train a teacher, without the last 5,000 images, then the model; resume what was stopped. About 12 hours on
# 2 cores. DATA_DIR (data/) contains cifar-10-batches-bin/; `make train ARGS=--download` downloads it.
TEACHER = checkpoints/teacher.training/teacher.h5
TRAIN = $(BIN)/python -m models.keras.train $(if $(DATA_DIR),--data-dir $(DATA_DIR))
train: $(VENV)/.installed
	$(TRAIN) --width 48 --epochs 32 --holdout 5000 --output $(TEACHER) $(ARGS)
	$(TRAIN) --teacher $(TEACHER) $(ARGS)

bench: $(VENV)/.installed
	$(BIN)/pip install -r tests/benchmarks/requirements.txt
	$(BIN)/python -m tests.benchmarks.run $(ARGS)

# run every recipe of RECIPES.md on the full test set in DATA_DIR; ExecuTorch is a download of 300 MB
recipes: $(VENV)/.installed-tests
	$(BIN)/pip install executorch
	$(BIN)/python -m tests.recipes --data-dir $(or $(DATA_DIR),data) $(ARGS)

clean:
	rm -rf $(VENV) results .pytest_cache .ruff_cache
	rm -f $(addprefix checkpoints/resnet8,.pt .json _keras.keras.npz _keras.keras-*.npz)  # written by `make`
	find . -name __pycache__ -prune -exec rm -rf {} +
