# `make demo` and `make test` need Python >= 3.10 and nothing else: each makes .venv, installs, runs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check drills docs clean

demo: .venv/demo-installed
	$(BIN)/glidepath demo

test: .venv/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q --durations=10 -m "not drill" -n 2 --dist loadfile

# What kills, waits or sweeps, in full; CI takes a short sample of it. And property tests on examples of their own.
drills: .venv/test-installed
	$(BIN)/python -m pytest -q -m drill
	$(BIN)/python -m pytest -q -m "hypothesis and not drill" --hypothesis-profile explore -n 2 --dist loadfile

# The site, in build/docs; a warning is an error. Its tools need Python >= 3.11.
docs: .venv/docs-installed
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs build/docs

# torch first: a dependency that is installed before it would bring a build for another accelerator.
.venv/torch-installed: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch numpy setuptools wheel
	touch $@

.venv/demo-installed: .venv/torch-installed setup.py
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[demo]'
	# For CLIP's BPE file alone: the package itself would bring torchvision.
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps open_clip_torch
	touch $@

.venv/test-installed: .venv/demo-installed
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[cluster,demo,dev]'
	$(BIN)/python -c "from cluster.services import install_swift; install_swift(print)"
	touch $@

.venv/docs-installed: .venv/torch-installed setup.py
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[docs]'
	touch $@

clean:
	rm -rf .venv .glidepath build *.egg-info
