import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax.transfers.fitted.routes import routes_with_state
from merge_jax.transfers.routes import Route

BARE = {"fc": {"kernel": np.ones((3, 4)), "bias": np.ones(4)}}
WRAPPED = {"params": BARE}


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (BARE, BARE, Route("fc/*", "fc/*")),
        (WRAPPED, WRAPPED, Route("params/fc/*", "params/fc/*")),
        (BARE, WRAPPED, Route("params/fc/*", "fc/*")),
        (WRAPPED, BARE, Route("fc/*", "params/fc/*")),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_params_are_left_out_of_either_side(source, target, expected, named):
    routes = {expected.target: expected.source} if named else {"fc/*": "fc/*"}
    if named and source is WRAPPED is target:
        pytest.skip("where both have them, both do without")
    assert routes_with_state(routes, source, target) == (expected,)


def of_own_names(params, x):
    """Returns what a convolution and two kernels with heads compute of `[B, L, 3]`; no name says which is which."""
    mixed = jax.lax.conv_general_dilated(
        x, params["mix"]["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    heads = jnp.einsum("blc,chd->blhd", jax.nn.relu(mixed), params["q"]["kernel"])
    return jnp.einsum("blhd,hdo->blo", jax.nn.relu(heads + params["q"]["bias"][None, None]), params["o"]["kernel"])


def of_sizes(seed, window, width, heads):
    sizes = {"mix/kernel": (window, 3, width), "q/kernel": (width, heads, 4), "q/bias": (heads, 4)}
    leaves = {path: np.random.default_rng(seed).normal(size=size).astype(np.float32)
              for path, size in (sizes | {"o/kernel": (heads, 4, 2)}).items()}  # fmt: skip
    return {name: {path.split("/")[1]: leaf for path, leaf in leaves.items() if path.startswith(f"{name}/")}
            for name in ("mix", "q", "o")}  # fmt: skip


# Arrays of JAX: a refit would stream those of NumPy.
SOURCE, TARGET = (jax.tree.map(jnp.asarray, one) for one in (of_sizes(1, 5, 6, 2), of_sizes(2, 3, 5, 1)))
INPUTS = np.random.default_rng(0).normal(size=(64, 7, 3)).astype(np.float32)


def test_a_refit_reads_leaves_of_any_name_as_the_model_computes_with_them():
    made = mj.refit({"**": "**"}, of_own_names, of_own_names, SOURCE, TARGET, INPUTS)
    assert set(made.solved) == {"mix/kernel", "q/kernel", "o/kernel"}
    assert made.solved["mix/kernel"] > 0.4


def test_an_alignment_reads_leaves_of_any_name_as_the_model_computes_with_them():
    graphs = [mj.channel_graph(of_own_names, params, INPUTS) for params in (SOURCE, TARGET)]
    assert [dict(graph.windows) for graph in graphs] == [{"mix/kernel": (0,)}] * 2
    aligned = mj.aligned_transfer({"**": "**"}, graphs[0], graphs[0])
    other = of_sizes(2, 5, 6, 2)
    written = aligned.apply(aligned.init(jax.random.key(0), SOURCE, other), SOURCE, other)
    jax.tree.map(np.testing.assert_array_equal, written, SOURCE)


def test_rows_need_a_layout_that_is_known_by_name():
    route = mj.Route("mix/kernel", "mix/kernel", rows="first")
    with pytest.raises(ValueError, match="give its route a target_spec"):
        mj.refit([route], of_own_names, of_own_names, SOURCE, TARGET, INPUTS)
