"""The comparison's bookkeeping; what its runs are made of is tested with the relatives."""

import functools
import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import compare
import pictures
import matplotlib.pyplot as plt
import numpy
import pandas
import pytest
import torch

import p3o
from data import judge


def row(**changes) -> dict:
    trial = compare.Trial("tuning", "V2", 100, 0.1, 1e-3, 0.2)._asdict()
    figures = dict(score=1.0, gold=5.0, kl=2.0, win_rate=0.9, finished=1.0)
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
    found = compare.read_rows().to_dict("records")
    assert len(found) == 2
    assert compare.key_of(found[0]) == compare.key_of(trial._asdict())


class Here(ThreadPoolExecutor):
    """As the pool of processes, but in this one."""

    def __init__(self, workers, context):
        super().__init__(1)


def test_a_stopped_comparison_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    """The tuning comes first, since the rest is made of it; then seed after seed."""
    monkeypatch.setattr(compare, "ROWS", tmp_path / "rows.csv")
    monkeypatch.setattr(compare, "ProcessPoolExecutor", Here)
    models = set()
    monkeypatch.setattr(compare, "pipeline", models.add)
    monkeypatch.setattr(compare, "made", models.__contains__)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    ran = []

    def run(trial):
        if len(ran) == 170:
            raise KeyboardInterrupt
        ran.append(trial)
        return row(**trial._asdict())

    monkeypatch.setattr(compare, "run", run)
    with pytest.raises(KeyboardInterrupt):
        compare.run_all(("frontier", "tuning"), (0, 1))
    assert {trial.part for trial in ran[:160]} == {"tuning"}
    written = len(compare.read_rows())
    assert written >= 160
    ran.clear()
    compare.run_all(("frontier", "tuning"), (0, 1))
    total = 160 + 2 * len(compare.METHODS) * len(compare.BETAS)
    assert len(ran) == total - written
    rows = compare.read_rows().to_dict("records")
    assert len({compare.key_of(row) for row in rows}) == len(rows) == total
    ran.clear()
    compare.run_all(("frontier", "tuning"), (0, 1))
    assert ran == []
    assert models == {0, 1, *compare.TUNING_SEEDS}
    before = compare.ROWS.read_bytes()
    models -= {1, *compare.TUNING_SEEDS}
    with pytest.raises(SystemExit, match=r"rows of seeds \[1\], .* not their models; choose other"):
        compare.run_all(("tuning", "rate"), (0, 1, 2))
    with pytest.raises(SystemExit, match=r"seeds \[100, 101\]"):
        compare.run_all(("joint tuning",), (0,))
    assert compare.ROWS.read_bytes() == before
    assert models == {0}
    compare.run_all(("tuning", "as tuned"), (0, 2))
    assert models == {0, 2}, "a finished tuning's models are not needed again"
    assert {(trial.part, trial.seed) for trial in ran} == {("as tuned", 2)}


def test_a_pipeline_that_was_stopped_is_not_made(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "PIPELINES", tmp_path)
    (tmp_path / "3" / "reward").mkdir(parents=True)
    assert not compare.made(3)
    (tmp_path / "3" / "summary.json").touch()
    assert compare.made(3)


def test_a_seed_with_a_frontier_has_its_run_as_tuned_in_it():
    rows = [*ROWS_OF_THE_TUNING, row(part="frontier", method="V1", seed=6)]
    found = compare.trials("as tuned", pandas.DataFrame(rows), (5, 6))
    online = [method for method in compare.METHODS if method != "DPO"]
    expected = {(method, seed) for method in online for seed in (5, 6)} - {("V1", 6)}
    assert {(trial.method, trial.seed) for trial in found} == expected
    assert len(found) == len(expected)
    assert {(trial.beta, trial.epochs, trial.iterations) for trial in found} == {(0.1, 2, 80)}
    assert found[0].lr == 1e-3


@pytest.mark.parametrize("middle", ["frontier", "as tuned"])
def test_a_change_is_against_the_run_as_tuned_of_the_same_seed(middle):
    rows = [row(part=middle, seed=5, score=1.0), row(part="staleness", seed=5, score=0.25)]
    rows[1]["epochs"] = 8
    rows.append(row(part="as tuned", seed=5, score=1.0))  # once more: counts once
    found = pandas.DataFrame(rows)
    assert compare.change(found, "staleness", "epochs", 8) == {"V2": [-0.75]}
    assert sorted(compare.part_of(found, "staleness").reached) == [-0.75, 0.0]


def test_an_interval_is_students_over_seeds():
    mean, half = compare.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.78 * 1.5811 / 5**0.5, rel=1e-3)


ROWS_OF_THE_TUNING = [row(method=method) for method in compare.METHODS]


def trials_of(part: str) -> list:
    return compare.trials(part, pandas.DataFrame(ROWS_OF_THE_TUNING), (5, 6))


def test_each_part_changes_one_thing_and_makes_as_many_updates():
    tuned = dict(beta=compare.BETA, lr=1e-3, knob=0.2, epochs=2, iterations=80, offset=0.0)
    changed = {"frontier": "beta", "rate": "lr", "staleness": "epochs", "offset": "offset"}
    for part, name in changed.items():
        for trial in trials_of(part):
            fields = trial._asdict()
            different = {key for key, value in tuned.items() if fields[key] != value}
            assert different <= {name, "iterations"}
            assert trial.epochs * trial.iterations == 160
    assert {t.lr for t in trials_of("rate")} == {1e-3 * factor for factor in compare.RATES}
    assert {t.seed for t in trials_of("rate")} == {5, 6}
    assert {(t.epochs, t.iterations, t.lr) for t in trials_of("staleness, one rate")} == {
        (16, 10, 1e-3)
    }
    assert {(t.iterations, t.beta, t.lr) for t in trials_of("gaming")} == {(240, 0.025, 1e-3)}
    offsets = {t.method: set() for t in trials_of("offset")}
    for trial in trials_of("offset"):
        offsets[trial.method].add(trial.offset)
    assert offsets["PPO"] == {1, 3, 10}
    assert offsets["V2"] == {10}
    assert "DPO" not in offsets, "it sees no score"


def test_few_preferences_are_shared_out_alike_at_each_ways_own_beta_and_weight():
    tuning = compare.trials("joint tuning", pandas.DataFrame(), ())
    assert len(set(tuning)) == len(tuning) == 2 * (4 + 4 + 12 + 12)
    assert {(trial.knob, trial.lr) for trial in tuning} == {(0.1, 2e-3)}
    best = dict(zip(compare.JOINT, ((0.05, 1), (0.1, 1), (0.2, 0.1), (0.4, 0.01)), strict=True))
    rows = []
    for trial in tuning:
        wins = (trial.beta, trial.weight) == best[trial.method]
        rows.append(row(**trial._asdict(), gold=6.0 if wins else 5.0))
        rows.append(row(**trial._replace(part="joint", beta=0.4)._asdict(), gold=9.0))
    trials = compare.trials("joint", pandas.DataFrame(rows), (5,))
    for method in compare.JOINT:
        mine = [trial for trial in trials if trial.method == method]
        assert [trial.knob for trial in mine] == list(compare.SHARES)
        assert {(trial.beta, trial.weight) for trial in mine} == {best[method]}


@pytest.mark.parametrize("method", compare.LOSSES)
def test_each_method_trains_with_its_own_loss_clip_and_offset(method, monkeypatch):
    calls = []
    monkeypatch.setattr(p3o, "train_policy", lambda *args, **options: calls.append((args, options)))
    monkeypatch.setattr(p3o, "reward_scores", lambda model, ids, mask: torch.zeros(mask.shape[:-1]))
    trial = compare.Trial("offset", method, 5, 0.3, 1e-3, 0.7, epochs=4, iterations=40, offset=3.0)
    compare.train(trial, "policy", "sft", "reward", [SimpleNamespace(prompt=[7])], "log")
    ((policy, reference, score, prompts, cfg, log), options) = calls[0]
    assert (policy, reference, prompts, log) == ("policy", "sft", [[7]], "log")
    loss = options["loss_fn"]
    if method == "REBEL":
        assert loss.keywords == {"eta": 0.7}
        loss = loss.func
    assert loss is compare.LOSSES[method]
    assert cfg.clip == ("separate" if method == "V1" else "joint")
    assert cfg.clip_range == (0.2 if method in ("online DPO", "REBEL") else 0.7)
    assert cfg.beta == (0.6 if method == "GRPO" else 0.3)
    assert (cfg.lr, cfg.inner_epochs, cfg.iterations, cfg.seed) == (1e-3, 4, 40, 5)
    ids = torch.tensor([[5, 6, 7, 8]])
    inside = torch.tensor([[False, False, True, True]])
    assert torch.equal(score(ids, inside), compare.offset_of(ids, inside, 3.0))


def test_ppo_and_dpo_have_loops_of_their_own(monkeypatch):
    calls = []
    for name in ("train_ppo", "train_dpo"):
        spy = functools.partial(lambda *args, **options: calls.append((args, options)), name)
        monkeypatch.setattr(compare.relatives, name, spy)
    reward_model = torch.nn.Linear(2, 1)
    examples = [SimpleNamespace(prompt=[7])]
    for method in ("PPO", "DPO"):
        trial = compare.Trial("tuning", method, 5, 0.3, 1e-3, 0.7)
        compare.train(trial, "policy", "sft", reward_model, examples, "log")
    (ppo, ppo_options), (dpo, dpo_options) = calls
    assert ppo[:3] == ("train_ppo", "policy", "sft")
    assert (ppo[4], ppo[5].beta, ppo[5].lr, ppo[6]) == ([[7]], 0.3, 1e-3, "log")
    assert ppo[7] is not reward_model, "the critic is trained, the reward model is not"
    assert torch.equal(ppo[7].weight, reward_model.weight)
    assert ppo_options == {"gae_lambda": 0.7}
    assert dpo[:4] == ("train_dpo", "policy", "sft", examples)
    assert (dpo[4].beta, dpo[4].lr, dpo[5], dpo_options) == (0.3, 1e-3, "log", {})


def test_the_offset_is_the_prompts_and_has_the_spread_asked_for():
    torch.manual_seed(0)
    ids = torch.randint(600, (4000, 2, 12))
    ids[:, 1, :6] = ids[:, 0, :6]  # a pair has one prompt
    inside = (torch.arange(12) >= 6).expand_as(ids)
    offsets = compare.offset_of(ids, inside, 3.0)  # (4000, 2)
    assert torch.equal(offsets[:, 0], offsets[:, 1])
    assert offsets[:, 0].std() == pytest.approx(3.0, rel=0.05)
    assert abs(offsets.mean()) < 0.2


def test_the_pipeline_sees_its_share_of_the_preferences_and_aihf_all_demonstrations(monkeypatch):
    seen, policies = [], []

    def train_reward(model, preferences, cfg, log):
        seen.append((len(preferences), cfg.epochs))

    def train_jointly(policy, sft, reward, demonstrations, preferences, cfg, log, **options):
        seen.append((len(demonstrations), len(preferences), options))
        policies.append((policy, sft, cfg.beta, cfg.lr, cfg.iterations))

    def train_policy(policy, sft, score, prompts, cfg, log):
        assert len(prompts) == 400, "prompts are not scarce"
        policies.append((policy, sft, cfg.beta, cfg.lr, cfg.iterations))

    model = SimpleNamespace(score=torch.nn.Linear(2, 1, bias=False))
    monkeypatch.setattr(p3o, "load", lambda *_, **__: model)
    monkeypatch.setattr(p3o, "train_reward", train_reward)
    gains = []
    monkeypatch.setattr(p3o, "set_gain", lambda *args: gains.append((args[1], len(args[2]))))
    monkeypatch.setattr(p3o, "train_policy", train_policy)
    monkeypatch.setattr(compare.relatives, "train_jointly", train_jointly)
    examples = [SimpleNamespace(prompt=[i]) for i in range(400)]
    for method in compare.JOINT:
        trial = compare.Trial("joint", method, 5, 0.7, 3e-3, 0.1, weight=0.3)
        compare.train_on_few(trial, "policy", "sft", compare.PIPELINES, examples, "log")
    # 80 iterations of two passes over 64 pairs, 32 an update, are 320 updates of 32 rows
    exact = dict(exact=True, demo_weight=0.3)
    logistic = dict(exact=False, demo_weight=0.3)
    assert seen == [(40, 2), (40, 256), (400, 40, exact), (400, 40, logistic)]
    assert policies == [("policy", "sft", 0.7, 3e-3, 80)] * 4
    assert gains == [("sft", p3o.GAIN_PROMPTS)] * 2
    assert not model.score.weight.any(), "AIHF's reward starts at 0"


def frontier() -> pandas.DataFrame:
    """V2 reaches gold = log KL, PPO one less; of three answers V2 wins two."""
    rows = []
    for seed in (0, 1):
        for beta, kl in ((0.2, 1.0), (0.1, 2.0), (0.05, 4.0)):
            base = dict(part="frontier", seed=seed, beta=beta)
            rows.append(row(**base, kl=kl, gold=math.log(kl), points="nnn"))
            ppo = dict(kl=1.2 * kl, gold=math.log(1.2 * kl) - 1, points="mnm")
            rows.append(row(**base, **ppo, method="PPO"))
    return pandas.DataFrame(rows[::-1])


def test_methods_are_compared_at_the_same_kl():
    gaps = compare.frontier_gaps(frontier(), 3.0)
    assert gaps["PPO"] == pytest.approx([-1, -1])
    assert gaps["V2"] == [0, 0]
    assert compare.frontier_gaps(frontier(), 4.5) == {}, "V2 did not get so far"


def test_head_to_head_is_on_the_same_prompts_at_the_nearest_kl_and_a_tie_is_half():
    rows = frontier()
    rows.loc[rows.beta != 0.1, "points"] = "aaa"
    wins = compare.head_to_head(rows, 2.1)
    assert wins["V2", "PPO"] == pytest.approx([5 / 6, 5 / 6])  # two wins and a tie
    assert wins["PPO", "V2"] == pytest.approx([1 / 6, 1 / 6])
    assert wins["V2", "V2"] == [0.5, 0.5]
    rows = frontier()
    rows.loc[(rows.method == "PPO") & (rows.beta == 0.05), "points"] = "mmm"
    wins = compare.head_to_head(rows, 3.4)  # by its logarithm nearer to 4.8 than to 2.4
    assert wins["V2", "PPO"] == [1, 1]


@pytest.fixture
def few(tiny, finished, out, monkeypatch):
    """The comparison on a pipeline of a second's training, and few prompts."""
    monkeypatch.setattr(compare, "pipeline", lambda seed: out)
    monkeypatch.setattr(p3o, "load_pairs", lambda *_: (tiny[4][:80], tiny[4][80:120]))
    monkeypatch.setattr(compare, "EVALUATED", 12)
    compare.start_of.cache_clear()
    yield
    compare.start_of.cache_clear()


def test_a_run_is_judged_against_its_own_sft_model(few):
    """A policy that was not trained is the SFT model, and says the same."""
    trial = compare.Trial("frontier", "V2", 5, 0.1, 0.0, 0.2, iterations=1)
    found = compare.run(trial)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["win_rate"] == 0.5
    tokenizer, _, heldout, sft, *_ = compare.start_of(5)
    torch.manual_seed(0)
    prompts = [example.prompt for example in heldout]
    ids, mask = p3o.sample(sft, prompts, 1, p3o.SMALL["response_tokens"])
    said = []
    for example, row_of, inside in zip(heldout, ids[:, 0], mask[:, 0], strict=True):
        answer = tokenizer.decode(row_of[inside], skip_special_tokens=True)
        said.append(judge.gold_reward(example.text.prompt, answer))
    assert found["gold"] == pytest.approx(statistics.mean(said), abs=1e-4)
    golds = [1.5 * (ord(letter) - ord("m")) for letter in found["points"]]
    assert len(golds) == 12
    assert statistics.mean(golds) == pytest.approx(found["gold"], abs=1e-3)
    assert {key: found[key] for key in trial._fields} == trial._asdict()
    assert found["curve"] == ""


def test_a_long_runs_course_and_its_end_are_of_the_trained_policy(few, monkeypatch):
    monkeypatch.setattr(compare, "WATCHED_EVERY", 1)
    found = compare.run(compare.Trial("gaming", "V2", 5, 0.0, 5e-3, 0.2, iterations=2))
    first, *_, kl, score, gold = map(float, found["curve"].split())
    assert kl != first > 0
    assert (kl, score, gold) == pytest.approx(
        (found["kl"], found["score"], found["gold"]), abs=2e-3
    )
    assert found["points"] == ""
    again = compare.run(compare.Trial("frontier", "V2", 5, 0.0, 5e-3, 0.2, iterations=2))
    assert again["kl"] == found["kl"], "watching it changes no sample"


def test_a_run_draws_by_its_seed(few, monkeypatch):
    drawn = []
    monkeypatch.setattr(compare, "train", lambda *_: drawn.append(torch.initial_seed()))
    compare.run(compare.Trial("rate", "V2", 5, 0.1, 1e-3, 0.2))
    assert drawn == [5]


def test_a_run_that_diverges_is_judged_as_it_ended(few, monkeypatch):
    def diverge(*_, **__):
        raise FloatingPointError("NaN")

    monkeypatch.setattr(p3o, "train_policy", diverge)
    assert compare.run(compare.Trial("rate", "V2", 5, 0.1, 9.0, 0.2))["win_rate"] == 0.5


def all_parts() -> pandas.DataFrame:
    """Rows of each part, three seeds; each method's rate is tuned to 1e-3."""
    rows = list(ROWS_OF_THE_TUNING)
    changes = [dict(part="frontier", beta=beta, kl=0.2 / beta) for beta in compare.BETAS]
    changes += [dict(part="rate", lr=1e-3 * factor) for factor in compare.RATES]
    changes += [dict(part="staleness", epochs=epochs) for epochs in compare.EPOCHS]
    changes += [dict(part="offset", offset=offset) for offset in compare.OFFSETS]
    for seed in range(3):
        gaming = dict(part="gaming", curve=f"1.0 0.5 4.0 2.0 1.0 5.0 9.0 2.0 {3 + seed}")
        for method in compare.METHODS:
            mine = changes[: len(compare.BETAS)] if method == "DPO" else [*changes, gaming]
            for change in mine:
                score = 1 + 0.1 * seed - (change["part"] == "offset")
                rows.append(row(method=method, seed=seed, points="mnm", score=score, **change))
        for method in compare.JOINT:
            for share in compare.SHARES:
                rows.append(row(part="joint", method=method, seed=seed, knob=share))
    return pandas.DataFrame(rows)


def test_the_scores_zero_is_the_online_methods_mean_of_each_seed():
    rows = all_parts()
    rows.loc[rows.method == "V1", "score"] += 0.7
    found = compare.part_of(rows, "offset")
    base = found[found.part == "frontier"].groupby(["seed", "method"])[["score", "reached"]].mean()
    assert base.unstack("seed").loc["V1"].tolist() == pytest.approx([0.6] * 6)
    assert base.unstack("seed").loc["PPO"].tolist() == pytest.approx([-0.1] * 6)
    assert set(compare.part_of(rows, "joint").method) == set(compare.JOINT)
    rows = rows[(rows.part != "offset") | (rows.seed == 1)]
    assert set(compare.part_of(rows, "offset").seed) == {1}, "no line joins other seeds"


def test_whatever_the_files_order_values_come_in_the_seeds():
    rows = all_parts()
    rows.loc[rows.part == "rate", "score"] += rows.seed
    rows = rows.iloc[::-1]
    assert compare.course(rows, "V2")[:, -1, 2].tolist() == [3, 4, 5]
    assert compare.change(rows, "rate", "lr", 8e-3)["V2"] == pytest.approx([0, 1, 2])


def test_a_change_is_measured_from_the_tuned_run_of_the_same_seed():
    found = compare.change(all_parts(), "offset", "offset", 10.0)
    assert found["PPO"] == pytest.approx([-1, -1, -1])
    assert compare.change(all_parts(), "rate", "lr", 8e-3)["V2"] == pytest.approx([0, 0, 0])


def test_the_table_has_each_difference_with_its_interval():
    *_, ppo, dpo = compare.summary(all_parts()).splitlines()
    assert ppo == "| PPO |  |  |  |  | -1.00 ± 0.00 |", "what is 0 in every seed is left out"
    assert dpo == "| DPO |  |  |  |  |  |"
    rows = all_parts()
    rows.loc[(rows.part == "offset") & (rows.seed == 0), "score"] += 1
    assert "| PPO |  |  |  |  | -0.67 ± 1.43 |" in compare.summary(rows), "one seed alone is 0"
    lines = compare.summary(frontier()).splitlines()
    assert lines[-2].startswith("| PPO | -1.00 ± 0.00 |")


def test_the_pictures_show_each_method_with_its_values():
    rows = all_parts()
    figure = pictures.frontier(rows)
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert set(lines) >= set(compare.METHODS)
    assert list(lines["V2"].get_xdata()) == pytest.approx([0.5, 1, 2, 4]), "8 nats are too many"
    dots = figure.axes[0].get_lines()[0]
    assert len(dots.get_xdata()) == 3 * len(compare.BETAS)
    plt.close(figure)
    far = rows.copy()
    far.loc[(far.part == "frontier") & (far.beta == 0.025), "gold"] = -50.0
    figure = pictures.frontier(far)
    crosses = [line for line in figure.axes[1].get_lines() if line.get_marker() == "x"]
    assert [len(line.get_xdata()) for line in crosses] == [3] * len(compare.METHODS)
    assert crosses[0].get_ydata().min() > figure.axes[1].get_ylim()[0], "within the picture"
    plt.close(figure)
    figure = pictures.sensitivity(rows)
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert set(lines) == set(compare.METHODS) - {"DPO"}
    plt.close(figure)
    xs = list(lines["V2"].get_xdata())
    assert xs == pytest.approx([1e-3 * factor for factor in (0.25, 1, 2, 4, 8)])
    figure = pictures.head_to_head(rows)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert len(texts) == len(compare.METHODS) ** 2
    assert "0.50\n±0.00" in texts
    plt.close(figure)
    figure = pictures.gaming(rows)
    assert [axis.get_title("left") for axis in figure.axes] == ["seed 0", "seed 1", "seed 2"]
    line = figure.axes[0].get_lines()[0]
    assert numpy.allclose(line.get_xydata(), [[0.5, 4], [1, 5], [2, 3]])
    assert len(figure.axes[2].get_lines()) == 2 * (len(compare.METHODS) - 1)
    assert numpy.allclose(figure.axes[2].get_lines()[0].get_ydata(), [4, 5, 5])
    plt.close(figure)
    figure = pictures.joint(rows)
    line, dots, *others = figure.axes[0].get_lines()
    assert list(line.get_xdata()) == list(compare.SHARES)
    assert len(dots.get_xdata()) == 3 * len(compare.SHARES)
    assert len(others) == 2 * (len(compare.JOINT) - 1)
    plt.close(figure)


def test_what_the_rows_say_is_shown_for_any_part(capsys):
    compare.show(compare.read_rows())
    assert "tuned" in capsys.readouterr().out
    compare.show(all_parts())
    printed = capsys.readouterr().out
    for title in ("frontier: gold", "rate:", "staleness:", "offset:", "long run", "preferences"):
        assert title in printed


def test_two_seeds_make_a_point_and_no_band():
    figure, axis = plt.subplots()
    pictures.line(axis, "V2", [1, 2, 4], [[0.0, 1.0, 2.0], [0.0, 9.0], [1.0, 2.0, 3.0]])
    assert list(axis.get_lines()[0].get_ydata()) == [1.0, 4.5, 2.0]
    (band,) = axis.collections
    assert set(band.get_paths()[0].vertices[:, 0]) == {1, 4}
    plt.close(figure)
