# make install | quickstart | test | quality | docs. Every target works alone on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
HAS_TORCH := -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$(TORCH)')"

.PHONY: install hashes licenses quickstart quickstart-architectures test test-slow test-campaign soak test-page benchmark quality docs format clean

install: $(BIN)/installed

# torch goes first and pinned: an unpinned one, pulled in by another package, may bring gigabytes of CUDA wheels.
# A torch of that version that $(PYTHON) already has is used, whatever its build. All else must have the hashes of
# hashes.txt. uv is used where it is there and works.
$(BIN)/installed: setup.cfg pyproject.toml constraints.txt hashes.txt scripts/repair_torchvision.py
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'hf_seg needs Python 3.11 or newer: make install PYTHON=python3.12')"
	@test -x $(BIN)/python || { \
		if $(PYTHON) $(HAS_TORCH) 2>/dev/null; then inherit=--system-site-packages; fi; \
		$(PYTHON) -m venv $$inherit $(VENV); }
	@$(BIN)/python $(HAS_TORCH) 2>/dev/null || $(BIN)/python -m pip install -q -c constraints.txt torch==$(TORCH)
	@{ command -v uv >/dev/null && ! grep -q "system-site-packages = true" $(VENV)/pyvenv.cfg \
		&& VIRTUAL_ENV=$(abspath $(VENV)) uv pip install -q --no-deps --require-hashes -r hashes.txt; } \
		|| $(BIN)/python -m pip install -q --no-deps --require-hashes -r hashes.txt
	@$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@$(BIN)/python scripts/repair_torchvision.py
	@NO_ALBUMENTATIONS_UPDATE=1 $(BIN)/python -c "import torch, transformers, accelerate, datasets, timm, evaluate, huggingface_hub, albumentations; \
		print('ready: torch', torch.__version__, 'and seven more; now: source $(BIN)/activate')"
	@touch $@

# The hashes of every file of the releases in constraints.txt, for all platforms; needs uv and the network. torch and
# what only its CUDA builds need are left out, since which build is right depends on the machine.
EXTRAS := train test dev pretrained lora export docs
CUDA := torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
	nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
	nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx
hashes:
	uv pip compile -q setup.cfg $(EXTRAS:%=--extra %) -c constraints.txt --universal --python-version 3.11.5 \
		--generate-hashes --no-annotate --no-header $(CUDA:%=--no-emit-package %) -o hashes.txt

# The table of docs/dependencies.md; needs uv and the network.
licenses: install
	sed -i '/^| Name/,$$d' docs/dependencies.md
	uvx -q pip-licenses --python $(BIN)/python --from=mixed --with-system --format=markdown --ignore-packages hf-seg \
		| sed 's/  */ /g; s/-\{4,\}/---/g' >> docs/dependencies.md

# Every stage on a synthetic dataset, with small pretrained networks. Run again, it resumes where it stopped. Another
# dataset: make quickstart SEED=1 QUICKSTART=runs/quickstart1
QUICKSTART ?= runs/quickstart
SEED ?= 0
THREADS ?= 2
DATA := $(QUICKSTART)/data
SAR := $(DATA)/dfc25_track1
HF_SEG := $(BIN)/hf-seg
TOY := recipes/configs/toy
# seeds of the SAR networks; their encoders are lite0, lite1, lite0
MEMBERS := 0 1 2
STAGE1 = $(HF_SEG) stage1 --config $(TOY)/stage1_efficientnet_lite.yaml --cache_gib 0.5 \
	--source_dir $(DATA)/OpenEarthMap_wo_xBD --data_dir $(SAR) --resume_from_checkpoint latest
LABEL = $(HF_SEG) pseudo-label --stride 1 --tta flips --batch_size 16 --data_dir $(SAR)
quickstart: export OMP_NUM_THREADS = $(THREADS)
quickstart: $(DATA) pretrained/efficientnet_lite0 pretrained/efficientnet_lite1
	@$(STAGE1) --method source_only --output_dir $(QUICKSTART)/source_only
	@$(STAGE1) --model_name_or_path $(QUICKSTART)/source_only/student --head_width null --learning_rate 1e-3 \
		--max_train_steps 200 --eval_steps 40 --checkpointing_steps 40 --output_dir $(QUICKSTART)/stage1
	@$(LABEL) --model $(QUICKSTART)/source_only --output_dir $(QUICKSTART)/labels_source_only
	@$(LABEL) --model $(QUICKSTART)/stage1 --output_dir $(QUICKSTART)/labels
	@$(HF_SEG) audit $(QUICKSTART)/labels_source_only $(QUICKSTART)/labels \
		--name_a "labels of the source-only network" --name_b "our pseudo-labels" \
		--truth $(DATA)/dfc25_track1_extra/train_clean_labels --output $(QUICKSTART)/audit
	@for member in $(MEMBERS); do $(HF_SEG) stage2 --config $(TOY)/stage2_efficientnet_lite.yaml --seed $$member \
			--model_name_or_path pretrained/efficientnet_lite$$((member % 2)) --data_dir $(SAR) \
			--pseudo_labels $(QUICKSTART)/labels --output_dir $(QUICKSTART)/sar$$member \
			--resume_from_checkpoint latest || exit 1; done
	@$(HF_SEG) ensemble --model $(MEMBERS:%=$(QUICKSTART)/sar%) --data_dir $(SAR) --split test \
		--stride 1 --batch_size 16 --output_dir $(QUICKSTART)/ensemble
	@$(HF_SEG) predict $(DATA)/scene.tif $(QUICKSTART)/map.tif --model $(QUICKSTART)/ensemble --preview --stride 0.75 \
		--batch_size 16 --overwrite > $(QUICKSTART)/map.txt
	@$(BIN)/python scripts/summarize_quickstart.py $(QUICKSTART)

# The same SAR stage with toys of the paper's three architectures, from random weights.
STOCK := segformer upernet_convnextv2 upernet_swinv2
quickstart-architectures: export OMP_NUM_THREADS = $(THREADS)
quickstart-architectures: quickstart
	@for member in $(STOCK); do $(HF_SEG) stage2 --config $(TOY)/stage2_$$member.yaml \
		--data_dir $(SAR) --pseudo_labels $(QUICKSTART)/labels --output_dir $(QUICKSTART)/$$member \
		--resume_from_checkpoint latest || exit 1; done
	@$(HF_SEG) ensemble --model $(STOCK:%=$(QUICKSTART)/%) --data_dir $(SAR) --split test --stride 1 \
		--output_dir $(QUICKSTART)/ensemble_architectures

pretrained/efficientnet_lite%: | install
	@$(BIN)/python scripts/convert_pretrained.py --model tf_efficientnet_lite$* --output $@ > /dev/null

$(DATA): | install
	@$(HF_SEG) synth --output $@ --seed $(SEED) --source 70 --train 160 --val 20 --test 100 --size 256 \
		--scene 2048

test: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow --ignore tests/campaign

# Faults and bad inputs, at most an hour; writes docs/reliability.md
test-campaign: install
	rm -rf runs/campaign
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow -n 2 tests/campaign
	$(BIN)/python tests/campaign/write_reliability.py

# Two hours of both stages: memory, open files, threads and disk must stay flat
soak: install
	$(BIN)/python tests/campaign/soak.py --minutes 120 --output runs/soak

# The page in a real browser (chromium on PATH). In an environment on top of the first, since Gradio holds pillow below 13.
PAGE := $(VENV)/page
test-page: $(PAGE)/installed
	HF_HUB_OFFLINE=1 $(PAGE)/bin/python -m pytest tests/test_demo.py tests/test_demo_browser.py

$(PAGE)/installed: space/constraints.txt | install
	@$(BIN)/python -m venv $$(grep -q "system-site-packages = true" $(VENV)/pyvenv.cfg && echo --system-site-packages) $(PAGE)
	@$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> $$(echo $(PAGE)/lib/python*/site-packages)/base.pth
	@$(PAGE)/bin/python -m pip install -q -c space/constraints.txt gradio playwright
	@touch $@

# Ours against other libraries, again in an environment on top of the first. Some only: make benchmark NAMES="metric lovasz"
PEERS := $(VENV)/benchmark
benchmark: $(PEERS)/installed
	$(PEERS)/bin/python scripts/benchmark.py $(NAMES)

$(PEERS)/installed: setup.cfg constraints.txt | install
	@$(BIN)/python -m venv $$(grep -q "system-site-packages = true" $(VENV)/pyvenv.cfg && echo --system-site-packages) $(PEERS)
	@$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> $$(echo $(PEERS)/lib/python*/site-packages)/base.pth
	@$(PEERS)/bin/python -m pip install -q -c constraints.txt -e '.[benchmark]'
	@touch $@

quality: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# site/index.html opens from disk
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) site *.egg-info .mypy_cache .pytest_cache .ruff_cache
