"""Installation: ``pip install -e . -c constraints.txt``, with extras in brackets (``.[tiny]``, ``.[dev]``, ...)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "diffusionopd" / "__init__.py").read_text(encoding="utf-8"))[1]

# Lower bounds are what the code needs, upper bounds the next major version; constraints.txt has what was tested.
REQUIREMENTS = [
    "torch>=2.6,<3",
    "diffusers>=0.42,<1",
    "transformers>=5.23,<6",
    "peft>=0.21,<1",
    "accelerate>=1.15,<2",
    "huggingface_hub>=1.32,<3",
    "ml_collections>=1.0,<2",
    "safetensors>=0.8,<1",
    "sentencepiece>=0.2,<1",  # these two: the T5 tokenizer of SD3 is converted from a SentencePiece file
    "protobuf>=6.31,<8",
    "numpy>=1.26,<3",
    "pillow>=11,<14",
    "pyyaml>=6,<7",  # questions that users write for a judge
    "requests>=2.32,<3",
    "urllib3>=2.8,<3",
    "matplotlib>=3.9,<4",
    "jinja2>=3.1,<4",  # report pages
    "psutil>=6,<8",  # whether a process still lives
    "tqdm>=4.66,<5",
]

OCR = ["rapidocr>=3.10,<4", "onnxruntime>=1.20,<2", "rapidfuzz>=3.9,<4"]
SCIPY = ["scipy>=1.13,<2"]
TENSORBOARD = ["tensorboard>=2.18,<3"]
EXTRAS = {
    "compbench": ["spacy>=3.8,<4", *SCIPY],
    "tiny": OCR + SCIPY,  # the embedded tiny world: its reading scorer uses a real OCR engine
    "ocr": OCR,
    "geneval": SCIPY,
    "hpsv2": ["ftfy>=6.3,<7"],
    # Of its own environment: it pins numpy and PyYAML below constraints.txt (docs/rewards.md).
    "paddle": ["paddleocr>=3.7,<4", "paddlepaddle>=3.3,<4", "rapidfuzz>=3.9,<4"],
    "tensorboard": TENSORBOARD,
    "wandb": ["wandb>=0.19,<1"],
    "swanlab": ["swanlab>=0.6,<1"],
    "mlflow": ["mlflow>=2.20,<4"],
}
EXTRAS["dev"] = [
    *EXTRAS["tiny"],
    *EXTRAS["hpsv2"],
    *TENSORBOARD,
    "hypothesis>=6.120,<7",
    "pytest>=8.3,<10",
    "pytest-xdist>=3.6,<4",
    "ruff>=0.9,<1",
    "mypy>=1.14,<3",
]

setup(
    name="diffusionopd",
    version=VERSION,
    description="On-policy distillation of several task-specialised diffusion teachers into one student",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author="The DiffusionOPD authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["diffusionopd", "diffusionopd.*"]),
    package_data={"diffusionopd": ["py.typed", "training/costs/*.json"]},
    entry_points={"console_scripts": ["diffusionopd = diffusionopd.__main__:main"]},
    python_requires=">=3.11,<3.14",
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
