"""`merge-jax export`: writes a trained model, or a part of a checkpoint, to a weight file."""

import json
from pathlib import Path
from typing import Any, Literal

import jax

from merge_jax.checkpoints.orbax import Checkpoints
from merge_jax.checkpoints.safetensors import save_safetensors
from merge_jax.paths import near_misses
from merge_jax.runs import PLAN, Model, Plan
from merge_jax.runs.checkpoint_folders import locate_checkpoints
from merge_jax.types import Params

__all__ = ["Names", "export_part"]


_LOADERS = (
    "its own model reads them: network.load_state_dict(safetensors.torch.load_file(FILE))",
    "from_pretrained reads it as model.safetensors, beside the config.json of such a model",
)
Names = Literal["huggingface", "timm", "torchvision", "efficientnet_lite_pytorch"]
"""Libraries by whose names, and in whose layouts, a model can be written."""


def export_part(path: Path, file: Path, part: str, *, best: bool, names: Names | None = None) -> None:
    """Writes a part of the newest, best or named step to a new safetensors file, and prints how to read it.

    A role is written as Linen variables: its parameters as `params`, beside its model state, such as `batch_stats`. Any
    other part is written unchanged. With `names`, a role is written with that library's names and layouts, for the
    library's model to load.

    Raises:
      ValueError: there is no such checkpoint or part, it is damaged, no step has a score, or the file exists or has
        another suffix; `names` for a part that is not a model, or for a model that the library lacks.
    """
    folder, step = locate_checkpoints(path)
    if file.suffix != ".safetensors":
        raise ValueError(f"{file} must end in .safetensors, the format that is written")
    with Checkpoints(folder, read_only=True) as checkpoints:
        if best:
            if step is not None:
                raise ValueError(f"{path} names step {step}: leave out --best, or name {folder}")
            step = checkpoints.best_step
            if step is None:
                raise ValueError(f"no step in {folder} has a score: leave out --best")
        step = checkpoints.steps[-1] if step is None else step
        if file.exists():
            raise ValueError(f"{file} already exists and is not overwritten: choose another name")
        state = checkpoints.restore_arrays(step)
        tree = _part(state, part)
    whole = isinstance(tree, dict) and "params" in tree
    tree = _variables(tree) if whole else tree
    if names is not None and not whole:
        raise ValueError(f"--names {names} is for a whole model, --part target or source; {part} is a part of one")
    named = tree if names is None else _renamed(tree, names)
    metadata = {} if names is None else {"format": "pt"}  # Required by transformers.
    save_safetensors(file, named, metadata={"checkpoint": f"{folder.name}/{step}/{part}", **metadata})
    size = sum(leaf.size for leaf in jax.tree.leaves(tree))
    role, *rest = part.split("/")
    name = "/".join(["source" if _is_source(folder, role) else role, *rest])
    print(f"{name} of step {step}, {size:,} numbers: {file}")
    if names is not None:
        print(f"with the names of {names}; {_LOADERS[names == 'huggingface']}")
        return
    model = _model(folder, part) if whole else None
    if model is not None and model.code:
        print(f"\n# {model.name}, in Python:\n{_loading(model.code, file)}")


def _part(state: dict[str, Any], part: str) -> Any:
    node: Any = state
    for name in part.split("/"):
        if not isinstance(node, dict) or name not in node:
            roles = {role: content for role, content in state.items() if isinstance(content, dict)}
            parts = [*roles, *(f"{role}/{name}" for role, content in roles.items() for name in content)]
            raise ValueError(f"the checkpoint has no part {part!r}; {near_misses(part, parts)}")
        node = node[name]
    return node


def _variables(role: dict[str, Any]) -> Params:
    """Returns a role's model variables, without optimizer state."""
    model_state = role.get("model_state", {})
    apart = not isinstance(model_state, dict) or "params" in model_state
    return {"params": role["params"], **({"model_state": model_state} if apart else model_state)}


def _renamed(variables: Any, names: Names) -> Params:
    """Returns a model's variables with a library's names and layouts."""
    from merge_jax.models import to_huggingface, to_pytorch  # Not at the top: an export without names needs neither.

    if names == "huggingface":
        return to_huggingface(variables["params"])
    return to_pytorch(variables, names)


def _model(folder: Path, role: str) -> Model | None:
    """Returns the model of a role in the plan of a checkpoint's run; None if there is no plan."""
    try:
        plan = Plan.from_json(json.loads((folder.parent.parent / PLAN).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return plan.source if _is_source(folder, role) else plan.target


def _is_source(folder: Path, role: str) -> bool:
    # Pre-training trains a source in the role of the target.
    return role == "source" or (role == "target" and folder.name.startswith("source-"))


def _loading(code: str, file: Path) -> str:
    return (
        f"import jax, jax.numpy as jnp\nimport merge_jax as mj\n\n{code}\n"
        f'variables = mj.load_params("{file}", like)\noutputs = apply(variables, inputs)'
    )
