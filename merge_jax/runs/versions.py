"""Versions of installed packages. It needs no JAX."""

import importlib.metadata
from collections.abc import Iterable

__all__ = ["installed_versions"]


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the version of each package by name, or `not installed`."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
