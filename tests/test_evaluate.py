"""Tests of evaluate.py. diamond_seeds.json is results/data/DIAMOND.json of eloialonso/diamond (MIT), five seeds a game;
IRIS is results/data/IRIS.json of eloialonso/iris."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import evaluate as ev

SEEDS_FILE = Path(__file__).parent / "diamond_seeds.json"
SEEDS = json.loads(SEEDS_FILE.read_text())
GAMES = list(ev.SCORES)
IRIS = {
    "Alien": [368.7, 452.5, 437.2, 331.7, 510], "Amidar": [196.0, 126, 164.9, 162.9, 65.1],
    "Assault": [1481.3, 928.1, 1121.8, 1556.0, 2534.8], "Asterix": [762.5, 1114, 1082, 716.5, 593],
    "BankHeist": [42.2, 48.8, 68.4, 46.4, 59.6], "BattleZone": [16990, 14570, 11300, 10070, 12440],
    "Boxing": [86.2, 49.3, 55.8, 83.5, 75.5], "Breakout": [104.6, 85.6, 69.7, 70.3, 88.1],
    "ChopperCommand": [1150, 1276, 1659, 2162, 1578], "CrazyClimber": [64101, 66127, 62740, 77066, 26587],
    "DemonAttack": [905, 2011.9, 2888.5, 2613.4, 1753], "Freeway": [30.9, 31.5, 30.5, 30.8, 31.6],
    "Frostbite": [274.3, 250.0, 295, 250, 226.3], "Gopher": [2987.2, 2476.8, 3110.4, 1171.4, 1434.8],
    "Hero": [6916.2, 6933.9, 6740.6, 7881.6, 6714.7], "Jamesbond": [487.5, 394, 486, 464, 482],
    "Kangaroo": [2249, 732, 750, 90, 370], "Krull": [6047.4, 7364.8, 4980.6, 6006.3, 8683],
    "KungFuMaster": [7301, 15949, 34406, 14372, 36771], "MsPacman": [1251.6, 941.5, 590.3, 770.8, 1441.1],
    "Pong": [19.3, 18.5, 16.6, 6.2, 12.4], "PrivateEye": [100, 100, 100, 100, 100],
    "Qbert": [853, 575, 790.2, 1027.2, 483.2], "RoadRunner": [11355, 2033, 17106, 7614, 9965],
    "Seaquest": [752.2, 855.8, 691, 386, 621.6], "UpNDown": [3793, 5367.5, 2943.7, 3637.9, 1988.9],
}  # fmt: skip


def at_hns(hns):
    """Scores {game: [..]} of the given HNS {game: [..]}."""
    return {g: [ev.SCORES[g][0] + h * (ev.SCORES[g][1] - ev.SCORES[g][0]) for h in values] for g, values in hns.items()}


def values(scores):
    """The aggregates without intervals, None where undefined."""
    hns, index = ev.flatten(scores, GAMES)
    agent = np.array([game in ev.HALVES["Agent-Optimal"] for game in GAMES])
    found = ev.aggregate(hns, index, agent, 1 / (26 * np.bincount(index)[index])[None])
    return {key: value[0] if np.isfinite(value[0]) else None for key, value in found.items()}


def published(name):
    return {game: [row[2 + list(ev.PUBLISHED).index(name)]] for game, row in ev.SCORES.items()}


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(ev, "RESAMPLES", 300)


def run(*arguments):
    """The command line in this process: exit code, or 0."""
    return ev.main([str(a) for a in arguments]) or 0


def failure(capsys, *arguments):
    """Runs a command that must fail as the user should see it: code 2, nothing printed, one line `error: ...`."""
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


# ---------------------------------------------------------------- golden facts
def test_diamond_seeds_give_the_published_aggregates_and_intervals():
    summary = ev.summarise(SEEDS, GAMES)
    golden = {"mean": (1.459, 1.356, 1.567), "iqm": (0.641, 0.578, 0.708), "optimality_gap": (0.480, 0.465, 0.496)}
    golden["median"] = (0.373, 0.309, 0.490)
    for key, (value, low, high) in golden.items():
        assert summary[key][0] == pytest.approx(value, abs=5e-4)
        assert summary[key][1:] == pytest.approx([low, high], abs=0.01)
    assert summary["superhuman"][0] == 11


def test_diamond_means_give_the_published_halves():
    found = values(published("DIAMOND"))
    assert found["agent_optimal"] == pytest.approx(2.791, abs=5e-4)
    assert found["human_optimal"] == pytest.approx(0.127, abs=5e-4)
    assert found["asymmetry"] == pytest.approx(21.98, abs=0.05)  # 21.98 is the ratio of the two rounded halves
    assert found["harmonic_hns"] == pytest.approx(0.319, abs=5e-4)
    ao, ho = found["agent_optimal"], found["human_optimal"]
    assert found["sym_hns"] == pytest.approx(2 / (1 / ao + 1 / ho))


# STORM prints 1.266, which its rounded means give as 1.267
PRINTED = [("SimPLe", 0.332, 1), ("TWM", 0.956, 8), ("IRIS", 1.046, 10), ("STORM", 1.267, 10)]


@pytest.mark.parametrize("name, mean, superhuman", PRINTED)
def test_published_means(name, mean, superhuman):
    found = values(published(name))
    assert found["mean"] == pytest.approx(mean, abs=5e-4) and found["superhuman"] == superhuman


def test_table_is_the_one_of_the_seeds_and_of_the_definition():
    assert len(GAMES) == 26 and all(len(row) == 1 + len(ev.PUBLISHED) for row in ev.SCORES.values())
    for game in GAMES:
        assert np.mean(SEEDS[game]) == pytest.approx(published("DIAMOND")[game][0], abs=0.06)
    judges = [{g: ev.flatten(published(name), [g])[0][0] for g in GAMES} for name in ("IRIS", "TWM", "DreamerV3", "STORM")]
    ranked = sorted(GAMES, key=lambda g: -sum(judge[g] for judge in judges))
    assert set(ranked[:13]) == set(ev.HALVES["Agent-Optimal"]) and set(ranked[13:]) == set(ev.HALVES["Human-Optimal"])


def test_iqm_is_over_runs_not_over_game_means():
    means = {game: [float(np.mean(seeds))] for game, seeds in SEEDS.items()}
    assert values(means)["iqm"] == pytest.approx(0.757, abs=1e-3)  # the classic mistake
    assert values(SEEDS)["iqm"] == pytest.approx(0.641, abs=1e-3)


# ---------------------------------------------------------------- independent formulas and properties
def matrix_aggregates(x):
    """rliable's definitions on HNS [G, seeds], written without weights."""
    means, flat = x.mean(1), np.sort(x.ravel())
    cut = len(flat) // 4
    return means.mean(), np.median(means), flat[cut : len(flat) - cut].mean(), 1 - np.minimum(x, 1).mean(), (means >= 1).sum()


def random_scores(rng, seeds=5, low=-0.05):
    return at_hns({g: list(rng.exponential(0.8, seeds) + low) for g in GAMES})


def test_weights_equal_the_matrix_formulas():
    rng = np.random.default_rng(0)
    for seeds in (1, 2, 5):
        scores = random_scores(rng, seeds)
        x = np.stack([ev.flatten(scores, [g])[0] for g in GAMES])
        found = values(scores)
        for key, expected in zip(("mean", "median", "iqm", "optimality_gap", "superhuman"), matrix_aggregates(x)):
            assert found[key] == pytest.approx(expected)


def test_every_resample_equals_the_matrix_formulas():
    hns, index = ev.flatten(SEEDS, GAMES)
    agent = np.array([g in ev.HALVES["Agent-Optimal"] for g in GAMES])
    [counts] = ev.bootstrap_counts(index, 20, seed=3)
    assert (np.stack([counts[:, index == g].sum(1) for g in range(26)]) == 5).all()
    found = ev.aggregate(hns, index, agent, counts / 130)
    assert list(found) == list(ev.AGGREGATES)
    for i, count in enumerate(counts):
        x = np.stack([np.repeat(hns[index == g], count[index == g]) for g in range(26)])
        for key, expected in zip(("mean", "median", "iqm", "optimality_gap", "superhuman"), matrix_aggregates(x)):
            assert found[key][i] == pytest.approx(expected)
        assert found["agent_optimal"][i] == pytest.approx(x[agent].mean())
        assert found["human_optimal"][i] == pytest.approx(x[~agent].mean())


def test_order_of_seeds_and_games_changes_nothing(few_resamples):
    shuffled = {game: SEEDS[game][::-1] for game in reversed(GAMES)}
    assert ev.summarise(shuffled, GAMES) == ev.summarise(SEEDS, GAMES)


def test_human_is_one_and_random_is_zero(few_resamples):
    human, random = (ev.summarise(at_hns({g: [h, h] for g in GAMES}), GAMES) for h in (1.0, 0.0))
    for key in ("mean", "median", "iqm", "human_optimal", "agent_optimal", "sym_hns"):
        assert human[key] == pytest.approx([1, 1, 1]) and random[key] == pytest.approx([0, 0, 0], abs=1e-12)
    assert human["optimality_gap"][0] == pytest.approx(0) and random["optimality_gap"][0] == pytest.approx(1)
    assert human["superhuman"][0] == 26 and random["superhuman"][0] == 0
    assert human["asymmetry"][0] == pytest.approx(1) and random["asymmetry"] == [None] * 3
    assert human["harmonic_hns"][0] == pytest.approx(1.1) and random["harmonic_hns"][0] == pytest.approx(0.1)


def test_scaling_one_half_leaves_the_other_alone():
    scaled = {g: ev.flatten(SEEDS, [g])[0] * (3 if g in ev.HALVES["Agent-Optimal"] else 1) for g in GAMES}
    before, after = values(SEEDS), values(at_hns(scaled))
    assert after["agent_optimal"] == pytest.approx(3 * before["agent_optimal"])
    assert after["human_optimal"] == pytest.approx(before["human_optimal"])


def test_sym_hns_lies_between_the_halves_and_never_above_the_mean():
    rng = np.random.default_rng(1)
    for low in (0.0, -0.3, -0.9, -2.0):
        for _ in range(25):
            found = values(random_scores(rng, 1, low))
            ends = sorted((found["agent_optimal"], found["human_optimal"]))
            assert ends[0] - 1e-12 <= found["sym_hns"] <= min(ends[1], found["mean"]) + 1e-12


@pytest.mark.parametrize("ho, ao, sym", [(0.0, 2.0, 0.0), (-0.1, 2.0, -0.1), (-0.2, -0.1, -0.2), (1e-9, 2.0, 0.0)])
def test_a_half_at_or_below_random_decides_sym_hns(ho, ao, sym):
    found = values(at_hns({g: [ao if g in ev.HALVES["Agent-Optimal"] else ho] for g in GAMES}))
    assert found["sym_hns"] == pytest.approx(sym, abs=1e-8)
    assert (found["asymmetry"] is None) == (ho <= 0)
    assert (found["harmonic_hns"] is None) == (ho <= -0.1)


# ---------------------------------------------------------------- bootstrap
def test_bootstrap_of_coin_flips_is_binomial():
    """Two seeds, 0 and 1, in each of 26 games: a resampled mean is Binomial(52, 1/2) / 52."""
    scores = at_hns({g: [0.0, 1.0] for g in GAMES})
    cdf = np.cumsum([math.comb(52, k) / 2**52 for k in range(53)])
    low, high = (int(np.searchsorted(cdf, q)) for q in (0.025, 0.975))
    assert ev.summarise(scores, GAMES)["mean"] == pytest.approx([0.5, low / 52, high / 52])
    _, index = ev.flatten(scores, GAMES)
    ones = np.concatenate([c[:, 26:].sum(1) for c in ev.bootstrap_counts(index, 50_000, seed=0)])  # the 26 zeros come first
    assert len(ones) == 50_000
    observed = np.cumsum(np.bincount(ones.astype(int), minlength=53)) / 50_000
    assert np.abs(observed - cdf).max() < 0.01  # Kolmogorov-Smirnov distance; 0.0087 is its 0.1 % point


def test_seed_decides_the_interval(few_resamples):
    assert ev.summarise(SEEDS, GAMES, seed=1) == ev.summarise(SEEDS, GAMES, seed=1) != ev.summarise(SEEDS, GAMES, seed=2)


def test_single_seeds_have_no_interval(few_resamples):
    assert all(row[1:] == [None, None] for row in ev.summarise(published("IRIS"), GAMES).values())
    mixed = SEEDS | {"Alien": [500.0]}
    assert ev.summarise(mixed, GAMES)["mean"][1:] == [None, None]


def test_ragged_seeds_are_weighted_not_cut(few_resamples):
    """A game's seeds share its weight: giving every run of a game twice changes no aggregate, here or on a rectangle."""
    doubled = {g: s * 2 if i % 2 else s for i, (g, s) in enumerate(SEEDS.items())}
    before, after = values(SEEDS), values(doubled)
    for key in set(before) - {"iqm"}:
        assert after[key] == pytest.approx(before[key])
    assert after["iqm"] == pytest.approx(before["iqm"], abs=0.01)  # the cut is floor(N / 4) / N of the weight, and N differs
    constant = {g: [2.0] * (1 + i % 4) for i, g in enumerate(GAMES)}
    assert values(at_hns(constant))["iqm"] == pytest.approx(2)


def test_memory_is_bounded_for_many_seeds():
    index = np.repeat(np.arange(26), 100)
    assert max(counts.size for counts in ev.bootstrap_counts(index, 1000, seed=0)) <= 2**18


# ---------------------------------------------------------------- two methods
# rliable 1.2.0 on DIAMOND[:n] against IRIS: get_interval_estimates with 20,000 (aggregates) and 1,000 (better) resamples
RLIABLE = {
    5: {"mean": (0.4131, 0.2831, 0.5482), "median": (0.0846, -0.0599, 0.1989), "iqm": (0.1396, 0.0511, 0.2281),
        "optimality_gap": (-0.0315, -0.0578, -0.0057), "better": (0.6662, 0.6177, 0.7116)},
    3: {"mean": (0.3693, 0.2508, 0.4889), "median": (0.1176, -0.0543, 0.2672), "iqm": (0.1613, 0.0714, 0.2513),
        "optimality_gap": (-0.0361, -0.0654, -0.0072), "better": (0.6859, 0.6282, 0.7436)},
}  # fmt: skip


@pytest.mark.parametrize("seeds", RLIABLE)
def test_comparison_agrees_with_rliable(seeds, monkeypatch):
    monkeypatch.setattr(ev, "RESAMPLES", 20_000)
    found = ev.summarise({game: SEEDS[game][:seeds] for game in GAMES}, GAMES, other=IRIS)
    for key, (value, low, high) in RLIABLE[seeds].items():
        assert found[key][0] == pytest.approx(value, abs=1e-4)
        assert found[key][1:] == pytest.approx([low, high], abs=0.012)


def test_comparison_has_its_closed_form():
    """One game, two seeds each: a resample of {x, x + d} has mean x or x + d with probability 1/4 each. So the lowest and the
    highest difference of two such means have probability 1/16, more than 2.5 %: they are the ends of the interval."""
    found = ev.summarise({"Catch": [1.0, 3.0]}, ["Catch"], other={"Catch": [0.0, 1.0]})
    assert found["mean"] == pytest.approx([1.5, 0.0, 3.0])
    assert found["better"] == pytest.approx([(1 + 1 + 1 + 0.5) / 4, 0.5, 1.0])
    mirrored = ev.summarise({"Catch": [0.0, 1.0]}, ["Catch"], other={"Catch": [1.0, 3.0]})
    assert mirrored["mean"][0] == -1.5 and mirrored["better"][0] == pytest.approx(1 - found["better"][0])


def test_a_method_against_itself(few_resamples):
    found = ev.summarise(SEEDS, GAMES, other=SEEDS)
    assert found.pop("better")[0] == pytest.approx(0.5)
    assert all(value == pytest.approx(0) and low < 0 < high for value, low, high in found.values())


def test_compare_command(tmp_path, capsys, few_resamples):
    files = []
    for name, scores in (("a", SEEDS | {"Catch": [9.0, 10.0]}), ("b", IRIS | {"Catch": [1.0, 2.0]})):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(scores))
    assert run(*files, "--compare", "a", "b") == 0
    rows = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in capsys.readouterr().out.splitlines()}
    difference = f"{np.mean(SEEDS['Alien']) - 420.02:.1f} ["
    assert rows["Catch"] == "8.0 [7.0, 9.0]" and rows["Alien"].startswith(difference)
    assert rows["iqm"].startswith("0.140 [") and rows["P(A > B)"].startswith("0.679 [")
    (single := tmp_path / "single.json").write_text(json.dumps({"Catch": [2.0]}))
    assert run(files[0], single, "--compare", "a", "single") == 0  # raw returns; one seed has no interval
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["Catch"][-1] == "7.5" and rows["P(A"][-1] == "1"


# ---------------------------------------------------------------- reading
@pytest.fixture
def scores_file(tmp_path):
    def write(content, name="ours.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def result(**changes):
    protocol = {"episodes": 3, "policy": "sampled", "temperature": 1.0, "noop_max": 30, "checkpoint": "last", "eval_seed": 5}
    content = {"env_id": "BreakoutNoFrameskip-v4", "game": "Breakout", "exp_name": "jedi", "seed": 1, "preset": "paper",
               "returns": [10.0, 20.0, 60.0], "lengths": [5, 6, 7], "protocol": protocol, "global_step": 100_000}  # fmt: skip
    return content | changes


@pytest.fixture
def run_dir(tmp_path):
    def write(name, content):  # None: a run without a result yet
        (tmp_path / name).mkdir()
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name / "result.json").write_text(text)
        return tmp_path / name

    return write


@pytest.mark.parametrize("name", ["MsPacman", "MsPacmanNoFrameskip-v4", "ALE/MsPacman-v5", "ms_pacman", "atari_ms_pacman"])
def test_names_of_games(name, scores_file):
    assert ev.read_file(scores_file({name: [1, 2.5]}))[1] == {"MsPacman": [1.0, 2.5]}


def test_every_game_is_known_under_every_name(scores_file):
    for game in GAMES:
        snake = "".join("_" + c.lower() if c.isupper() else c for c in game).lstrip("_")
        for name in (game, f"{game}NoFrameskip-v4", f"ALE/{game}-v5", snake):
            assert list(ev.read_file(scores_file({name: [1]}))[1]) == [game]


def test_runs_are_grouped_by_experiment(run_dir):
    a = run_dir("a", result())
    b = run_dir("b", result(seed=2, returns=[40.0]))
    c = run_dir("c", result(env_id="ALE/Pong-v5", returns=[-21.0]))
    d = run_dir("d", result(exp_name="fork"))
    methods = ev.read_methods([str(p) for p in (a, b, c, d)])
    assert {name: method["scores"] for name, method in methods.items()} == {
        "jedi": {"Breakout": [30.0, 40.0], "Pong": [-21.0]},
        "fork": {"Breakout": [30.0]},
    }
    assert list(ev.read_methods([str(a / "result.json")])) == ["jedi"]
    ours = ev.read_methods([f"OURS={path}" for path in (a, b, c)])
    assert list(ours) == ["OURS"] and ours["OURS"]["scores"] == methods["jedi"]["scores"]


def test_files_are_methods(scores_file):
    path = scores_file(SEEDS)
    assert list(ev.read_methods([str(path), f"OTHER={path}"])) == ["ours", "OTHER"]


BAD_FILES = {
    "not json": ("{Alien: 1}", "JSON"),
    "empty": ("", "JSON"),
    "deep": ("[" * 100_000, "JSON"),
    "list": ("[1, 2]", "expected"),
    "number": ("3", "expected"),
    "no games": ("{}", "expected"),
    "nested": (json.dumps(SEEDS | {"Alien": {"a": 1}}), "Alien"),
    "plain number": (json.dumps(SEEDS | {"Alien": 744.1}), "Alien"),
    "nan": (json.dumps(SEEDS | {"Alien": [1, math.nan]}), "NaN"),
    "inf": (json.dumps(SEEDS | {"Alien": [math.inf]}), "Infinity"),
    "huge": (json.dumps(SEEDS | {"Alien": [10**400]}), "Alien"),
    "string": (json.dumps(SEEDS | {"Alien": ["744"]}), '"744"'),
    "bool": (json.dumps(SEEDS | {"Alien": [True]}), "true"),
    "null": (json.dumps(SEEDS | {"Alien": None}), "null"),
    "no seeds": (json.dumps(SEEDS | {"Alien": []}), "Alien"),
    "two names": (json.dumps(SEEDS | {"ALE/Alien-v5": [1]}), "ALE/Alien-v5 must appear once"),
    "same name twice": (json.dumps(SEEDS)[:-1] + ', "Alien": [1]}', "Alien must appear once"),
}


@pytest.mark.parametrize("content, words", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_score_files(content, words, scores_file, capsys):
    message = failure(capsys, scores_file(content))
    assert "ours.json" in message and words in message


BAD_RESULTS = {
    "half-written": (json.dumps(result())[:80], "half-written"),
    "empty": ("", "half-written"),
    "not a result": ({"Alien": [1]}, "env_id"),
    "no protocol": (result(protocol="?"), "protocol"),
    "no returns": (result(returns=[]), "Breakout"),
    "nan": (result(returns=[math.nan]), "NaN"),
}


@pytest.mark.parametrize("content, words", BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_bad_results(content, words, run_dir, capsys):
    message = failure(capsys, run_dir("bad", content))
    assert "bad/result.json" in message and words in message


def test_other_refusals(run_dir, scores_file, tmp_path, capsys):
    assert "nothing to evaluate" in failure(capsys, tmp_path / "nowhere")
    assert run(tmp_path / "nowhere", "--baselines") == 0 and "note: no result.json in" in capsys.readouterr().err
    assert "nothing to evaluate" in failure(capsys)
    assert "nothing to evaluate" in failure(capsys, run_dir("unfinished", None))
    a, b = run_dir("a", result()), run_dir("b", result())
    assert "Breakout of this method and seed is in" in failure(capsys, a, b)
    one, two = scores_file({"Pong": [1]}, "one.json"), scores_file({"Qbert": [1]}, "two.json")
    assert "no game in common" in failure(capsys, one, two, "--compare", "one", "two")
    assert "nothing to evaluate or --compare; methods: one, two;" in failure(capsys, one, two, "--compare", "one", "three")
    (tmp_path / "sub").mkdir()
    other = scores_file(SEEDS, "sub/one.json")
    assert "NEW=" in failure(capsys, scores_file(SEEDS, "one.json"), other)


# ---------------------------------------------------------------- output
def test_unfinished_runs_are_left_out_and_said(run_dir, capsys, few_resamples):
    assert run(run_dir("a", result()), run_dir("unfinished", None)) == 0
    assert "unfinished, left out" in capsys.readouterr().err


def test_folders_are_walked(run_dir, tmp_path, capsys):
    run_dir("a", result())
    run_dir("b", result(seed=2, returns=[40.0]))
    (run_dir("c", None) / "args.json").write_text("{}")
    [method] = ev.read_methods([str(tmp_path)]).values()
    assert method["scores"] == {"Breakout": [30.0, 40.0]}
    assert capsys.readouterr().err == f"note: no result.json in {tmp_path}/c, left out\n"


def test_toys_have_raw_returns_and_no_aggregates(run_dir, capsys):
    toys = [run_dir(str(i), result(env_id="tests.toy:Catch-v0", seed=i, returns=[float(i)])) for i in (1, 2)]
    assert run(*toys) == 0
    out = capsys.readouterr().out
    [row] = [line.split() for line in out.splitlines() if line.startswith("Catch")]
    assert row == ["Catch", "1.5", "±0.7"] and "Raw returns" in out
    assert "\nAggregates" not in out and "[" not in out.split("Raw returns")[1].split("score ±")[0] and "INCOMPLETE" not in out
    assert run(*toys, run_dir("3", result(seed=3))) == 0  # beside Atari games
    out = capsys.readouterr().out
    assert "Catch" in out and "\nAggregates, 1 of 26 games\nmean " in out
    assert out.count("25 of 26 games missing (Alien, Amidar, Assault, ...)") == 1


def test_methods_without_a_game_in_common_are_shown(scores_file, capsys):
    assert run(scores_file({"Pong": [1]}, "one.json"), scores_file({"Qbert": [1]}, "two.json")) == 0
    out = capsys.readouterr().out
    assert "Pong" in out and "Qbert" in out and "\nmean" not in out and out.count("25 of 26 games missing") == 2


def test_one_run_of_one_game(run_dir, capsys):
    assert run(run_dir("a", result())) == 0
    out = capsys.readouterr().out
    for words in ("Aggregates, 1 of 26 games", "INCOMPLETE", "IQM and gap need seeds", "temperature 1.0"):
        assert words in out
    [human_optimal] = [line.split() for line in out.splitlines() if line.startswith("human_optimal ")]
    assert human_optimal == ["human_optimal", "-"] and "30.0 0.98" in out
    assert "[" not in out.split("Aggregates")[1].split("score ±")[0]


def test_aggregates_of_a_comparison_are_over_the_games_in_common(scores_file, capsys, few_resamples):
    path = scores_file({"Pong": [20.0, 21.0], "Qbert": [1000.0, 2000.0]})
    assert run(path, SEEDS_FILE) == 0
    assert "\nAggregates, 2 of 26 games\n" in capsys.readouterr().out
    assert run(path, SEEDS_FILE, "--json") == 0
    [mean, *_] = json.loads(capsys.readouterr().out)["methods"]["diamond_seeds"]["aggregates"]["mean"]
    assert mean == pytest.approx(np.mean([ev.flatten(SEEDS, [g])[0].mean() for g in ("Pong", "Qbert")]))


def test_terminal_table_fits(capsys, few_resamples):
    assert run("--baselines") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    assert "OURS" in out and "Agent-Optimal" in out and "WARNING" in out
    [alien] = [line.split() for line in out.splitlines() if line.startswith("Alien")]
    assert alien[:5] == ["Alien", "228", "7128", "617", "0.06"] and alien[-2:] == ["744", "0.07"]


def test_baselines_quote_or_omit_what_needs_seeds(capsys):
    assert run("--baselines") == 0
    out = capsys.readouterr().out
    iqm = next(line.split() for line in out.splitlines() if line.startswith("iqm"))
    assert iqm == ["iqm", "0.130†", "0.459†", "0.501†", "-", "-", "0.641†", "0.688†"]


def test_jedi_is_a_column_of_printed_aggregates(scores_file, capsys):
    assert run("--baselines", "--json") == 0
    jedi = json.loads(capsys.readouterr().out)["methods"]["JEDI"]
    expected = {"mean": 1.450, "iqm": 0.688, "optimality_gap": 0.460, "harmonic_hns": 0.377}
    assert {key: value for key, (value, *_) in jedi["aggregates"].items()} == expected and jedi["scores"] == {}
    assert run("--baselines") == 0
    out = capsys.readouterr().out
    assert "0.688†" in out and "JEDI: " in out and "arXiv 2605.13013" in out
    assert run("--baselines", scores_file({"Pong": [1.0]})) == 0  # they are of 26 games, and of no other number
    assert "0.688" not in capsys.readouterr().out


def test_the_terminal_holds_the_definition_and_the_aggregates(capsys, few_resamples):
    assert run(SEEDS_FILE) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "This definition is OURS" in out and "sym_hns 0.243 [" in out


def test_json_holds_what_the_terminal_shows(capsys, few_resamples):
    run(SEEDS_FILE, "--json")
    told = json.loads(capsys.readouterr().out)
    [(name, method)] = told["methods"].items()
    assert name == "diamond_seeds" and method["scores"] == SEEDS and list(method["aggregates"]) == ev.AGGREGATES
    assert round(method["aggregates"]["sym_hns"][0], 3) == 0.243 and "This definition is OURS" in " ".join(told["remarks"])
    run(SEEDS_FILE)
    table, remarks = np.split(capsys.readouterr().out.splitlines(), [-len(told["remarks"])])
    assert list(remarks) == told["remarks"]
    for key, found in method["aggregates"].items():
        [row] = [line for line in table if line.startswith(f"{key} ")]
        assert row.split()[1:] == ev.interval(*found).split()


def test_mixed_protocols_are_warned_about(run_dir, capsys, few_resamples):
    a = run_dir("a", result())
    b = run_dir("b", result(seed=2, protocol=result()["protocol"] | {"episodes": 100, "eval_seed": 9}))
    run(a, b)
    out = capsys.readouterr().out
    assert "WARNING: mixed protocols" in out and "jedi: episodes 3, " in out and "jedi: episodes 100, " in out
    c = run_dir("c", result(seed=3, protocol=result()["protocol"] | {"eval_seed": 6}))
    run(a, c)
    assert "WARNING" not in capsys.readouterr().out


def test_needs_numpy_only():
    """Aggregates run where torch, gymnasium and jedi.py cannot be imported."""
    others = ["torch", "gymnasium", "ale_py", "tyro", "jedi", "matplotlib", "PIL"]
    code = f"import sys; sys.modules.update(dict.fromkeys({others}))"
    code += f"; import evaluate; sys.exit(evaluate.main([{str(SEEDS_FILE)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(ev.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0 and "sym_hns" in done.stdout and done.stderr == ""


# ---------------------------------------------------------------- curves
def write_run(path, returns, hours=2.0, **args):
    """A run whose game i ended at agent step 10 (i + 1), of `hours` at its last step."""
    path.mkdir(parents=True)
    (path / "args.json").write_text(json.dumps({"env_id": "tests.toy:Catch-v0", "exp_name": "jedi", "seed": 1} | args))
    lines = [{"global_step": 10 * (i + 1), "charts/episodic_return": x} for i, x in enumerate(returns)]
    last = {"charts/hours": hours, "world_model/error_1": 0.5, "world_model/error_5": None}
    lines += [{"global_step": 10 * len(returns)} | more for more in (last, {"eval/episodic_return": 7.0})]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text + '{"global_step": 3')  # the last line was cut off
    return path


def test_curves_are_those_of_the_log(tmp_path):
    curves = ev.read_curves(write_run(tmp_path / "a", list(range(20))) / "metrics.jsonl")
    steps, values = curves["return"].T
    assert list(steps) == list(range(10, 201, 10))
    assert values[0] == 0 and values[1] == 0.5 and values[-1] == np.mean(range(10, 20))  # mean of the last 10 games
    assert curves["score"].tolist() == [[200, 7]] and curves["error_1"].tolist() == [[200, 0.5]]
    assert curves["hours"].tolist() == [[200, 2]] and "error_5" not in curves


def test_curves_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name, seed, returns in (("jedi", 1, [0.0] * 10), ("jedi", 2, [2.0] * 12), ("mse", 1, [5.0] * 3)):
        write_run(tmp_path / "runs" / f"Catch__{name}__{seed}", returns, exp_name=name, seed=seed)
    write_run(tmp_path / "runs" / "Breakout__jedi__1", [3.0], env_id="BreakoutNoFrameskip-v4")
    png = tmp_path / "curves.png"
    assert run("--curves", tmp_path / "runs", "--plot", png) == 0
    out = capsys.readouterr().out
    assert "Catch, jedi, return, seeds: 2, last 1 (0 to 2)" in out and "Catch, mse, return, seeds: 1, last 5" in out
    assert "Breakout, jedi, return, seeds: 1, last 3" in out and png.read_bytes()[:4] == b"\x89PNG"
    assert "Catch, jedi, hours, seeds: 2, last 2 (2 to 2)" in out
    assert "--plot PNG" in failure(capsys, "--curves", tmp_path / "runs")
    assert run("--curves", tmp_path / "runs", "--plot", tmp_path / "no" / "out.png") == 2
    assert "no/out.png" in capsys.readouterr().err


def test_curves_without_matplotlib(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "Catch__jedi__1", [1.0])
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "pip install matplotlib" in failure(capsys, "--curves", tmp_path, "--plot", tmp_path / "out.png")


# ---------------------------------------------------------------- an agent, its game and what it imagines
SCRIPT = '''"""A stand-in for a script that trains: its frames are all of one grey, and its latent is that grey."""
import dataclasses, json, pathlib, typing
import gymnasium as gym
import numpy as np
import torch

class UsageError(Exception):
    pass

@dataclasses.dataclass
class Args:
    env_id: str = "BreakoutNoFrameskip-v4"
    exp_name: str = "jedi"
    seed: int = 1
    horizon: int = 3
    num_conditioning_steps: int = 2
    image_size: int = 8
    total_steps: int = 100
    compile: bool = True
    device: str = "cpu"

class Env:
    """The grey grows by the action + 1 at every step; a game ends with reward 1 at its 6th step."""
    unwrapped, action_space = property(lambda self: self), gym.spaces.Discrete(2)
    def get_action_meanings(self):
        return ["NOOP", "FIRE"]
    def frame(self):
        return np.full((3, 8, 8), self.grey, np.uint8)
    def reset(self):
        self.grey, self.steps = 10, 0
        return self.frame(), {}
    def step(self, act):
        self.grey, self.steps = self.grey + act + 1, self.steps + 1
        return self.frame(), float(self.steps == 6), self.steps == 6, False, {}

def make_env(env_id, seed, image_size):
    return Env()

Batch = typing.NamedTuple("Batch", [(k, torch.Tensor) for k in ("obs", "act", "rew", "end", "real", "step")])

class ReplayBuffer:
    def __init__(self, args, device):
        self.obs = torch.zeros(2 * args.total_steps + 2, 3, args.image_size, args.image_size, dtype=torch.uint8)
        self.act, self.episode = (torch.zeros(len(self.obs), dtype=torch.long) for _ in range(2))
        self.rew, self.end = torch.zeros(len(self.obs)), torch.zeros(len(self.obs), dtype=torch.bool)
        self.has_step = torch.zeros(len(self.obs), dtype=torch.bool)
        self.size = self.episodes = 0
    def add(self, obs, act=None, rew=0.0, end=False):
        if act is None:
            self.episodes += 1
        else:
            self.act[self.size - 1], self.rew[self.size - 1], self.end[self.size - 1] = act, rew, end
            self.has_step[self.size - 1] = True
        self.obs[self.size], self.episode[self.size] = torch.from_numpy(obs), self.episodes
        self.size += 1
    def load_state_dict(self, games):
        self.__init__(Args(), "cpu")
        for _ in range(games):
            env = Env()
            self.add(env.reset()[0])
            for t in range(6):
                obs, rew, end, trunc, _ = env.step(1)
                self.add(obs, 1, rew, end)
    def sample(self, batch_size, before, after, generator):
        slot = (torch.arange(before + 1 + after)[None]).expand(batch_size, -1)  # always the first episode
        real = self.episode[slot] == 1
        return Batch(self.obs[slot], self.act[slot], self.rew[slot], self.end[slot].long(), real, real)

class Agent(torch.nn.Module):
    num_actions = 2
    def __init__(self, args, num_actions):
        super().__init__()
    def encoder(self, obs):
        return obs[..., :1, :1, :1].float()  # [..., 1, 1, 1]
    def actor_critic(self, z, real=None, state=None):
        """Always FIRE; the value is the grey."""
        return torch.tensor([-100.0, 100.0]).expand(*z.shape[:2], 2), z[:, :, 0, 0, 0], state

class Trainer:
    """Collects as training does: FIRE in one game after the other."""
    def __init__(self, args, num_actions, device):
        self.buffer, self.env, self.over = ReplayBuffer(args, device), Env(), True
        assert args.compile is False and args.seed != Args.seed
    def collect(self):
        if self.over:
            self.buffer.add(self.env.reset()[0])
        obs, rew, end, truncated, _ = self.env.step(1)
        self.buffer.add(obs, 1, rew, end)
        self.over = end or truncated

Rollout = typing.NamedTuple("Rollout", [(k, torch.Tensor) for k in ("z", "real", "act", "rew", "end")])

def imagine(agent, z, act, real, horizon, actions=None):
    """Right but for the 3rd step, when it stands still. The dream ends at its 4th step."""
    acts = torch.ones(len(z), horizon, dtype=torch.long) if actions is None else actions
    moves = (acts + 1.0) * (torch.arange(horizon) != 2)
    dreamt = z[:, -1:] + moves.cumsum(1)[..., None, None, None]
    end = (torch.arange(horizon) == 3).float().expand(len(z), -1)
    whole = torch.cat([z, dreamt], 1)
    return Rollout(whole, torch.ones(whole.shape[:2], dtype=torch.bool), acts, end, end)

def load_checkpoint(run_dir):
    if not (run_dir / "ckpt.pt").exists():
        raise UsageError(f"{run_dir}: no checkpoint there")
    state = {"agent": {}}
    return state | ({"replay": 2} if (run_dir / "ckpt.pt").read_text() == "replay" else {})

def evaluate_policy(agent, env_id, num_episodes, seed):
    returns = [float(seed + i) for i in range(num_episodes)]
    found = {"env_id": env_id, "game": "Breakout", "exp_name": Args.exp_name, "seed": Args.seed, "preset": "small"}
    found |= {"returns": returns, "lengths": [3] * num_episodes, "mean_return": float(np.mean(returns))}
    return found | {"protocol": {"episodes": num_episodes, "eval_seed": seed}}
'''


@pytest.fixture
def fork(tmp_path):
    """A finished run of a fork, whose script has a name of its own."""
    path = tmp_path / "runs" / "Breakout__mse__1"
    path.mkdir(parents=True)
    files = {"jedi_mse.py": SCRIPT, "ckpt.pt": "replay", "args.json": "{}", "result.json": json.dumps(result())}
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def content(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*")}


def frames_of(path):
    """GIF -> the grey in the middle of every frame."""
    film = pytest.importorskip("PIL.Image").open(path)
    greys = []
    for i in range(film.n_frames):
        film.seek(i)
        greys.append(film.convert("RGB").getpixel((film.width // 2, film.height // 2))[0])
    return greys


def test_every_kind_of_looking_leaves_the_run_as_it_was(fork, tmp_path, capsys):
    pytest.importorskip("PIL")
    before = content(fork)
    assert run("--checkpoint", fork, "--episodes", 2) == 0
    assert run("--checkpoint", fork, "--episodes", 2, "--out", tmp_path / "score.json") == 0
    assert run("--imagine", fork, tmp_path / "strip.png") == 0
    assert run("--imagine", fork, tmp_path / "fresh.png", "--fresh") == 0
    assert run("--dream", fork, tmp_path / "dream.gif", "--steps", 7) == 0
    assert run("--video", fork, tmp_path / "game.gif") == 0
    assert run(fork.parent) == 0
    assert content(fork) == before
    written = ["dream.gif", "fresh.png", "game.gif", "runs", "score.json", "strip.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == written
    assert run(fork, f"again={tmp_path / 'score.json'}") == 0  # a score of its own is a method like others


def test_a_latent_is_shown_as_the_frame_that_it_came_from(fork):
    torch = pytest.importorskip("torch")
    agent = ev.Run(fork, "cpu", seed=0)
    frames = agent.replay.obs[:7]
    assert torch.equal(agent.retrieve(agent.agent.encoder(frames[None]))[0], frames)
    assert (agent.retrieve(torch.full((1, 1, 1, 1), 14.9)) == 14).all()
    other = torch.full((1, 3, 8, 8), 15, dtype=torch.uint8)
    assert (agent.retrieve(torch.full((1, 1, 1, 1), 14.9), other) == 15).all()


def test_strips_begin_at_the_context_and_follow_the_real_actions(fork):
    share, rows = ev.Run(fork, "cpu", seed=0).imagine(["NOOP", "FIRE"], contexts=5)
    assert share == [1, 1, 1, 0] and len(rows) == 8
    grey = lambda row: [int(frame[0, 0, 0]) for frame, _, _ in row]  # noqa: E731
    for real, imagined in zip(rows[::2], rows[1::2]):
        assert grey(real) == [12, 14, 16, 18] and grey(imagined) == [12, 14, 16, 16]  # it stood still at the 3rd step
        assert [text for _, text, _ in real] == ["0 real", "1 FIRE ", "2 FIRE ", "3 FIRE "]
        assert [colour for *_, colour in imagined] == ["lime", "lime", "lime", "red"]


def test_strips_show_what_the_frames_show(fork, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    assert run("--imagine", fork, tmp_path / "strip.png") == 0
    assert "100% 100% 100% 0%" in capsys.readouterr().out
    strip, size = image.open(tmp_path / "strip.png").convert("RGB"), 128
    row = lambda y: [strip.getpixel((x * (size + 8) + 60, y * (size + 32) + 84)) for x in range(4)]  # noqa: E731
    assert row(0) == [(g, g, g) for g in (12, 14, 16, 18)] and row(1) == [(g, g, g) for g in (12, 14, 16, 16)]


def test_a_dream_is_as_long_as_asked_and_begins_anew_after_its_end(fork, tmp_path, capsys):
    pytest.importorskip("PIL")
    frames, act, rew, mark, value = zip(*ev.Run(fork, "cpu", seed=0).dream(6))
    greys = [int(frame[0, 0, 0]) for frame in frames]
    assert greys == [14, 16, 16, 18, 14, 16]  # 4 steps to the end, then from the context again
    assert act == (1,) * 6 and rew == (0, 0, 0, 1, 0, 0) and mark == ("", "", "", "END", "", "")
    assert value == (12, 14, 16, 16, 12, 14)  # of the frame at which the action was chosen
    assert run("--dream", fork, tmp_path / "dream.gif", "--steps", 6) == 0
    assert frames_of(tmp_path / "dream.gif") == greys
    assert "6 steps, 1 ends" in capsys.readouterr().out


def test_a_film_is_one_game(fork, tmp_path, capsys):
    pytest.importorskip("PIL")
    assert run("--video", fork, tmp_path / "game.gif") == 0
    assert frames_of(tmp_path / "game.gif") == [12, 14, 16, 18, 20, 22]  # FIRE at every step
    assert "6 steps, 1 ends, 0 truncations, score 1" in capsys.readouterr().out
    assert run("--video", fork, tmp_path / "cut.gif", "--steps", 4) == 0
    assert len(frames_of(tmp_path / "cut.gif")) == 4
    film = pytest.importorskip("PIL.Image").open(tmp_path / "game.gif")
    film.seek(5)
    assert film.info["duration"] >= 2000 and min(film.size) >= 384  # the last frame is held; a person can see it


def test_a_film_marks_a_truncation(fork, tmp_path, capsys, monkeypatch):
    pytest.importorskip("PIL")
    (fork / "jedi_mse.py").write_text(SCRIPT.replace("self.steps == 6, False, {}", "False, self.steps == 6, {}"))
    texts, draw = [], ev.draw
    monkeypatch.setattr(ev, "draw", lambda rows, *more: texts.append(rows[0][0][1]) or draw(rows, *more))
    assert run("--video", fork, tmp_path / "game.gif") == 0
    assert "6 steps, 0 ends, 1 truncations, score 1" in capsys.readouterr().out
    assert texts == [""] * 5 + ["+1 TRUNCATED"] and len(frames_of(tmp_path / "game.gif")) == 6


def test_weights_alone_are_looked_at_in_fresh_games(fork, tmp_path, capsys):
    pytest.importorskip("PIL")
    (fork / "ckpt.pt").write_text("weights")
    assert run("--imagine", fork, tmp_path / "strip.png") == 0
    assert "600 steps of fresh games, for the checkpoint holds no replay" in capsys.readouterr().out


def test_a_score_is_shown_before_it_is_written(fork, tmp_path, capsys):
    assert run("--checkpoint", fork, "--episodes", 4, "--seed", 5, "--out", tmp_path / "no" / "score.json") == 2
    out, err = capsys.readouterr()
    assert "Breakout, mean return 6.50 of 4 games" in out
    assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err


def test_refusals_of_looking(fork, tmp_path, capsys, monkeypatch):
    pytest.importorskip("PIL")
    before = content(fork)
    assert "at least 1" in failure(capsys, "--checkpoint", fork, "--episodes", 0)
    assert "at least 1" in failure(capsys, "--dream", fork, tmp_path / "a.gif", "--steps", 0)
    assert "no whole checkpoint there" in failure(capsys, "--checkpoint", tmp_path / "nowhere")  # so says jedi.py
    assert "must end in .png" in failure(capsys, "--imagine", fork, tmp_path / "strip.gif")
    assert "must end in .gif" in failure(capsys, "--video", "game.gif", fork)  # the two swapped
    assert "only training writes" in failure(capsys, "--checkpoint", fork, "--out", fork / "result.json")
    assert content(fork) == before
    (fork / "ckpt.pt").unlink()
    assert "no checkpoint there" in failure(capsys, "--dream", fork, tmp_path / "a.gif")
    for module in ("PIL", "PIL.ImageFont"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "pip install pillow" in failure(capsys, "--video", fork, tmp_path / "a.gif")


def test_ctrl_c_ends_without_a_traceback(fork, monkeypatch, capsys):
    monkeypatch.setattr(ev, "Run", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("--checkpoint", fork) == 130
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- end to end, with the real jedi.py
TINY = dict(
    env_id="tests.toy:Catch-v0", image_size=16, encoder_channels=(8, 8, 8, 4), denoiser_channels=16, cond_channels=32,
    reward_end_channels=8, lstm_dim=16, actor_critic_channels=(8, 8), horizon=3, batch_size=4, total_steps=60,
    collect_steps=(40, 20), final_epochs=1, world_model_updates=(4, 2), actor_critic_updates=(3, 2),
    eval_episodes=3, device="cpu", preset="small",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    import jedi

    runs = tmp_path_factory.mktemp("trained")
    return jedi.main(jedi.Args(**TINY, runs_dir=str(runs), seed=1)), runs / "Catch__jedi__1"


def test_a_real_run_can_be_looked_at_and_stays_as_it_is(trained, tmp_path, capsys):
    """Also: agent, seed and games of the final score give the final score again."""
    pytest.importorskip("PIL")
    trained, path = trained
    before = content(path)
    assert run("--checkpoint", path, "--episodes", 3, "--seed", 10_001, "--out", tmp_path / "score.json") == 0
    score = json.loads((tmp_path / "score.json").read_text())
    assert score["returns"] == trained["returns"] and score["protocol"] == trained["protocol"]
    assert score["global_step"] == trained["global_step"]
    assert run("--imagine", path, tmp_path / "strip.png") == 0
    out = capsys.readouterr().out
    assert "by step: 100% " in out and len(out.split("by step: ")[1].split()) == 4
    assert run("--imagine", path, tmp_path / "fresh.png", "--fresh") == 0
    assert run("--dream", path, tmp_path / "dream.gif", "--steps", 12) == 0 and len(frames_of(tmp_path / "dream.gif")) == 12
    assert run("--video", path, tmp_path / "game.gif", "--steps", 500) == 0
    frames = frames_of(tmp_path / "game.gif")
    assert f"{len(frames)} steps, 1 ends, 0 truncations" in capsys.readouterr().out
    assert run(path.parent) == 0 and "Catch" in capsys.readouterr().out
    assert content(path) == before


def test_a_film_is_the_game_that_is_scored(trained, tmp_path, capsys):
    """One game at one seed, filmed here and scored by evaluate_policy, which samples its actions alike."""
    pytest.importorskip("PIL")
    _, path = trained
    run("--checkpoint", path, "--episodes", 1, "--seed", 4)
    score = float(capsys.readouterr().out.split("mean return ")[1].split()[0])
    run("--video", path, tmp_path / "game.gif", "--seed", 4)
    assert float(capsys.readouterr().out.split("score ")[1]) == score


def test_curves_of_a_real_run(trained, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert run("--curves", trained[1].parent, "--plot", tmp_path / "curves.png") == 0
    assert "Catch, jedi, score, seeds: 1" in capsys.readouterr().out


def test_a_truncated_checkpoint_is_told_in_one_line(trained, tmp_path, capsys):
    import shutil

    copy = shutil.copytree(trained[1], tmp_path / "copy")
    (copy / "ckpt.pt").write_bytes((copy / "ckpt.pt").read_bytes()[:1000])
    assert "no whole checkpoint" in failure(capsys, "--checkpoint", copy)
