"""Files as transformers writes them, with random tensors, the models that they fit, and torch's layers in float64."""

import jax
import jax.numpy as jnp
import numpy as np

import merge_jax as mj
from merge_jax import models
from tests.models.common import attend_one, norm

VOCAB, WIDTH, HIDDEN, HEADS, LAYERS, POSITIONS, CLASSES = 20, 8, 12, 2, 2, 10, 3
CLS, SEP = 2, 3
TOKENS = np.array([[CLS, 5, 6, SEP, 7, 8, 9, SEP, 0, 0], [CLS, 5, SEP, 10, 11, SEP, 0, 0, 0, 0]], np.int32)

# For each architecture: its prefix, and the parts of a layer in the order of `layer` below.
PARTS = {
    "bert": (
        "encoder.layer",
        ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
        ("attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"),
    ),
    "distilbert": (
        "transformer.layer",
        ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        ("sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"),
    ),
}


def tensors_of(architecture, head, seed=0):
    """Returns random tensors under the names that transformers gives them, in torch's layout."""
    random = np.random.default_rng(seed)
    tensors = {}

    def add(name, *shape, prefix=f"{architecture}."):
        tensors[f"{prefix}{name}.weight"] = (0.5 * random.normal(size=shape)).astype(np.float32)
        if "embeddings." not in name or "LayerNorm" in name:
            tensors[f"{prefix}{name}.bias"] = (0.5 * random.normal(size=shape[:1])).astype(np.float32)

    add("embeddings.word_embeddings", VOCAB, WIDTH)
    add("embeddings.position_embeddings", POSITIONS, WIDTH)
    if architecture == "bert":
        add("embeddings.token_type_embeddings", 2, WIDTH)
    add("embeddings.LayerNorm", WIDTH)
    layer, attention, (norm1, up, down, norm2) = PARTS[architecture]
    for i in range(LAYERS):
        for part in attention:
            add(f"{layer}.{i}.{part}", WIDTH, WIDTH)
        add(f"{layer}.{i}.{norm1}", WIDTH)
        add(f"{layer}.{i}.{up}", HIDDEN, WIDTH)
        add(f"{layer}.{i}.{down}", WIDTH, HIDDEN)
        add(f"{layer}.{i}.{norm2}", WIDTH)
    if head == "classes":
        if architecture == "bert":
            add("pooler.dense", WIDTH, WIDTH)
        else:
            add("pre_classifier", WIDTH, WIDTH, prefix="")
        add("classifier", CLASSES, WIDTH, prefix="")
    if head == "spans":
        add("qa_outputs", 2, WIDTH, prefix="")
    return tensors


def torch_dense(tensors, name, x):
    return x @ tensors[f"{name}.weight"].astype(np.float64).T + tensors[f"{name}.bias"]


def torch_norm(tensors, name, x):
    return norm({"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}, x)


def attend_by_heads(query, key, value, seen=True):
    parts = np.split(np.arange(WIDTH), HEADS)
    return np.concatenate([attend_one(query[:, one], key[:, one], value[:, one], seen) for one in parts], -1)


def model_of(architecture, head, classes=CLASSES, **options):
    sizes = {"width": WIDTH, "num_layers": LAYERS, "num_heads": HEADS, "hidden": HIDDEN, "max_length": POSITIONS}
    segments = 2 if architecture == "bert" else 0
    encoder = models.TextEncoder(
        **{"vocab_size": VOCAB, **sizes, "num_segments": segments, "separator": SEP, **options}
    )
    if head == "classes":
        return models.TextClassifier(encoder, classes, "tanh" if architecture == "bert" else "relu")
    return models.SpanExtractor(encoder) if head == "spans" else encoder


def params_of(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 7.0, leaf.dtype), shapes)


def write(folder, tensors):
    """Writes tensors to a file, and gives its path."""
    mj.save_safetensors(folder / "model.safetensors", tensors, overwrite=True)
    return folder / "model.safetensors"


def assert_goes_back(folder, params, tensors, **options):
    """Parameters become the tensors that they were read from, and what is written of these is read as they are."""
    back = models.to_huggingface(params, **options)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
    again = models.from_huggingface(write(folder, back), params)
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


IMAGE, PATCH, CHANNELS = 12, 4, 3
VIT_LAYER = "vit.encoder.layer"


def vit_tensors(head, seed=0, channels=CHANNELS):
    """Returns random tensors under the names that transformers gives them in a file, in torch's layout."""
    random = np.random.default_rng(seed)
    tensors = {}

    def add(name, *shape):
        tensors[name] = (0.5 * random.normal(size=shape)).astype(np.float32)

    def add_dense(name, *shape):
        add(f"{name}.weight", *shape)
        add(f"{name}.bias", shape[0])

    add("vit.embeddings.cls_token", 1, 1, WIDTH)
    add("vit.embeddings.position_embeddings", 1, 1 + (IMAGE // PATCH) ** 2, WIDTH)
    add_dense("vit.embeddings.patch_embeddings.projection", WIDTH, channels, PATCH, PATCH)
    for i in range(LAYERS):
        for part in ("attention.attention.query", "attention.attention.key", "attention.attention.value"):
            add_dense(f"{VIT_LAYER}.{i}.{part}", WIDTH, WIDTH)
        add_dense(f"{VIT_LAYER}.{i}.attention.output.dense", WIDTH, WIDTH)
        add_dense(f"{VIT_LAYER}.{i}.layernorm_before", WIDTH)
        add_dense(f"{VIT_LAYER}.{i}.layernorm_after", WIDTH)
        add_dense(f"{VIT_LAYER}.{i}.intermediate.dense", HIDDEN, WIDTH)
        add_dense(f"{VIT_LAYER}.{i}.output.dense", WIDTH, HIDDEN)
    add_dense("vit.layernorm", WIDTH)
    if head:
        add_dense("classifier", CLASSES, WIDTH)
    return tensors


def vit_of(head, classes=CLASSES, **options):
    sizes = {"image_size": IMAGE, "patch_size": PATCH, "width": WIDTH, "num_layers": LAYERS, "num_heads": HEADS}
    encoder = models.VisionTransformer(**{**sizes, "hidden": HIDDEN, **options})
    return models.ImageClassifier(encoder, classes) if head else encoder


def vit_params(head, channels=CHANNELS, **options):
    model = vit_of(head, **options)
    size = options.get("image_size", IMAGE)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, channels)))["params"]
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 7.0, leaf.dtype), shapes)
