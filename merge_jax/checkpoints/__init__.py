"""States and weights on disk: Orbax steps with digests, and weight files."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from merge_jax.checkpoints.orbax import CheckpointError, Checkpoints, DamagedCheckpointWarning, NotBitExactWarning
    from merge_jax.checkpoints.safetensors import load_safetensors, save_safetensors
    from merge_jax.checkpoints.torch_files import load_torch
    from merge_jax.checkpoints.weights.layouts import layouts_of
    from merge_jax.checkpoints.weights.load import load_params, load_weights, weight_shapes

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "DamagedCheckpointWarning",
    "NotBitExactWarning",
    "layouts_of",
    "load_params",
    "load_safetensors",
    "load_torch",
    "load_weights",
    "save_safetensors",
    "weight_shapes",
]
