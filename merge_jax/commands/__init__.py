"""The console command `merge-jax`."""

from merge_jax.commands.main import main

__all__ = ["main"]
