.PHONY: test lint demo docs
test:
	bash scripts/test.sh
lint:
	ruff check . && ruff format --check . && mypy
demo:
	bash scripts/demo.sh
docs:
	python -m sphinx -W --keep-going -b html docs build/docs
