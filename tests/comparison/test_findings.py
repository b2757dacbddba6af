"""What the comparison says, on its committed rows: each finding is a difference with its interval.

Ties, offset and stale samples at one rate were found on seeds 0 to 2; seeds 3 to 5 came after that,
and their means must agree. Rates, stale samples at the tuned rates, the long run, and reward and
policy at once were found on seeds 0 to 2, too; seeds 6 and 7 came after. The notebook's sections 11
and 12 and the README say the same in words.
"""

import math

import compare
import pandas
import pytest
from conftest import ROOT

ROWS = compare.read_rows()
CLIMBERS = ("V1", "RLOO", "REBEL", "online DPO", "PPO")  # of what V2 climbs, E r − β KL
PAIRWISE = ("V2", "V1", "RLOO", "REBEL", "online DPO", "GRPO")
ONLINE = (*PAIRWISE, "PPO")


def bounds(values: list[float]) -> tuple[float, float]:
    mean, half = compare.interval(values)
    return mean - half, mean + half


def assert_differs(values: list[float], high: float = 0.0) -> None:
    """The interval of the first three seeds lies below `high`.

    So does that of three that came after them; of two, each.
    """
    first, later = values[:3], values[3:]
    assert len(later) in (2, 3)
    assert bounds(first)[1] < high
    assert (bounds(later)[1] if len(later) == 3 else max(later)) < high


def assert_within(values: list[float], low: float, high: float) -> None:
    """The mean of each three seeds, and the interval of all six, lie between these."""
    assert len(values) == 6
    for three in (values[:3], values[3:]):
        assert low < compare.interval(three)[0] < high
    assert low < bounds(values)[0] < bounds(values)[1] < high


TIE = 0.065  # of the score, of which β from 0.4 to 0.1 makes 0.3


@pytest.mark.parametrize("kl", [1.0, 2.0])
@pytest.mark.parametrize("method", CLIMBERS)
def test_what_climbs_the_same_objective_meets_on_one_frontier(method, kl):
    assert_within(compare.frontier_gaps(ROWS, kl, "score")[method], -TIE, TIE)


def test_grpo_is_a_little_below_and_no_tie():
    gaps = compare.frontier_gaps(ROWS, 2.0, "score")["GRPO"]
    assert_differs(gaps)
    with pytest.raises(AssertionError):
        assert_within(gaps, -TIE, TIE)


def test_offline_dpo_is_far_below():
    """In one seed it does not get to 2 nats."""
    assert bounds(compare.frontier_gaps(ROWS, 2.0, "score")["DPO"])[1] < 0
    golds = compare.frontier_gaps(ROWS, 2.0, "gold")["DPO"]
    assert len(golds) == 5
    assert bounds(golds)[1] < -1.5
    assert max(golds) < -1.5


@pytest.mark.parametrize("method", CLIMBERS)
def test_head_to_head_none_beats_the_other_by_much(method):
    assert_within(compare.head_to_head(ROWS, 2.5)["V2", method], 0.43, 0.57)


@pytest.mark.parametrize("method", PAIRWISE)
def test_pairs_do_not_notice_an_offset(method):
    assert_within(compare.change(ROWS, "offset", "offset", 10)[method], -0.1, 0.1)


def test_ppo_notices_it_the_more_the_larger_it_is():
    changes = {sd: compare.change(ROWS, "offset", "offset", sd)["PPO"] for sd in (1, 3, 10)}
    assert bounds(changes[1])[1] < 0
    assert_differs(changes[10], high=-0.5)
    means = [compare.interval(values)[0] for values in changes.values()]
    assert means[0] > -0.1
    assert means[0] > means[1] > means[2]


def test_stale_samples_cost_ppo_more_than_p3o_at_the_same_rate():
    """Both were tuned to one rate, and so are compared with the same; so are REBEL and V1."""
    lost = compare.change(ROWS, "staleness, one rate", "epochs", 16)
    for method in ("V2", "V1", "REBEL"):
        assert_differs([ppo - own for ppo, own in zip(lost["PPO"], lost[method], strict=True)])
    for method in PAIRWISE:
        assert_within(lost[method], -0.4, 0)


def test_at_the_tuned_rates_ppo_loses_more_than_v2_and_v1_is_between_them():
    lost = compare.change(ROWS, "staleness", "epochs", 16)
    gaps = [ppo - v2 for ppo, v2 in zip(lost["PPO"], lost["V2"], strict=True)]
    assert len(gaps) == 5
    assert max(gaps) < 0
    assert bounds(gaps)[1] < 0
    for v1, v2 in zip(lost["V1"], lost["V2"], strict=True):
        assert v1 < v2
    assert compare.interval(lost["PPO"])[0] < compare.interval(lost["V1"])[0] < -0.8
    assert bounds(lost["V1"])[1] < 0


def test_eight_passes_cost_ppo_much_in_each_of_two_seeds_and_v2_little():
    lost = compare.change(ROWS, "staleness", "epochs", 8)
    assert {len(changes) for changes in lost.values()} == {2}
    assert max(lost["PPO"]) < -0.7
    for method in ("V2", "RLOO", "GRPO", "online DPO"):
        assert min(lost[method]) > -0.15
    for method in ("V1", "REBEL"):
        assert -0.6 < min(lost[method]) < max(lost[method]) < -0.2


@pytest.mark.parametrize("method", ONLINE)
def test_four_passes_cost_little(method):
    gaps = compare.change(ROWS, "staleness", "epochs", 4)[method]
    assert len(gaps) == 5
    assert -0.16 < compare.interval(gaps)[0] < 0.05
    assert min(gaps) > -0.3


@pytest.mark.parametrize("method", (*CLIMBERS, "V2"))
def test_at_8e_3_all_that_ran_there_have_fallen(method):
    """GRPO, tuned to 5e-4, ran up to 4e-3."""
    assert_differs(compare.change(ROWS, "rate", "lr", 8e-3)[method])


def test_at_8e_3_ppo_loses_least_in_each_seed_and_at_1_6e_2_rebel_in_four():
    changes = compare.change(ROWS, "rate", "lr", 8e-3)
    assert set(changes) == {*CLIMBERS, "V2"}
    assert {len(gaps) for gaps in changes.values()} == {5}
    for gaps in zip(*changes.values(), strict=True):
        assert max(gaps) == dict(zip(changes, gaps, strict=True))["PPO"]
    beyond = compare.change(ROWS, "rate", "lr", 1.6e-2)
    assert {len(gaps) for gaps in beyond.values()} == {5}
    best = [max(gaps) for gaps in zip(*beyond.values(), strict=True)]
    assert sum(own == gap for own, gap in zip(beyond["REBEL"], best, strict=True)) == 4


def test_at_4e_3_online_dpo_and_grpo_fall_and_the_others_stand():
    changes = compare.change(ROWS, "rate", "lr", 4e-3)
    assert set(changes) == set(ONLINE)
    for method, gaps in changes.items():
        assert len(gaps) == 5
        if method in ("online DPO", "GRPO"):
            assert max(gaps) < -0.4
        else:
            assert min(gaps) > -0.3


@pytest.mark.parametrize("factor", [0.25, 2])
@pytest.mark.parametrize("method", ONLINE)
def test_from_a_quarter_of_the_tuned_rate_to_twice_it_little_is_lost(method, factor):
    tuned, _ = compare.tuned(ROWS)[method]
    gaps = compare.change(ROWS, "rate", "lr", factor * tuned)[method]
    assert len(gaps) == 5
    assert min(gaps) > -0.3
    assert compare.interval(gaps)[0] > -0.16


def online_frontier() -> pandas.DataFrame:
    rows = compare.part_of(ROWS, "frontier")
    return rows[rows.method != "DPO"]


def test_the_gold_reward_rises_to_five_nats_and_is_lower_beyond_six():
    rows = online_frontier()
    others = rows[rows.method != "GRPO"]
    golds = [others[others.kl.between(*kls)].gold for kls in ((2, 3), (3, 4), (4, 5.5))]
    assert min(len(found) for found in golds) > 10
    assert golds[0].mean() < golds[1].mean() < golds[2].mean()
    assert rows[(rows.method == "GRPO") & rows.kl.between(4, 5.5)].gold.mean() < golds[1].mean()
    beyond = rows[rows.kl > 6].gold
    assert len(beyond) > 30
    assert beyond.max() < golds[1].mean()


def test_a_gamed_reward_model_is_no_failure_of_the_optimiser():
    """Runs beyond 16 nats have more of score − β KL than all others of their seed and β."""
    found = 0
    for _, rows in online_frontier().groupby(["seed", "beta"]):
        far = rows[rows.kl > 16].reached
        found += len(far)
        if len(far):
            assert far.min() > rows[rows.kl <= 16].reached.max()
    assert found >= 7


def test_in_a_long_run_p3o_games_the_reward_model_as_soon_as_any_in_two_seeds_of_five():
    after = {method: compare.gamed_after(ROWS, method) for method in ONLINE}
    for first in (0, 1):
        assert after["V2"][first] == after["V1"][first] <= 80
        assert after["V2"][first] == min(found[first] for found in after.values())
    for later in (2, 3, 4):
        assert [method for method in ONLINE if after[method][later] < math.inf] == ["GRPO"]


def test_a_long_run_at_a_low_beta_spoils_all_in_four_seeds_of_five():
    """In the fifth it spoils GRPO alone."""
    best = online_frontier()
    best = best[best.kl.between(2, 4)].gold.mean()
    for method in ONLINE:
        golds = compare.course(ROWS, method)[:, -1, 2]  # (seeds,)
        assert len(golds) == 5
        assert golds[:4].max() < best - 1
        assert (golds[4] < best - 1) == (method == "GRPO")


@pytest.mark.parametrize("form", ["AIHF", "AIHF, logistic"])
def test_learning_both_at_once_does_not_win_when_preferences_are_scarce(form):
    """Against the pipeline that makes as many updates of the reward model."""
    golds = ROWS[ROWS.part == "joint"].pivot_table("gold", ["knob", "seed"], "method")
    gaps = golds["pipeline, equal updates"] - golds[form]
    for share in (0.01, 0.03, 1.0):
        assert len(gaps[share]) == 5
        assert gaps[share].min() > 0
    for share in (0.03, 1.0):
        assert bounds(list(gaps[share]))[0] > 0
    assert abs(gaps[0.1].mean()) < 0.3


def test_the_readme_has_the_table():
    assert compare.summary(ROWS) in (ROOT / "README.md").read_text()
