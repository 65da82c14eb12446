"""What pyproject.toml cannot say: the packages that are found, and conf/ beside them as llmscale.conf."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["llmscale*"]), "llmscale.conf"], package_dir={"llmscale.conf": "conf"})
