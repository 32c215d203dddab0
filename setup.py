"""Package metadata. Everything beyond the small core is an extra and is imported only where it is used."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "plots": ["matplotlib>=3.8"],
    "yaml": ["pyyaml>=6"],
    "hf": ["tokenizers>=0.20", "huggingface_hub>=0.26"],
    "parquet": ["pyarrow>=15"],
    "serve": ["starlette>=0.40", "uvicorn>=0.30"],
    "openai": ["openai>=1.98"],
    "transformers": ["transformers>=4.57"],
    "4bit": ["bitsandbytes>=0.46"],
    "lm-eval": ["lm-eval>=0.4.10"],
    # peers that the tests compare with, and the tools that check the code
    "dev": [
        "hypothesis>=6.100", "mypy>=1.10", "pexpect>=4.9", "pytest>=8", "pytest-xdist>=3.6", "ruff>=0.6", "scipy>=1.11",
        "peft>=0.15", "transformers>=4.57", "trl>=0.20", "x-transformers>=2.3",
        "fastapi>=0.115", "uvicorn>=0.30",  # what `transformers serve` runs on
    ],
}
EXTRAS["dev"] += [package for extra in ("hf", "parquet", "serve", "openai", "yaml", "lm-eval") for package in EXTRAS[extra]]

setup(
    name="xalign",
    version="0.1.0",
    description="A small decoder transformer and everything that aligns it with preferences",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["xalign", "xalign.*"]),
    package_data={"xalign": ["py.typed"]},
    install_requires=[
        "torch>=2.9", "einops>=0.8", "numpy>=1.26", "sentencepiece>=0.2", "wandb>=0.17",
        "safetensors>=0.4.3", "jinja2>=3.1", "tyro>=0.9", "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["xalign = xalign.cli:main"]},
)
