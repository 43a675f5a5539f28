"""Finds experiments by name: built-in ones, those in the working folder, and the user's."""

import importlib
import importlib.util
import pkgutil
from pathlib import Path
from types import ModuleType

from merge_jax.checks import check_choice

__all__ = ["experiment_names", "find_experiment", "find_grid", "load_experiment"]

# In the repository, the modules of its folder; elsewhere the same modules from the package.
_PACKAGES = ("experiments", "merge_jax.experiments")


def experiment_names() -> dict[str, str]:
    """Returns the modules of all available experiments, by name."""
    found: dict[str, str] = {}
    for package in _PACKAGES:
        for module in pkgutil.iter_modules(_folders(package)):
            found.setdefault(module.name, f"{package}.{module.name}")
    return found


def _folders(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    return [] if spec is None else list(spec.submodule_search_locations or [])


def find_experiment(name: str) -> str:
    """Returns the module of an experiment: a built-in one by name, any other by module name.

    That is `package.module`, or `module` for a file in the working folder.

    Raises:
      ValueError: there is no such module; near misses are named.
    """
    names = experiment_names()
    if name in names:
        return names[name]
    if name.isidentifier() and Path(f"{name}.py").is_file():
        return name
    try:
        if "." in name and importlib.util.find_spec(name) is not None:
            return name
    except ImportError:  # For a missing package, or a relative name.
        pass
    if name.endswith(".py"):
        raise ValueError(f"an experiment is named by its module: {name.removesuffix('.py')!r}, not {name!r}")
    check_choice("experiment", name, names)
    raise AssertionError(name)  # Other choices have raised.


def load_experiment(name: str) -> ModuleType:
    """Returns the module of an experiment that a study can run.

    Raises:
      ValueError: there is no such module, or it lacks one of `Config`, `PRESETS` and `build`.
    """
    module = importlib.import_module(find_experiment(name))
    missing = [part for part in ("PRESETS", "build", "Config") if not hasattr(module, part)]
    if missing:
        raise ValueError(f"{module.__name__} is not an experiment: it has no {' and no '.join(missing)}")
    return module


def find_grid(name: str) -> Path:
    """Returns the file of a grid: a built-in one by name, any other by path.

    Raises:
      ValueError: there is no such file; near misses are named.
    """
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise ValueError(f"there is no grid {name}")
        return Path(name)
    files: dict[str, Path] = {}
    for folder in (folder for package in _PACKAGES for folder in _folders(package)):
        for path in sorted(Path(folder, "grids").glob("*.toml")):
            files.setdefault(path.stem, path)
    check_choice("grid", name, files)
    return files[name]
