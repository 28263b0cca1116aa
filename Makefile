.PHONY: test lint demo docs notebooks
test:
	bash scripts/test.sh
lint:
	ruff check . && ruff format --check . && mypy
demo:
	bash scripts/demo.sh
docs:
	python -m sphinx -W --keep-going -b html docs build/docs
notebooks:
	python docs/run_notebooks.py
