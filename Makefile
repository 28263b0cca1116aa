.PHONY: test lint demo
test:
	bash scripts/test.sh
lint:
	ruff check . && ruff format --check . && mypy
demo:
	bash scripts/demo.sh
