"""`python -m merge_jax` is the command `merge-jax`."""

from merge_jax.commands import main

if __name__ == "__main__":
    main()
