"""What the comparison says, on its committed rows: each finding is a difference with its interval.

Findings were written down after seeds 0 to 2; seeds 3 to 5 were run after that, and must say the
same. The notebook's section 11 and the README have them in words.
"""

import math

import compare
import pandas
import pytest
from conftest import ROOT

ROWS = compare.read_rows()
CLIMBERS = ("V1", "RLOO", "REBEL", "online DPO", "PPO")  # of what V2 climbs, E r − β KL
PAIRWISE = ("V2", "V1", "RLOO", "REBEL", "online DPO", "GRPO")


def bounds(values: list[float]) -> tuple[float, float]:
    mean, half = compare.interval(values)
    return mean - half, mean + half


def halves(values: list[float]) -> list[list[float]]:
    """Seeds 0 to 2, and those after."""
    assert len(values) >= 3
    return [half for half in (values[:3], values[3:]) if len(half) > 2]


def assert_differs(values: list[float], low: float = -math.inf, high: float = math.inf) -> None:
    """The interval of either half lies between these."""
    for half in halves(values):
        assert low < bounds(half)[0] < bounds(half)[1] < high


def assert_within(values: list[float], low: float, high: float) -> None:
    """The mean of either half, and the interval of all, lie between these."""
    for half in halves(values):
        assert low < compare.interval(half)[0] < high
    assert low < bounds(values)[0] < bounds(values)[1] < high


@pytest.mark.parametrize("kl", [1.0, 2.0])
@pytest.mark.parametrize("method", CLIMBERS)
def test_what_climbs_the_same_objective_meets_on_one_frontier(method, kl):
    """Within 0.1 of the score, of which β from 0.4 to 0.1 makes 0.3."""
    assert_within(compare.frontier_gaps(ROWS, kl, "score")[method], -0.1, 0.1)


def test_grpo_is_a_little_and_offline_dpo_far_below():
    assert_differs(compare.frontier_gaps(ROWS, 2.0, "score")["GRPO"], high=0)
    assert_differs(compare.frontier_gaps(ROWS, 2.0, "score")["DPO"], high=0)
    assert_differs(compare.frontier_gaps(ROWS, 2.0, "gold")["DPO"], high=-1.4)


@pytest.mark.parametrize("method", CLIMBERS)
def test_head_to_head_none_beats_the_other_by_much(method):
    assert_within(compare.head_to_head(ROWS, 2.5)["V2", method], 0.43, 0.57)


@pytest.mark.parametrize("method", PAIRWISE)
def test_pairs_do_not_notice_an_offset(method):
    assert_within(compare.change(ROWS, "offset", "offset", 10)[method], -0.1, 0.1)


def test_ppo_notices_it():
    assert_differs(compare.change(ROWS, "offset", "offset", 10)["PPO"], high=-0.5)


def test_stale_samples_cost_ppo_more_than_p3o_at_the_same_rate():
    """Against each where it was tuned."""
    lost = compare.change(ROWS, "staleness, one rate", "epochs", 16)
    assert_differs([ppo - v2 for ppo, v2 in zip(lost["PPO"], lost["V2"], strict=True)], high=0)
    for method in ("V2", "V1", "RLOO", "REBEL", "GRPO"):
        assert_within(lost[method], -0.25, 0)


def test_four_passes_cost_nobody_much():
    for gaps in compare.change(ROWS, "staleness", "epochs", 4).values():
        assert min(gaps) > -0.3


@pytest.mark.parametrize("method", (*CLIMBERS, "V2"))
def test_too_high_a_rate_fells_all(method):
    assert_differs(compare.change(ROWS, "rate", "lr", 8e-3)[method], high=0)


def online_frontier() -> pandas.DataFrame:
    rows = compare.part_of(ROWS, "frontier")
    return rows[rows.method != "DPO"]


def test_beyond_some_four_nats_the_gold_reward_turns():
    """Every online run beyond 6 nats is below the mean of those between 2 and 4."""
    rows = online_frontier()
    assert (rows.kl > 6).sum() > 30
    best = rows[rows.kl.between(2, 4)].gold.mean()
    assert rows[rows.kl > 6].gold.max() < best


def test_a_gamed_reward_model_is_no_failure_of_the_optimiser():
    """Runs beyond 16 nats have more of score − β KL than all others of their seed and β."""
    gamed = online_frontier()
    found = 0
    for _, rows in gamed.groupby(["seed", "beta"]):
        far = rows[rows.kl > 16].reached
        found += len(far)
        if len(far):
            assert far.min() > rows[rows.kl < 10].reached.max()
    assert found >= 7


def gamed_after(method: str, seed: int) -> float:
    """Iterations of the long run until 20 nats were seen."""
    (points,) = compare.course(ROWS[ROWS.seed == seed], method)
    beyond = [i for i, (kl, *_) in enumerate(points, 1) if kl > 20]
    return compare.WATCHED_EVERY * beyond[0] if beyond else math.inf


def test_in_a_long_run_p3o_games_the_reward_model_as_soon_as_any():
    """Against P3O: in two seeds of three, no method is past 20 nats before V2 and V1."""
    for seed in (0, 1):
        after = {method: gamed_after(method, seed) for method in compare.METHODS[:-1]}
        assert after["V2"] == after["V1"] == min(after.values()) <= 80
        assert after["RLOO"] > after["V2"]
    assert gamed_after("V2", 2) == gamed_after("V1", 2) == math.inf


def test_a_long_run_at_a_low_beta_spoils_all():
    best = online_frontier()
    best = best[best.kl.between(2, 4)].gold.mean()
    for method in compare.METHODS[:-1]:
        golds = compare.course(ROWS, method)[:, -1, 2]  # (seeds,)
        assert len(golds) == 3
        assert golds.max() < best - 1


def test_the_readme_has_the_table():
    assert compare.summary(ROWS) in (ROOT / "README.md").read_text()
