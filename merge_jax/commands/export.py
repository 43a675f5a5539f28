"""`merge-jax export`: a part of a checkpoint as a file of weights."""

from pathlib import Path
from typing import Any

import jax

from merge_jax.checkpoint import Checkpoints
from merge_jax.commands.cells import located
from merge_jax.paths import near_misses
from merge_jax.types import Params
from merge_jax.weights import save_safetensors

__all__ = ["export_part"]


def export_part(path: Path, file: Path, part: str, *, best: bool) -> None:
    """Writes a part of the newest, best or named step to a new safetensors file.

    Raises:
      ValueError: there is no such checkpoint or part, it is damaged, no step has a score, or the file is there or has
        another ending.
    """
    folder, step = located(path)
    with Checkpoints(folder, read_only=True) as checkpoints:
        if best:
            if step is not None:
                raise ValueError(f"{path} names step {step}: leave out --best, or name {folder}")
            step = checkpoints.best_step
            if step is None:
                raise ValueError(f"no step in {folder} has a score: leave out --best")
        step = checkpoints.steps[-1] if step is None else step
        if file.exists():
            raise ValueError(f"{file} is there already, and nothing is overwritten: give another name")
        state = checkpoints.restore_arrays(step)
        params = _part(state, part)
    save_safetensors(file, params, metadata={"checkpoint": folder.name, "step": str(step), "part": part})
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{part} of step {step}, {size:,} numbers: {file}")
    role, _, rest = part.partition("/")
    kept = sum(leaf.size for leaf in jax.tree.leaves(state.get(role, {}).get("model_state", {})))
    if rest == "params" and kept:  # BatchNorm's statistics, without which it cannot be evaluated.
        print(f"the model needs its model_state too, {kept:,} numbers: --part {role}/model_state ANOTHER_FILE")


def _part(state: dict[str, Any], part: str) -> Params:
    node: Any = state
    for name in part.split("/"):
        if not isinstance(node, dict) or name not in node:
            roles = {role: of_role for role, of_role in state.items() if isinstance(of_role, dict)}
            parts = [f"{role}/{name}" for role, of_role in roles.items() for name in of_role]
            raise ValueError(f"what is saved has no part {part!r}; {near_misses(part, parts)}")
        node = node[name]
    return node
