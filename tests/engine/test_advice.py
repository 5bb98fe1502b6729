"""Which layers nibble calibrate would give more bits."""

import pytest

from engine.calibration.advice import wider
from kvcache.policy import read_policy


@pytest.mark.parametrize(
    ("policy", "errors", "advised"),
    [
        ("skvq:k2v2", [0.01, 0.04, 0, 0, 0.001, 0.002], "skvq:k2v2:w128:s4/0=skvq:k4v2/1=skvq:k4v2"),
        ("skvq:k3v1.5:g16:w64", [0.001, 0.001, 0.05], "skvq:k3v1.5:g16:w64:s4/2=skvq:k4v1.5:g16"),
        ("skvq:k2v2", [0.01] * 6, None),
        ("skvq:k2v2", [0.0] * 6, None),
        ("skvq:k4v2", [0.05, 0.001, 0.001], None),
        ("skvq:k2v2/0=f16", [0.05, 0.001, 0.001], None),
    ],
)
def test_the_few_layers_with_most_of_the_error(policy: str, errors: list[float], advised: str | None) -> None:
    """Bugs: a policy that cannot be read again; bits for layers that are no worse than others, or that have them."""
    found = wider(read_policy(policy), errors)
    assert (None if found is None else str(found)) == advised
    assert found is None or read_policy(str(found)) == found
