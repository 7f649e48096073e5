# Each target first creates .venv and installs what it needs; pip compiles none of the thousands of
# files that are never imported.
PYTHON ?= python3
BIN := .venv/bin
DIGITS := output_dir/digits

.PHONY: demo demo-pipeline demo-sweep digits app test test-slow clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --no-compile -e .
	touch $@

.venv/%: .venv/installed
	$(BIN)/pip install --no-compile -e '.[$*]'
	touch $@

demo: digits
	$(BIN)/python -m demo.digits --ckpt $(DIGITS)/checkpoint-last.pth

# pictures in colour: a tokenizer, a cache, MAR, samples and metrics on one page. They are emoji, or
# those of DATA=FOLDER
demo-pipeline: .venv/pipeline
	$(BIN)/python -m demo.pipeline $(if $(DATA),--data_path '$(DATA)')

demo-sweep: digits
	$(BIN)/python sample.py --ckpt $(DIGITS)/checkpoint-last.pth --labels all --per_class 100 \
	  --seed 0 --batch_size 250 --sweep cfg=1,1.5,2 temperature=0.9,0.95,1 --reference digits \
	  --metrics frechet_distance pixel_distance accuracy --stats_dir $(DIGITS)/fid_stats

# the demo's model: kept if it is there, resumed if its training was stopped
digits: .venv/installed
	$(BIN)/python main_mar.py --preset digits --epochs 45 --output_dir $(DIGITS) --resume $(DIGITS)

# a page of the demo's model, in the browser
app: .venv/app
	$(BIN)/python -m demo.app

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n logical --maxprocesses 4 --dist loadfile

# what takes more than about ten seconds, most of it in several processes
test-slow: .venv/test
	$(BIN)/python -m pytest tests -m slow

clean:
	rm -rf .venv output_dir *.egg-info
