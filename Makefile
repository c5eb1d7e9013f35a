# make train | test | ...  Every setting of train_gpt.py can be given: make train SEED=7 QAT_ENABLED=0
# (an argument, which must be known), or SEED=7 make train (in the environment).
PYTHON ?= python3
GPUS   := $(shell nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU')
CORES  := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

help:
	@echo "make train    train, average, quantise, compress, read back, score. FineWeb if it is here, else a demo on text"
	@echo "              that is on every machine; all GPUs, else the CPU with a small model (about 3 minutes on 2 cores;"
	@echo "              SIZE=reference: the reference architecture, as small)"
	@echo "make sample   text from the artifact of the last run: RUN=folder names another, PROMPT='Once upon' begins otherwise"
	@echo "make test     the test suite, on the CPU"
	@echo "make bench    time every stage beside its floor and its simple twin: logs/bench/NAME.json (NAME=mine; settings as for train)"
	@echo "make gpu      on a GPU: its tests, the bench, and with SEED194=script RECORD1855=script those beside ours (README)"
	@echo "make knobs    every setting, with default and meaning;  make train NAME=value sets one"
	@echo "make studies-small   run every study of docs/studies.md at the small size, about 90 minutes on 2 cores, and renew the pages"
	@echo "make studies-frontier   those of docs/frontier.md, about 3 hours on 2 cores"
	@echo "make pages    regenerate the tables of README.md and docs/, and the picture, from the code and the logs"
	@echo "make lock     renew requirements.lock and requirements-cuda.lock from requirements.txt;  make audit: their known holes"

# Without a GPU: a model for 2 CPU cores, the demo's or (SIZE=reference) the reference architecture scaled down. Defaults:
# anything that you set yourself wins, and so does a file that holds its own settings (CHECKPOINT, EVAL_ONLY, RESUME).
ifeq ($(GPUS),0)
# Ranks x threads: your RANKS and OMP_NUM_THREADS, else what bench.py ranks measures once, else two of one
MEASURE := $(if $(filter command,$(origin RANKS))$(OMP_NUM_THREADS),,yes)
RANKS := $(if $(filter 1,$(CORES)),1,2)
SIZE = demo
SMALL := NUM_HEADS?=4 NUM_KV_HEADS?=2 TRAIN_SEQ_LEN?=256 TRAIN_BATCH_TOKENS?=1024 KEEP_FLOAT_MAX_NUMEL?=4096 \
  MUON_MOMENTUM?=0.95 MUON_MOMENTUM_WARMUP_STEPS?=100 WARMDOWN_FRAC?=0.5 QAT_ENABLED?=1 EMA_ENABLED?=1 EMA_DECAY?=0.97
SIZE_reference := $(SMALL) NUM_LAYERS?=11 MODEL_DIM?=96
# What two cores learn most with in 90 s: docs/frontier.md
SIZE_demo := $(SMALL) NUM_LAYERS?=2 MODEL_DIM?=160 NEGATIVE_SLOPE?=0.5 XSA_LAST_N?=2 ROPE_DIMS?=16 BIGRAM_VOCAB_SIZE?=2048 \
  BIGRAM_DIM?=48 MUON_ROW_NORMALIZE?=1 LOADER?=shuffled
DEFAULTS := $(or $(SIZE_$(SIZE)),$(error SIZE=$(SIZE): choose demo or reference)) \
  MAX_WALLCLOCK_SECONDS?=90 WARMUP_STEPS?=3 TRAIN_LOG_EVERY?=50 VAL_LOSS_EVERY?=100 VAL_MAX_TOKENS?=32768 EVAL_BATCH_SEQS?=8
# What torchrun sets too, but with a warning of five lines
export OMP_NUM_THREADS ?= 1
else
RANKS := gpu
DEMO_BUDGET := MAX_WALLCLOCK_SECONDS?=90 WARMDOWN_FRAC?=0.5
endif

# Without FineWeb, and unless you name other data: the demo text.
FINEWEB := data/datasets/fineweb10B_sp1024
ifeq ($(DATA_PATH)$(wildcard $(FINEWEB)/fineweb_train_*.bin),)
DEMO_DATA := data/demo/manifest.json
DEFAULTS += DATA_PATH?=data/demo TOKENIZER_PATH?=data/demo/tokenizer.model $(DEMO_BUDGET)
endif

# What stands on make's command line and is neither this file's nor another program's is a setting. Its value goes through the
# environment, where make puts it, so that spaces and quotes survive.
override NO_SETTINGS := PYTHON% GPUS CORES RANKS SIZE NAME FORCE RUN PROMPT WORKERS GOLF_% SEED194 RECORD1855 PEERS PATH HOME TMPDIR SHELL \
  LANG LC_% LD_% XDG_% PIP_% OMP_% GOMP_% MKL_% KMP_% CUDA_% CUBLAS_% NVIDIA_% NCCL_% GLOO_% UCX_% FI_% TORCH% PYTORCH_% \
  TRITON_% HF_% WANDB_% AWS_% SLURM_% %_proxy %_PROXY
override GIVEN := $(strip $(foreach name,$(filter-out $(NO_SETTINGS),$(.VARIABLES)),\
  $(if $(filter command,$(origin $(name))),$(name))))
ifneq ($(findstring -,$(GIVEN))$(findstring .,$(GIVEN)),)
$(error $(GIVEN): no such settings; make knobs lists all)
endif
ifeq ($(filter train bench gpu,$(MAKECMDGOALS)),)
$(if $(GIVEN),$(error $(GIVEN): settings are for make train, bench and gpu; leave them out))
endif
# For a recipe: "$$@" are the settings, with the tokenizer that lies beside your own data
override SETTINGS = set -- $(foreach name,$(GIVEN),"$(name)=$$$(name)") $(patsubst %,'%',$(sort $(DEFAULTS))); \
  if [ -n "$$DATA_PATH" ] && [ -f "$$DATA_PATH/tokenizer.model" ]; then \
    set -- "$$@" "TOKENIZER_PATH?=$$DATA_PATH/tokenizer.model"; fi;

# How `train` and `sample` begin a text. It is make's own: other programs' variable of that name says nothing here.
PROMPT = The
train sample: export PROMPT := $(PROMPT)
# A run that comes to its end has a page, and a sentence if it made an artifact, whatever its exit code says. Its folder has
# your name, or the time of day and a number of the process (RESUME=1 goes on with a name of yours).
train: .venv/installed $(DEMO_DATA)
	@$(SETTINGS) run=$$RUN_ID; ranks=$(RANKS); \
	  if [ -n "$(MEASURE)" ]; then found=$$(GOMP_SPINCOUNT=1000 .venv/bin/python bench.py ranks "$$@") || found=; fi; \
	  case $$found in [1-9]*\ [1-9]*) ranks=$${found% *}; OMP_NUM_THREADS=$${found#* };; esac; \
	  echo "torchrun --nproc_per_node=$$ranks train_gpt.py $$*"; \
	  case $$RESUME in 1|True) ;; *) if [ -z "$$run" ]; then run=$$(date +%Y%m%d-%H%M%S)-$$$$ && set -- "$$@" "RUN_ID?=$$run"; fi;; esac; \
	  code=0; .venv/bin/torchrun --standalone --nproc_per_node=$$ranks train_gpt.py "$$@" || code=$$?; \
	  folder=$${LOGS_DIR:-logs}/$$run; \
	  if [ -z "$$run" ] || [ ! -f "$$folder/result.json" ]; then exit $$code; fi; \
	  if [ -f "$$folder/artifact.bin" ]; then echo "its model writes (make sample PROMPT='...': more):"; \
	    .venv/bin/python sample.py "$$folder" "$$PROMPT" --tokens 40 || :; fi; \
	  .venv/bin/python ablate.py report "$$folder" || :; exit $$code

# Text from the newest artifact, or that of RUN=folder
sample: .venv/installed
	@run=$$RUN; [ -n "$$run" ] || run=$$(ls -t "$${LOGS_DIR:-logs}"/*/artifact.bin 2>/dev/null | head -n 1); \
	  [ -n "$$run" ] || { echo "make sample: no artifact in $${LOGS_DIR:-logs}: make train makes one, RUN=folder names one" >&2; exit 2; }; \
	  .venv/bin/python sample.py "$$run" "$$PROMPT"

# Files are dealt out in the order of conftest.py, the longest first. One worker more than cores: some tests only wait.
WORKERS = $(shell expr $(CORES) + 1)
test: .venv/installed
	env -i PATH="$$PATH" HOME="$$HOME" $(if $(GOLF_DATA),GOLF_DATA="$(GOLF_DATA)") .venv/bin/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests

# The variable that train_gpt.py sets itself, where it is the script
BENCH = $(SETTINGS) GOMP_SPINCOUNT=$${GOMP_SPINCOUNT:-1000} .venv/bin/torchrun --standalone --nproc_per_node=$(RANKS) \
  bench.py run $(if $(NAME),--name $(NAME)) $(if $(FORCE),--force) "$$@"
bench: .venv/installed $(DEMO_DATA)
	$(BENCH)

# A step that fails does not keep the next from running. PEERS: options of bench.py peers, such as --seconds 80
gpu: .venv/installed $(DEMO_DATA)
	@failed=0; GOLF_GPU=1 .venv/bin/python -m pytest -q tests/test_gpu.py || failed=1; { $(BENCH); } || failed=1; \
	  $(if $(SEED194)$(RECORD1855),.venv/bin/python bench.py peers --gpus $(GPUS) --data $(or $(DATA_PATH),$(FINEWEB)) \
	    --tokenizer $(or $(TOKENIZER_PATH),data/tokenizers/fineweb_1024_bpe.model) $(if $(SEED194),--script 194=$(SEED194)) \
	    $(if $(RECORD1855),--script 1855=$(RECORD1855) $$(.venv/bin/python -c 'import flash_attn_interface' 2>/dev/null || \
	      echo --path 1855:tests/fa3_stand_in)) $(PEERS) || failed=1;) exit $$failed

knobs: .venv/installed
	@.venv/bin/python train_gpt.py --help

# Equal steps for every study, equal time for those of the pull requests. A failed trial (1) stays in its table, an
# interruption (130) ends it; the same command goes on. Where data/text is (docs/studies.md), its size of #199 runs too.
RUN_STUDY = .venv/bin/python ablate.py run studies/$$study.toml
studies-small: .venv/installed data/demo/manifest.json
	@for study in $(filter-out bases frontier_%,$(basename $(notdir $(wildcard studies/*.toml)))); do $(RUN_STUDY) || [ $$? = 1 ] || exit; done
	@for study in $(basename $(notdir $(wildcard studies/pr*.toml))); do $(RUN_STUDY) --equal time --seeds 1,2,3 || [ $$? = 1 ] || exit; done
	@for size in docs $(if $(wildcard data/text/manifest.json),fineweb); do study=pr199_swa_doc_isolated; \
	  $(RUN_STUDY) --size $$size || [ $$? = 1 ] || exit; done
	.venv/bin/python tests/pages.py logs/runs

studies-frontier: .venv/installed data/demo/manifest.json
	@study=frontier_training; for way in "small --equal steps" "small --equal time" "demo"; do \
	  $(RUN_STUDY) --size $$way || [ $$? = 1 ] || exit; done; \
	  if [ -e data/text/manifest.json ]; then $(RUN_STUDY) --size text || [ $$? = 1 ] || exit; fi
	@study=frontier_export; for size in small large; do $(RUN_STUDY) --size $$size || [ $$? = 1 ] || exit; done
	.venv/bin/python tests/pages.py logs/runs

pages: .venv/installed
	.venv/bin/python tests/pages.py

# Packages by hash; torch's CUDA build too. Its CPU builds are published in several places, so there the version decides.
PIP_INSTALL = .venv/bin/pip install --quiet --disable-pip-version-check
.venv/installed: requirements.txt requirements.lock requirements-cuda.lock
	$(PYTHON) -m venv .venv
ifeq ($(GPUS),0)
	$(PIP_INSTALL) --require-hashes -r requirements.lock
	$(PIP_INSTALL) $$(grep '^torch==' requirements.txt)
else
	$(PIP_INSTALL) --require-hashes -r requirements.lock -r requirements-cuda.lock
endif
	@touch $@

# Tools run from a virtual environment of their own, which is deleted afterwards.
WITH_TOOL = tools=$$(mktemp -d) && trap 'rm -rf $$tools' EXIT && $(PYTHON) -m venv $$tools && $$tools/bin/pip install --quiet

# One resolution for Linux, macOS and Python 3.10 up, cut in two; a pin that still fits stays. To renew one: delete its entry.
lock:
	$(WITH_TOOL) uv==0.13.9 && cat requirements.lock requirements-cuda.lock >$$tools/lock && \
	  $$tools/bin/uv --no-config pip compile --quiet --universal --python-version 3.10.2 --no-python-downloads --generate-hashes \
	    --custom-compile-command 'make lock' --output-file $$tools/lock requirements.txt && \
	  awk '/^#/ { print >"requirements.lock"; print >"requirements-cuda.lock"; next } \
	    /^[a-z]/ { file = "requirements" (/^(torch|triton|nvidia|cuda)/ ? "-cuda" : "") ".lock" } { print >file }' $$tools/lock

audit:
	$(WITH_TOOL) pip-audit==2.10.1 && $$tools/bin/pip-audit --strict --require-hashes --disable-pip \
	  -r requirements.lock -r requirements-cuda.lock

data/demo/manifest.json: | .venv/installed
	.venv/bin/python prepare_data.py demo --out data/demo

.PHONY: help train sample test bench gpu knobs pages studies-small studies-frontier lock audit
