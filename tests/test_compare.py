"""The comparison's bookkeeping; what its runs are made of is tested with the relatives."""

import compare
import pandas
import pytest


def row(**changes) -> dict:
    trial = compare.Trial("tuning", "V2", 100, 0.1, 1e-3, 0.2)._asdict()
    figures = dict(score=1.0, gold=5.0, kl=2.0, win_rate=0.9, finished=1.0, seconds=9.0)
    return trial | figures | dict(points="", curve="") | changes


def test_the_best_mean_over_seeds_is_taken_and_the_kl_is_paid():
    rows = [
        row(lr=1e-3, seed=100, score=1.5),
        row(lr=1e-3, seed=101, score=0.5),
        row(lr=2e-3, seed=100, score=1.1),
        row(lr=2e-3, seed=101, score=1.1),
        row(lr=4e-3, seed=100, score=2.0, kl=20.0),
        row(lr=8e-3, part="rate", score=9.0),
    ]
    assert compare.tuned(pandas.DataFrame(rows)) == {"V2": (2e-3, 0.2)}


def test_every_method_has_as_many_trials_and_seeds_of_its_own_in_the_tuning():
    trials = compare.trials("tuning", compare.read_rows(), compare.SEEDS)
    assert len(set(trials)) == len(trials)
    counts = {method: [t.method for t in trials].count(method) for method in compare.METHODS}
    assert set(counts.values()) == {10 * len(compare.TUNING_SEEDS)}
    assert not {trial.seed for trial in trials} & set(compare.SEEDS)


def test_the_committed_rows_are_different_trials_of_the_parts():
    rows = compare.read_rows()
    assert len(rows) > 0
    keys = [compare.key_of(row) for row in rows.to_dict("records")]
    assert len(set(keys)) == len(keys)
    assert set(rows.part) <= set(compare.PARTS)
    assert set(rows.method) <= {*compare.METHODS, *compare.JOINT}


def test_a_written_row_is_read_again_as_the_same_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "ROWS", tmp_path / "rows.csv")
    trial = compare.Trial("rate", "PPO", 3, 0.1, 2e-3 * 0.25, 0.95)
    for seed in (3, 4):
        compare.write_row(row(**trial._replace(seed=seed)._asdict()))
    found = compare.read_rows(tmp_path / "rows.csv").to_dict("records")
    assert len(found) == 2
    assert compare.key_of(found[0]) == compare.key_of(trial._asdict())


def test_an_interval_is_students_over_seeds():
    mean, half = compare.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.78 * 1.5811 / 5**0.5, rel=1e-3)


def frontier() -> pandas.DataFrame:
    """V2 reaches gold = KL, PPO one less; of three answers each wins one."""
    rows = []
    for seed in (0, 1):
        for beta, kl in ((0.2, 1.0), (0.1, 2.0), (0.05, 4.0)):
            base = dict(part="frontier", seed=seed, beta=beta, kl=kl)
            rows.append(row(**base, gold=kl, points="nnn"))
            rows.append(row(**base, gold=kl - 1, points="mno", method="PPO"))
    return pandas.DataFrame(rows)


def test_methods_are_compared_at_the_same_kl():
    gaps = compare.frontier_gaps(frontier(), 3.0)
    assert gaps["PPO"] == pytest.approx([-1, -1])
    assert gaps["V2"] == [0, 0]


def test_head_to_head_is_on_the_same_prompts_and_a_tie_is_half():
    wins = compare.head_to_head(frontier(), 2.0)
    assert wins["V2", "PPO"] == [0.5, 0.5]  # a win, a tie, a loss
    assert wins["V2", "V2"] == [0.5, 0.5]


def test_what_the_rows_say_is_shown_for_any_part(capsys):
    compare.show(compare.read_rows())
    assert "tuned" in capsys.readouterr().out
    compare.show(frontier()[lambda rows: rows.method == "V2"])
    assert "frontier: gold" in capsys.readouterr().out
