import numpy as np
import pytest

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
