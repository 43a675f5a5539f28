"""What is measured of a target after a transfer."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import anatomy
from merge_jax.study import parse_routes

ROUTES = parse_routes(["w=v"])


def tree(value, other=0.0):
    return {"w": jnp.asarray(value, jnp.float32), "b": jnp.full((2,), other)}


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_copy_that_was_left_alone_is_kept_whole():
    source = {"v": jnp.asarray(draw(0, 6, 3))}
    start = draw(1, 4, 5)
    end = start.copy()
    end[:4, :3] = source["v"][:4]
    found = anatomy.measure(tree(start), tree(end, 9.0), source, ROUTES)
    assert found["kept"] == pytest.approx(1)
    assert found["moved"] == pytest.approx(np.linalg.norm(end - start) / np.linalg.norm(start), rel=1e-5)


def test_what_was_turned_against_the_source_has_the_cosine_minus_1():
    source = {"v": jnp.asarray(draw(0, 4, 5))}
    assert anatomy.measure(tree(draw(1, 4, 5)), tree(-source["v"]), source, ROUTES)["kept"] == pytest.approx(-1)


@pytest.mark.parametrize(("change", "rank"), [(np.eye(4), 1.0), (np.ones((4, 4)), 0.25), (np.zeros((4, 4)), 0.0)])
def test_the_effective_rank_of_known_changes(change, rank):
    start = draw(1, 4, 4)
    found = anatomy.measure(tree(start), tree(start + change), {"v": jnp.ones((4, 4))}, ROUTES)
    assert found["rank"] == pytest.approx(rank, abs=1e-3)


def refusal(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        anatomy.main(list(map(str, words)))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_what_is_no_run_is_told(tmp_path, capsys):
    assert "is not a run folder: it has no config.json" in refusal(capsys, "cross_structure", tmp_path)
    (tmp_path / "config.json").write_text('{"labelz": 3}')
    assert "of another experiment or version" in refusal(capsys, "cross_structure", tmp_path)
    (tmp_path / "config.json").write_text('{"routes": ["by depth"]}')
    assert "are not named by leaves" in refusal(capsys, "cross_task", tmp_path)
    (tmp_path / "config.json").write_text('{"seeds": 1, "contents": {"data": "content 12"}}')
    assert "there is no checkpoint" in refusal(capsys, "cross_structure", tmp_path)
