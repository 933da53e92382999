# make install | demo | test | test-all | lint | format | clean
#
# Every target works in the virtual environment $(VENV), which is made when there is none. An
# environment of your own is used as it is, and only what it lacks is installed:
#     make test VENV=/path/to/environment
# An environment made here uses $(PYTHON):
#     make install PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.cbbl_d2-installed

# As in setup.py, which says why it is installed without its requirements.
SAHI := sahi>=0.12.8,<0.13

DEMO_CONFIG := configs/SmallShapes/demo.yaml
DEMO_OUTPUT := output/demo
DEMO_WEIGHTS := datasets/mobilenet_v2.pth

# Small models and small images: more threads than this make the CPU slower, not faster.
CORES := $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$((n > 4 ? 4 : n)))
OMP_NUM_THREADS ?= $(CORES)
export OMP_NUM_THREADS

# The tests of a file share what is slow to make. They use one thread each.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(CORES) --dist loadfile

# $(call require_python,PROGRAM): stop with one line if PROGRAM is not a Python this works with.
require_python = $(if $(shell $(1) -c 'import sys; print(sys.version_info >= (3, 10) or "")' \
    2>/dev/null),,$(error $(1) is not a Python >= 3.10: pass one with PYTHON=... (or VENV=...)))

.PHONY: help install demo test test-all lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make install   make $(VENV) with cbbl_d2, its requirements and Detectron2"
	@echo "make demo      train a small detector on synthetic images on the CPU and draw its boxes"
	@echo "make test      run the tests; make test-all runs the slow ones, too"
	@echo "make lint      check style (ruff); make format applies it"
	@echo "make clean     remove caches and build files; the environment and output/ stay"
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV)"

$(PY):
	$(call require_python,$(PYTHON))
	$(if $(shell $(PYTHON) -c 'import venv, ensurepip; print(1)' 2>/dev/null),,\
	    $(error $(PYTHON) cannot make virtual environments: install its venv module \
	    (Debian and Ubuntu: apt install python3-venv)))
	$(PYTHON) -m venv $(VENV)

# The stamp is made last, so an interrupted installation is taken up again by the next make.
$(INSTALLED): setup.py tools/install_detectron2.py tools/detectron2_v0.6.patch | $(PY)
	$(if $(wildcard $(PY)),$(call require_python,$(PY)))
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip --default-pip
	$(PY) -m pip install --disable-pip-version-check -e '.[dev]'
	$(PY) -m pip install --disable-pip-version-check --no-deps '$(SAHI)'
	$(PY) tools/install_detectron2.py
	@touch $@

install: $(INSTALLED)
	@echo "cbbl_d2 and Detectron2 are installed in $(VENV)."

$(DEMO_WEIGHTS): | $(INSTALLED)
	$(PY) tools/download_mobilenet.py --output $@

demo: $(INSTALLED) $(DEMO_WEIGHTS)
	$(PY) train_net.py --config-file $(DEMO_CONFIG)
	$(PY) tools/visualize.py --config-file $(DEMO_CONFIG) \
	    --weights $(DEMO_OUTPUT)/model_final.pth --dataset small_shapes_val --num-images 12 \
	    --output $(DEMO_OUTPUT)/pictures
	@echo "The table of results is above, and in $(DEMO_OUTPUT)/log.txt."
	@echo "The pictures are in $(DEMO_OUTPUT)/pictures."

test: $(INSTALLED)
	$(PYTEST)

test-all: $(INSTALLED)
	$(PYTEST) -m ''

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
