"""What holds for any trees, shapes and routes, on random ones; HYPOTHESIS_PROFILE=thousand tries a thousand of each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import merge_jax as mj
from merge_jax.paths import natural_order
from merge_jax.transfers.pairing import resolve
from merge_jax.transfers.routes import as_routes
from merge_jax.transfers.views import proportional

# Few sizes, so that what is compiled for a shape is met again.
SIZES = st.sampled_from([1, 2, 3])
NAMES = st.sampled_from(
    ["kernel", "bias", "scale", "embedding", "weight", "query", "out", "a", "b0", "layer_1", "layer_10"]
)
SHAPES = st.lists(SIZES, min_size=1, max_size=4).map(tuple)


@st.composite
def arrays(draw):
    shape, start = draw(SHAPES), draw(st.integers(-50, 50))
    return (np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + start) / 8


def trees(leaves):
    nodes = st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.dictionaries(NAMES, inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=2).map(tuple),
        ),
        max_leaves=6,
    )
    return st.dictionaries(NAMES, nodes, min_size=1, max_size=3)


TREES = trees(arrays())


def readable(leaves):
    """Returns the paths of the leaves whose layout is known."""

    def has_layout(path):
        try:
            mj.layouts.matrix_spec(path, leaves[path].shape)
        except ValueError:
            return False
        return True

    return sorted(filter(has_layout, leaves))


@st.composite
def pairs(draw, targets, sources, *, most):
    """Routes between leaves whose layouts are known; rows of embeddings meet by number."""
    of_targets, of_sources = readable(targets), readable(sources)
    assume(of_targets and of_sources)
    chosen = draw(st.lists(st.sampled_from(of_targets), min_size=1, max_size=most, unique=True))
    return [mj.Route(path, draw(st.sampled_from(of_sources)), rows="first") for path in chosen]


@st.composite
def specs(draw, shape):
    axes = draw(st.permutations(range(len(shape))))
    first, second = sorted((draw(st.integers(0, len(axes))), draw(st.integers(0, len(axes)))))
    return mj.MatrixSpec(tuple(axes[:first]), tuple(axes[first:second]), tuple(axes[second:]))


@given(TREES, st.data())
def test_flatten_and_replace_are_inverse_and_touch_nothing_else(tree, data):
    leaves = mj.flatten(tree)
    assert [id(leaf) for leaf in leaves.values()] == [id(leaf) for leaf in jax.tree.leaves(tree)]
    chosen = data.draw(st.lists(st.sampled_from(sorted(leaves)), unique=True))
    new = mj.replace(tree, {path: leaves[path] + 1 for path in chosen})
    assert jax.tree.structure(new) == jax.tree.structure(tree)
    for path, leaf in mj.flatten(new).items():
        assert (leaf is leaves[path]) == (path not in chosen)


@given(TREES, st.data())
def test_every_path_finds_itself_and_its_own_glob(tree, data):
    paths = list(mj.flatten(tree))
    path = data.draw(st.sampled_from(paths))
    assert mj.paths.find_paths(paths, path) == [path]
    assert path in mj.paths.find_paths(paths, "/".join("*" for _ in path.split("/")))
    assert path in mj.paths.find_paths(paths, "**/" + path.split("/")[-1])
    assert sorted(mj.paths.find_paths(paths, "**")) == sorted(paths)
    assert mj.paths.find_paths(paths, "**") == sorted(paths, key=natural_order)


@given(SHAPES, st.data())
def test_any_spec_makes_a_matrix_and_exactly_back(shape, data):
    spec = data.draw(specs(shape))
    leaf = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    matrix = mj.layouts.as_matrix(leaf, spec)
    assert matrix.shape == spec.matrix_shape(shape)
    np.testing.assert_array_equal(mj.layouts.from_matrix(matrix, spec, shape), leaf)


@given(st.integers(1, 40), st.integers(1, 40))
def test_partners_are_in_proportion(count, other):
    partners = proportional(count, other)
    assert len(partners) == count
    assert partners == sorted(partners)
    assert all(j / other <= (i + 0.5) / count < (j + 1) / other for i, j in enumerate(partners))
    assert other > count or set(partners) == set(range(other))


def numpy_overlap(target, source, target_spec, source_spec):
    """Sharing entry by entry."""
    merged = np.array(target)
    blocks, source_blocks = target_spec.blocks(target.shape), source_spec.blocks(source.shape)
    rank = max(len(blocks), len(source_blocks))
    padded, source_padded = ((b[0], b[1], *(1,) * (rank - len(b)), *b[2:]) for b in (blocks, source_blocks))
    matrix = np.transpose(target, target_spec.axes).reshape(padded).copy()
    of_source = np.transpose(source, source_spec.axes).reshape(source_padded)
    sizes = [min(t, s) for t, s in zip(padded, source_padded, strict=True)]
    for index in np.ndindex(*sizes):
        t, s = list(index), list(index)
        for axis in range(2, rank):
            t[axis] += (padded[axis] - sizes[axis]) // 2
            s[axis] += (source_padded[axis] - sizes[axis]) // 2
        matrix[tuple(t)] = of_source[tuple(s)]
    merged = matrix.reshape([target.shape[axis] for axis in target_spec.axes])
    return merged.transpose(np.argsort(target_spec.axes))


@given(TREES, TREES, st.data())
def test_sharing_is_the_overlap_entry_by_entry_and_spares_the_rest(source, target, data):
    sources, targets = mj.flatten(source), mj.flatten(target)
    given_routes = data.draw(pairs(targets, sources, most=2))
    routes = {route.target: route.source for route in given_routes}
    merged = mj.flatten(mj.share_transfer(given_routes).apply({}, source, target))
    for path, leaf in targets.items():
        if path not in routes:
            assert merged[path] is leaf
            continue
        other = sources[routes[path]]
        of_both = mj.layouts.matrix_spec(path, leaf.shape), mj.layouts.matrix_spec(routes[path], other.shape)
        np.testing.assert_array_equal(merged[path], numpy_overlap(leaf, other, *of_both))
        assert merged[path].dtype == leaf.dtype


@given(TREES, TREES, st.sampled_from(["matrix", "convolution"]), st.data())
def test_every_view_gives_its_leaves_back(source, target, view, data):
    sources, targets = mj.flatten(source), mj.flatten(target)
    routes = data.draw(pairs(targets, sources, most=1))
    (route,) = resolve(as_routes(routes), source, target, view=view)
    leaves = [jnp.asarray(targets[path]) for path in route.target]
    kernel = route.target_view.to_kernel(leaves)
    matrix = route.target_view.to_matrix(kernel)
    assert matrix.shape == route.target_view.matrix_shape
    np.testing.assert_array_equal(route.target_view.from_matrix(matrix), kernel)
    for leaf, back in zip(leaves, route.target_view.to_leaves(kernel), strict=True):
        np.testing.assert_array_equal(back, leaf)


OPTIONS = st.fixed_dictionaries({
    "output": st.sampled_from(["published", "residual", "warm"]),
    "num_heads": st.sampled_from([1, 3]),
    "attentions": st.sampled_from([("rows_rows",), ("cols_rows", "rows_cols"), ("cols_cols",)]),
    "view": st.sampled_from(["matrix", "convolution"]),
    "rank": st.sampled_from([None, None, 1, 2]),
    "shared": st.booleans(),
    "max_scores": st.sampled_from([2, 2**22]),
})  # fmt: skip


# Traced, not run, and a quarter as often: a trace takes long.
@settings(max_examples=max(5, settings.default.max_examples // 4))
@given(TREES, TREES, OPTIONS, st.data())
def test_any_adapter_keeps_the_targets_structure(source, target, options, data):
    sources, targets = mj.flatten(source), mj.flatten(target)
    routes = data.draw(pairs(targets, sources, most=3))
    transfer = mj.lpka_transfer(routes, num_layers=1, **options)
    too_small = options["rank"] is not None and any(
        min(mj.layouts.matrix_spec(path, targets[path].shape).matrix_shape(targets[path].shape)) < options["rank"]
        for path in (route.target for route in routes)
    )
    if options["rank"] is not None and (options["view"] != "matrix" or too_small):
        with pytest.raises(ValueError, match="rank"):
            transfer.init(jax.random.key(0), source, target)
        return
    adapter = jax.eval_shape(transfer.init, jax.random.key(0), source, target)
    merged = jax.eval_shape(transfer.apply, adapter, source, target)
    of = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (merged, target)]
    assert of[0] == of[1]


# Each shape compiles anew.
@settings(max_examples=max(8, settings.default.max_examples // 4))
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**16))
@pytest.mark.slow
def test_a_basis_is_orthonormal_and_decoding_keeps_what_it_does_not_see(m, n, rank, seed):
    assume(rank <= min(m, n))
    w = np.random.default_rng(seed).normal(size=(m, n)).astype(np.float32)
    w[:, seed % n] = 0  # Lower ranks too.
    basis = np.asarray(BASIS(w, rank))
    np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-5)
    best = np.linalg.svd(w, compute_uv=False)[rank:]
    error = np.linalg.norm(w - basis @ (basis.T @ w))
    assert error <= 1.05 * np.sqrt((best**2).sum()) + 1e-5


BASIS = jax.jit(mj.transfers.row_basis, static_argnums=1)
