"""Packages of the wheel; everything else is in pyproject.toml, which cannot add a package from another folder."""

from setuptools import find_packages, setup

setup(
    # The experiment cards travel as querydet_jax/configs; configs/ stays the place where they are edited.
    packages=[*find_packages(include=["querydet_jax*"]), "querydet_jax.configs"],
    package_dir={"querydet_jax.configs": "configs"},
)
