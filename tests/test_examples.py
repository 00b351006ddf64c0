"""Every example runs, with 1 and 2 replicas, and gives the same."""

import re
import sys
from pathlib import Path

import pytest

from unisono.launch.local import launch

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_example_gives_the_same_on_two_replicas(
    example: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sums = []
    for replicas in (1, 2):
        assert (
            launch([sys.executable, str(example)], replicas, 1, {"CUDA_VISIBLE_DEVICES": ""}) == 0
        )
        out = capfd.readouterr().out
        assert f"{replicas} replicas" in out
        sums.append(float(re.findall(r"sum to (-?\d+\.\d+)", out)[0]))
    assert sums[0] == pytest.approx(sums[1], rel=1e-4, abs=1e-4)
    assert abs(sums[0]) > 1e-3
