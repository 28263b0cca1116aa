"""Packaging: the folder `sau`, and `configs` as package data inside it (its only home is the repository's top)."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
required = [line for line in (HERE / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
report = ["matplotlib>=3.8", "scikit-image>=0.24", "jinja2>=3.1", "scipy>=1.11"]
docs = ["sphinx>=9", "myst-nb>=1.4", "furo>=2025.9.25", "sphinx-copybutton>=0.5"]

setup(
    name="shared-adversarial-unlearning",  # `sau` on PyPI is a package of others; the import name is `sau`
    version=next(
        line.split('"')[1] for line in (HERE / "sau/__init__.py").read_text().splitlines() if "__version__" in line
    ),
    description="Backdoor attacks and defenses for image classifiers, with Shared Adversarial Unlearning at the heart",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=[*find_packages(include=["sau", "sau.*"]), "sau.configs"],
    package_dir={"sau.configs": "configs"},
    package_data={
        "sau.configs": ["*/*.yaml"],
        "sau.report": ["published.json", "*.html", "page.*", "table.tex"],
    },
    install_requires=required,
    extras_require={
        "report": report,
        "docs": docs,
        "ray": ["ray>=2.40"],
        "models": ["timm>=1.0.31", "transformers>=5.24", "open_clip_torch>=3.3"],  # not in `test`: 20 packages more
        "test": [
            *report,
            *docs,
            "pytest>=8",
            "pytest-xdist>=3.6",
            "pytest-cov>=6",
            "hypothesis>=6.100",
            "beartype>=0.18",
            "ruff>=0.8",
            "mypy>=1.10",
            "types-PyYAML",
            "types-tqdm",
            "build",
            "selenium>=4.20",
            "ipykernel>=6",
            "nbclient>=0.10",
            "nbformat>=5",
        ],
    },
    entry_points={"console_scripts": ["sau=sau.__main__:run"]},
)
