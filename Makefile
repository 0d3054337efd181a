# make install | quickstart | test | quality. Every target works alone on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
HAS_TORCH := -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$(TORCH)')"

.PHONY: install quickstart test test-slow quality format clean

install: $(BIN)/installed

# torch goes first and pinned: an unpinned one, pulled in by another package, may bring gigabytes of CUDA wheels.
# A torch of that version that $(PYTHON) already has is used, whatever its build. uv is used where it is there and works.
$(BIN)/installed: setup.cfg pyproject.toml constraints.txt scripts/repair_torchvision.py
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'hf_seg needs Python 3.11 or newer: make install PYTHON=python3.12')"
	@test -x $(BIN)/python || { \
		if $(PYTHON) $(HAS_TORCH) 2>/dev/null; then inherit=--system-site-packages; fi; \
		$(PYTHON) -m venv $$inherit $(VENV); }
	@$(BIN)/python $(HAS_TORCH) 2>/dev/null || $(BIN)/python -m pip install -q -c constraints.txt torch==$(TORCH)
	@{ command -v uv >/dev/null && ! grep -q "system-site-packages = true" $(VENV)/pyvenv.cfg \
		&& VIRTUAL_ENV=$(abspath $(VENV)) uv pip install -q -c constraints.txt -e '.[test,dev,pretrained]'; } \
		|| $(BIN)/python -m pip install -q -c constraints.txt -e '.[test,dev,pretrained]'
	@$(BIN)/python scripts/repair_torchvision.py
	@NO_ALBUMENTATIONS_UPDATE=1 $(BIN)/python -c "import torch, transformers, accelerate, datasets, timm, evaluate, huggingface_hub, albumentations; \
		print('ready: torch', torch.__version__, 'and seven more; now: source $(BIN)/activate')"
	@touch $@

# Every stage on a synthetic dataset with toy networks. Run again, it resumes where it stopped.
QUICKSTART := runs/quickstart
DATA := $(QUICKSTART)/data
LAUNCH := $(BIN)/accelerate launch -q --config_file recipes/accelerate_configs/one_process.yaml
TOY := recipes/configs/toy
quickstart: $(DATA)
	$(LAUNCH) recipes/stage1.py --config $(TOY)/stage1_segformer.yaml --crop_size 64 --max_train_steps 500 --eval_steps 500 \
		--source_dir $(DATA)/OpenEarthMap_wo_xBD --data_dir $(DATA)/dfc25_track1 \
		--output_dir $(QUICKSTART)/stage1 --resume_from_checkpoint latest
	$(LAUNCH) recipes/pseudo_label.py --model $(QUICKSTART)/stage1 --tta flips \
		--data_dir $(DATA)/dfc25_track1 --output_dir $(QUICKSTART)/labels
	$(BIN)/python scripts/audit_labels.py $(DATA)/dfc25_track1/train/labels $(QUICKSTART)/labels \
		--truth $(DATA)/dfc25_track1_extra/train_clean_labels --output $(QUICKSTART)/audit
	for member in segformer:300 upernet_convnextv2:150 upernet_swinv2:100; do \
		$(LAUNCH) recipes/stage2.py --config $(TOY)/stage2_$${member%:*}.yaml --max_train_steps $${member#*:} \
			--eval_steps $${member#*:} --learning_rate 2e-3 --data_dir $(DATA)/dfc25_track1 --pseudo_labels $(QUICKSTART)/labels \
			--output_dir $(QUICKSTART)/$${member%:*} --resume_from_checkpoint latest || exit 1; done
	$(LAUNCH) recipes/ensemble.py --data_dir $(DATA)/dfc25_track1 --split test --output_dir $(QUICKSTART)/ensemble \
		--model $(QUICKSTART)/segformer $(QUICKSTART)/upernet_convnextv2 $(QUICKSTART)/upernet_swinv2
	$(BIN)/hf-seg-predict $(DATA)/scene.tif $(QUICKSTART)/map.tif --model $(QUICKSTART)/ensemble --preview --overwrite

$(DATA): | install
	$(BIN)/python scripts/make_synthetic_dataset.py --output $@ --seed 0 --source 48 --train 48 --val 8 --test 8 --size 256 \
		--scene 2048

test: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

quality: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) *.egg-info .mypy_cache .pytest_cache .ruff_cache
