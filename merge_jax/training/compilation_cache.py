"""JAX's cache of compiled programs, in a bounded user folder, so that a second run need not compile."""

import functools
import os
import sys
from pathlib import Path
from typing import Literal

import filelock
import platformdirs

__all__ = ["MAX_BYTES", "CacheChoice", "bytes_in", "default_folder", "folder_in_use", "programs_read", "use_cache"]

CacheChoice = Literal["default", "none"] | Path
"""Which cache: the environment's or the user's own, none, or that in a folder."""

MAX_BYTES = 2**29
"""What the cache may grow to; what was not used for the longest time goes first."""

# To write one program, JAX reads all time stamps: 0.05 ms each. Many small programs would cost more than they save.
_MIN_SECONDS = 0.1
_ENTRY, _STAMP = "-cache", "-atime"  # JAX's suffixes for a cached program and for its last use.


def default_folder() -> Path:
    """Returns the folder of compiled programs in the user's cache folder (`XDG_CACHE_HOME` on Linux)."""
    return platformdirs.user_cache_path("merge_jax", appauthor=False) / "compiled"


def use_cache(choice: CacheChoice) -> None:
    """Enables JAX's compilation cache; call it before anything is compiled.

    By default, uses the folder set by the environment (`JAX_COMPILATION_CACHE_DIR`) or the program, and leaves its size
    to JAX. If none is set, uses `default_folder()`; if that is not writable, prints a warning to standard error and
    caches nothing. Other environment settings of JAX's cache are kept (`JAX_ENABLE_COMPILATION_CACHE`,
    `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`, `JAX_COMPILATION_CACHE_MAX_SIZE`).

    Raises:
      ValueError: the named folder is not writable.
    """
    import jax

    if choice == "none":
        return _set_folder(None)
    configured = getattr(jax.config, "jax_compilation_cache_dir", None)
    if choice == "default" and not getattr(jax.config, "jax_enable_compilation_cache", True):
        return None
    if choice != "default" or not configured:
        folder = default_folder() if isinstance(choice, str) else choice
        try:
            _make_usable(folder)
        except (OSError, NotImplementedError) as error:
            problem = f"the compilation cache {folder} cannot be written: {error}"
            if choice != "default":
                raise ValueError(f"{problem}; give another --compilation-cache, or none") from None
            print(f"warning: {problem}; nothing compiled is kept", file=sys.stderr)
            return None
        _set_folder(folder)
        if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
            jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    programs_read()
    return None


def folder_in_use() -> str:
    """Returns the folder that `use_cache("default")` uses."""
    return os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(default_folder())


def bytes_in(folder: str) -> int:
    """Returns the total size of a folder's files; 0 if it does not exist."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def programs_read() -> int:
    """Returns how many programs JAX has read from its cache since this, or `use_cache`, was first called."""
    return len(_reads())


@functools.cache
def _reads() -> list[str]:
    import jax.monitoring

    reads: list[str] = []

    def count(event: str, **unused: object) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            reads.append(event)

    jax.monitoring.register_event_listener(count)
    return reads


def _set_folder(folder: Path | None) -> None:
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    jax.config.update("jax_enable_compilation_cache", folder is not None)
    jax.config.update("jax_compilation_cache_dir", None if folder is None else str(folder))
    reset_cache()  # Earlier compilations have fixed the cache to the former folder.


def _make_usable(folder: Path) -> None:
    """Prepares a folder for writing and locking.

    JAX stops writing to a cache if one program lacks a time stamp, left by an interrupted process or an unbounded
    cache. Such a program gets the oldest stamp.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # Whoever can write here can run code in later runs.
    try:
        with filelock.FileLock(folder / ".lockfile", timeout=0):  # JAX locks it for each program.
            pass
    except filelock.Timeout:
        pass
    for entry in folder.glob(f"*{_ENTRY}"):
        stamp = entry.with_name(entry.name.removesuffix(_ENTRY) + _STAMP)
        if not stamp.exists():
            stamp.write_bytes(bytes(8))
