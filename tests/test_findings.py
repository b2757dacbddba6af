"""What the comparison says, on its committed rows: each finding is a difference with its interval.

The notebook's section 11 and the README say the same in words.
"""

import compare
import pytest
from conftest import ROOT

ROWS = compare.read_rows()
CLIMBERS = ("V1", "RLOO", "REBEL", "online DPO", "PPO")  # of what V2 climbs, E r − β KL
PAIRWISE = ("V2", "V1", "RLOO", "REBEL", "online DPO", "GRPO")


def bounds(values: list[float]) -> tuple[float, float]:
    assert len(values) >= 3, "seeds"
    mean, half = compare.interval(values)
    return mean - half, mean + half


@pytest.mark.parametrize("kl", [1.0, 2.0])
@pytest.mark.parametrize("method", CLIMBERS)
def test_what_climbs_the_same_objective_meets_on_one_frontier(method, kl):
    """Within 0.15 of the score, of which the way from SFT to two nats makes some 1.2."""
    low, high = bounds(compare.frontier_gaps(ROWS, kl, "score")[method])
    assert -0.15 < low < high < 0.15


def test_offline_dpo_stays_below():
    for figure in ("score", "gold"):
        _, high = bounds(compare.frontier_gaps(ROWS, 2.0, figure)["DPO"])
        assert high < 0


@pytest.mark.parametrize("method", PAIRWISE)
def test_pairs_do_not_notice_an_offset(method):
    low, high = bounds(compare.change(ROWS, "offset", "offset", 10)[method])
    assert -0.15 < low < high < 0.15


def test_ppo_does():
    for spread, least in ((3, 0.0), (10, 0.3)):
        _, high = bounds(compare.change(ROWS, "offset", "offset", spread)["PPO"])
        assert high < -least


@pytest.mark.parametrize("method", (*CLIMBERS, "V2"))
def test_all_fall_at_four_times_the_highest_tuned_rate(method):
    _, high = bounds(compare.change(ROWS, "rate", "lr", 8e-3)[method])
    assert high < -0.3


def test_the_readme_has_the_table():
    assert compare.summary(ROWS) in (ROOT / "README.md").read_text()
