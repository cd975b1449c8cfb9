"""Tests of evaluate.py. diamond_seeds.json is results/data/DIAMOND.json of eloialonso/diamond (MIT), five seeds a game."""

import csv
import io
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import evaluate as ev

SEEDS_FILE = Path(__file__).parent / "diamond_seeds.json"
SEEDS = json.loads(SEEDS_FILE.read_text())
GAMES = list(ev.SCORES)


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
    assert found["sym_hns_geometric"] == pytest.approx((ao * ho) ** 0.5)


# STORM prints 1.266, which its rounded means give as 1.267
PRINTED = [("SimPLe", 0.332, 1), ("TWM", 0.956, 8), ("IRIS", 1.046, 10), ("STORM", 1.267, 10)]


@pytest.mark.parametrize("name, mean, superhuman", PRINTED)
def test_published_means(name, mean, superhuman):
    found = values(published(name))
    assert found["mean"] == pytest.approx(mean, abs=5e-4) and found["superhuman"] == superhuman


def test_table_is_the_one_of_the_seeds_and_of_the_definition():
    assert len(GAMES) == 26 and all(len(row) == 2 + len(ev.PUBLISHED) for row in ev.SCORES.values())
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
    for key in ("mean", "median", "iqm", "human_optimal", "agent_optimal", "sym_hns", "sym_hns_geometric"):
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
            for key in ("sym_hns", "sym_hns_geometric"):
                assert ends[0] - 1e-12 <= found[key] <= min(ends[1], found["mean"]) + 1e-12


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
def test_names_of_games(name):
    assert ev.read_scores(((name, [1, 2.5]),), "f") == {"MsPacman": [1.0, 2.5]}


def test_every_game_is_known_under_every_name():
    for game in GAMES:
        snake = "".join("_" + c.lower() if c.isupper() else c for c in game).lstrip("_")
        for name in (game, f"{game}NoFrameskip-v4", f"ALE/{game}-v5", snake):
            assert list(ev.read_scores(((name, [1]),), "f")) == [game]


def test_runs_are_grouped_by_experiment(run_dir):
    a = run_dir("a", result())
    b = run_dir("b", result(seed=2, returns=[40.0]))
    c = run_dir("c", result(env_id="ALE/Pong-v5", returns=[-21.0]))
    d = run_dir("d", result(exp_name="fork"))
    methods = ev.read_methods([str(p) for p in (a, b, c, d)])
    assert {name: method.scores for name, method in methods.items()} == {
        "jedi": {"Breakout": [30.0, 40.0], "Pong": [-21.0]},
        "fork": {"Breakout": [30.0]},
    }
    assert list(ev.read_methods([str(a / "result.json")])) == ["jedi"]
    [(name, method)] = ev.read_methods([f"OURS={a.parent}/[abc]"]).items()
    assert name == "OURS" and method.scores == methods["jedi"].scores


def test_files_are_methods(scores_file):
    path = scores_file(SEEDS)
    assert list(ev.read_methods([str(path), f"OTHER={path}"])) == ["ours", "OTHER"]


def without(game):
    return {g: s for g, s in SEEDS.items() if g != game}


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
    "unknown game": (json.dumps(SEEDS | {"Brekout": [1]}), "did you mean Breakout"),
    "no such game": (json.dumps(SEEDS | {"tests.toy:Catch-v0": [1]}), "tests.toy:Catch-v0"),
    "two names": (json.dumps(SEEDS | {"ALE/Alien-v5": [1]}), "Alien appears twice"),
    "same name twice": (json.dumps(SEEDS)[:-1] + ', "Alien": [1]}', "Alien appears twice"),
    "one missing": (json.dumps(without("Qbert")), "1 of 26 games missing (Qbert)"),
    "many missing": (json.dumps({"Qbert": [1]}), "25 of 26 games missing (Alien, Amidar, Assault, ...)"),
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
    "toy": (result(env_id="tests.toy:Catch-v0"), "Catch"),
}


@pytest.mark.parametrize("content, words", BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_bad_results(content, words, run_dir, capsys):
    message = failure(capsys, run_dir("bad", content), "--allow-missing")
    assert "bad/result.json" in message and words in message


def test_other_refusals(run_dir, scores_file, tmp_path, capsys):
    assert "no files matched" in failure(capsys, tmp_path / "runs" / "*")
    assert "nothing to evaluate" in failure(capsys)
    assert "nothing to evaluate" in failure(capsys, run_dir("unfinished", None))
    a, b = run_dir("a", result()), run_dir("b", result())
    assert "Breakout of this method and seed is in" in failure(capsys, a, b, "--allow-missing")
    assert "25 of 26 games missing (Alien, Amidar, Assault, ...)" in failure(capsys, a)
    one, two = scores_file({"Pong": [1]}, "one.json"), scores_file({"Qbert": [1]}, "two.json")
    assert "no game in common" in failure(capsys, one, two, "--allow-missing")
    (tmp_path / "sub").mkdir()
    other = scores_file(SEEDS, "sub/one.json")
    assert "NEW=" in failure(capsys, scores_file(SEEDS, "one.json"), other)


# ---------------------------------------------------------------- output
def test_unfinished_runs_are_left_out_and_said(run_dir, capsys, few_resamples):
    assert run(run_dir("a", result()), run_dir("unfinished", None), "--allow-missing") == 0
    assert "unfinished has no result.json" in capsys.readouterr().err


def test_one_run_of_one_game(run_dir, capsys):
    assert run(run_dir("a", result()), "--allow-missing") == 0
    out = capsys.readouterr().out
    for words in ("Mean, 1 of 26 games", "Human-Optimal mean, 0 of 13 games", "INCOMPLETE", "no interval", "temperature 1.0"):
        assert words in out
    assert "[" not in out.split("Aggregates")[1].split("mean:")[0] and "30.0 0.98" in out


def test_aggregates_of_a_comparison_are_over_the_games_in_common(scores_file, capsys, few_resamples):
    path = scores_file({"Pong": [20.0, 21.0], "Qbert": [1000.0, 2000.0]})
    assert run(path, SEEDS_FILE, "--allow-missing", "--format", "json") == 0
    records = json.loads(capsys.readouterr().out)
    over = {r["over"] for r in records if r["kind"] == "aggregate" and r["name"] not in ("agent_optimal", "human_optimal")}
    assert over == {"2 of 26 games"}
    [mean] = [r["value"] for r in records if r["name"] == "mean" and r.get("method") == "diamond_seeds"]
    assert mean == pytest.approx(np.mean([ev.flatten(SEEDS, [g])[0].mean() for g in ("Pong", "Qbert")]))


def test_terminal_table_fits_and_marks_the_best(capsys, few_resamples):
    assert run(SEEDS_FILE, "--baselines") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "OURS" in out and "Agent-Optimal" in out and "WARNING" in out
    alien = [line for line in out.splitlines() if line.startswith("Alien")]
    assert sum(line.count("*") for line in alien) == 1 and "984 0.11*" in "".join(alien)


def test_baselines_quote_or_omit_what_needs_seeds(capsys):
    assert run("--baselines") == 0
    out = capsys.readouterr().out
    [iqm] = [line.split() for line in out.splitlines() if line.startswith("IQM")]
    assert iqm == ["IQM", "0.130†", "0.459†", "0.501†", "-", "-", "0.641†*"] and "DreamerV3: a Freeway score of 0" in out


@pytest.mark.parametrize("kind", ["terminal", "markdown", "csv", "json"])
def test_every_output_holds_the_definition_and_the_aggregates(kind, capsys, few_resamples):
    assert run(SEEDS_FILE, "--format", kind) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "This definition is OURS" in out and "Sym-HNS (harmonic)" in out and "0.243" in out


def test_csv_and_json_agree(capsys, few_resamples):
    run(SEEDS_FILE, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    run(SEEDS_FILE, "--format", "json")
    records = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [record["name"] for record in records]
    for row, record in zip(rows, records):
        assert record.get("value") is None or float(row["value"]) == record["value"]


def test_markdown_is_a_table(capsys, few_resamples):
    run(SEEDS_FILE, f"OTHER={SEEDS_FILE}", "--format", "markdown")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {6} and len(lines) == 2 + 3 + 26 + len(ev.AGGREGATES)


def test_mixed_protocols_are_warned_about(run_dir, capsys, few_resamples):
    a = run_dir("a", result())
    b = run_dir("b", result(seed=2, protocol=result()["protocol"] | {"episodes": 100, "eval_seed": 9}))
    run(a, b, "--allow-missing")
    assert "mixed protocols (episodes;" in capsys.readouterr().out
    c = run_dir("c", result(seed=3, protocol=result()["protocol"] | {"eval_seed": 6}))
    run(a, c, "--allow-missing")
    assert "WARNING" not in capsys.readouterr().out


def test_zero_freeway_and_ragged_seeds_are_said(scores_file, capsys, few_resamples):
    run(scores_file(SEEDS | {"Freeway": [0.0] * 5, "Alien": SEEDS["Alien"][:3]}))
    out = capsys.readouterr().out
    assert "Freeway score of 0" in out and "3 to 5 seeds per game" in out


def test_plot(tmp_path, capsys, few_resamples):
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.png"
    assert run(SEEDS_FILE, "--baselines", "--plot", path) == 0
    assert path.read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    assert "no/out.png" in failure(capsys, SEEDS_FILE, "--plot", tmp_path / "no" / "out.png")


def test_plot_without_matplotlib(tmp_path, capsys, monkeypatch, few_resamples):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "matplotlib" in failure(capsys, SEEDS_FILE, "--plot", tmp_path / "out.png")


def test_needs_numpy_only():
    """Aggregates run where torch, gymnasium and jedi.py cannot be imported."""
    others = ["torch", "gymnasium", "ale_py", "tyro", "jedi", "matplotlib", "PIL"]
    code = f"import sys; sys.modules.update(dict.fromkeys({others}))"
    code += f"; import evaluate; sys.exit(evaluate.main([{str(SEEDS_FILE)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(ev.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0 and "Sym-HNS" in done.stdout and done.stderr == ""


# ---------------------------------------------------------------- playing
@pytest.fixture
def fake_jedi(monkeypatch):
    """A stand-in for jedi.py with the interface that evaluate.py uses."""
    fake = types.ModuleType("jedi")
    fake.UsageError = type("UsageError", (Exception,), {})

    def load_agent(run_dir, device):
        if not run_dir.is_dir():
            raise fake.UsageError(f"{run_dir}: no checkpoint there; name a run directory")
        return types.SimpleNamespace(env_id="BreakoutNoFrameskip-v4"), "agent", 100_000

    def evaluate_policy(agent, env_id, num_episodes, seed, *, temperature=1.0, num_envs=8, progress=None, frames=None):
        for done in range(num_episodes):
            progress(done + 1, num_episodes)
        if frames is not None:
            frames += [np.full((64, 64, 3), shade, np.uint8) for shade in (0, 100, 200)]
        return {"returns": [float(seed + i) for i in range(num_episodes)], "lengths": [3] * num_episodes}

    def make_result(args, evaluation, global_step, wall_time_s, **protocol):
        protocol = {"episodes": len(evaluation["returns"])} | protocol
        mean = float(np.mean(evaluation["returns"]))
        return result(**evaluation, mean_return=mean, protocol=protocol, global_step=global_step)

    fake.load_agent, fake.evaluate_policy, fake.make_result = load_agent, evaluate_policy, make_result
    fake.write_json = lambda path, content: path.write_text(json.dumps(content))
    monkeypatch.setitem(sys.modules, "jedi", fake)


def test_playing_writes_a_result_and_keeps_the_earlier_ones(fake_jedi, run_dir, capsys):
    path = run_dir("a", None)
    for seed in (1, 2, 3):
        assert run("--checkpoint", path, "--episodes", 4, "--seed", seed) == 0
    out, err = capsys.readouterr()
    assert "4/4 games" in err and "Breakout" in out and "result.2.json" in out
    kept = [json.loads((path / f"result{i}.json").read_text())["returns"][0] for i in (".1", ".2", "")]
    assert kept == [1, 2, 3]
    assert run(path, "--allow-missing") == 0


def test_refusals_of_playing(fake_jedi, tmp_path, run_dir, capsys):
    assert "at least 1" in failure(capsys, "--checkpoint", run_dir("a", None), "--episodes", 0)
    assert not (tmp_path / "a" / "result.json").exists()
    assert "no checkpoint" in failure(capsys, "--checkpoint", tmp_path / "nowhere")


def test_video(fake_jedi, run_dir, tmp_path, monkeypatch, capsys):
    image = pytest.importorskip("PIL.Image")
    assert run("--checkpoint", run_dir("a", None), "--episodes", 2, "--video", tmp_path / "game.gif") == 0
    assert image.open(tmp_path / "game.gif").n_frames == 3
    monkeypatch.setitem(sys.modules, "PIL", None)
    capsys.readouterr()
    assert "pillow" in failure(capsys, "--checkpoint", run_dir("b", None), "--episodes", 2, "--video", tmp_path / "b.gif")
    assert not (tmp_path / "b" / "result.json").exists()
