"""Tests of evaluate.py.

diamond_seeds.json is results/data/DIAMOND.json of eloialonso/diamond (MIT), five seeds per game;
IRIS is results/data/IRIS.json of eloialonso/iris.
"""

import itertools
import json
import math
import os
import subprocess
import sys
import tracemalloc
import weakref
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import evaluate as ev
from tests.tiny import tiny

SCRIPT = Path(ev.__file__)
SEEDS_FILE = Path(__file__).parent / "diamond_seeds.json"
SEEDS = json.loads(SEEDS_FILE.read_text())
GAMES = list(ev.SCORES)
AGENT = [game for game in GAMES if ev.HALVES[game] == "agent"]
IRIS = {
    "Alien": [368.7, 452.5, 437.2, 331.7, 510],
    "Amidar": [196.0, 126, 164.9, 162.9, 65.1],
    "Assault": [1481.3, 928.1, 1121.8, 1556.0, 2534.8],
    "Asterix": [762.5, 1114, 1082, 716.5, 593],
    "BankHeist": [42.2, 48.8, 68.4, 46.4, 59.6],
    "BattleZone": [16990, 14570, 11300, 10070, 12440],
    "Boxing": [86.2, 49.3, 55.8, 83.5, 75.5],
    "Breakout": [104.6, 85.6, 69.7, 70.3, 88.1],
    "ChopperCommand": [1150, 1276, 1659, 2162, 1578],
    "CrazyClimber": [64101, 66127, 62740, 77066, 26587],
    "DemonAttack": [905, 2011.9, 2888.5, 2613.4, 1753],
    "Freeway": [30.9, 31.5, 30.5, 30.8, 31.6],
    "Frostbite": [274.3, 250.0, 295, 250, 226.3],
    "Gopher": [2987.2, 2476.8, 3110.4, 1171.4, 1434.8],
    "Hero": [6916.2, 6933.9, 6740.6, 7881.6, 6714.7],
    "Jamesbond": [487.5, 394, 486, 464, 482],
    "Kangaroo": [2249, 732, 750, 90, 370],
    "Krull": [6047.4, 7364.8, 4980.6, 6006.3, 8683],
    "KungFuMaster": [7301, 15949, 34406, 14372, 36771],
    "MsPacman": [1251.6, 941.5, 590.3, 770.8, 1441.1],
    "Pong": [19.3, 18.5, 16.6, 6.2, 12.4],
    "PrivateEye": [100, 100, 100, 100, 100],
    "Qbert": [853, 575, 790.2, 1027.2, 483.2],
    "RoadRunner": [11355, 2033, 17106, 7614, 9965],
    "Seaquest": [752.2, 855.8, 691, 386, 621.6],
    "UpNDown": [3793, 5367.5, 2943.7, 3637.9, 1988.9],
}


def at_hns(hns):
    """Scores {game: [..]} of the given HNS {game: [..]}."""
    scores = {}
    for game, values in hns.items():
        random, human = ev.SCORES[game][:2]
        scores[game] = [random + x * (human - random) for x in values]
    return scores


def summary(scores, seed=0):
    """{aggregate: [value, low, high, share of undefined resamples]}."""
    return ev.bootstrap(ev.aggregates, list(scores), list(scores.values()), seed)


def values(scores):
    """{aggregate: value}, None where undefined."""
    single = {}
    runs = [np.array([x]) for x in scores.values()]
    for name, point in ev.aggregates(list(scores), runs).items():
        single[name] = float(point[0]) if np.isfinite(point[0]) else None
    return single


def compared(a, b, seed=0):
    return ev.bootstrap(ev.difference, list(a), [*a.values(), *[b[game] for game in a]], seed)


def published(name):
    column = list(ev.PUBLISHED).index(name)
    return {game: [row[column]] for game, row in ev.SCORES.items()}


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(ev, "RESAMPLES", 300)


def run(*arguments):
    """The command line in this process: its exit code."""
    return ev.main([str(argument) for argument in arguments])


def failure(capsys, *arguments):
    """Runs a command that must fail as the user should see it.

    That is code 2 and one line `error: ...`, no more.
    """
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def cells(out):
    """The printed table, without what is said below it: {first word of a row: the other words}."""
    table = out.split("games: mean score")[0]
    return {line.split()[0]: line.split()[1:] for line in table.splitlines()}


# ---------------------------------------------------------------- published numbers
def test_diamond_seeds_give_the_published_aggregates_and_intervals():
    found = summary(SEEDS)
    golden = {
        "mean": (1.459, 1.356, 1.567),
        "median": (0.373, 0.309, 0.490),
        "iqm": (0.641, 0.578, 0.708),
        "optimality_gap": (0.480, 0.465, 0.496),
    }
    for name, (value, low, high) in golden.items():
        assert found[name][0] == pytest.approx(value, abs=5e-4)
        assert found[name][1:3] == pytest.approx([low, high], abs=0.012)
    assert found["superhuman"][0] == 11


# STORM prints 1.266, which its rounded means give as 1.267
PRINTED = [("SimPLe", 0.332, 1), ("TWM", 0.956, 8), ("IRIS", 1.046, 10), ("STORM", 1.267, 10)]


@pytest.mark.parametrize("name, mean, superhuman", PRINTED)
def test_published_means(name, mean, superhuman):
    found = values(published(name))
    assert found["mean"] == pytest.approx(mean, abs=5e-4)
    assert found["superhuman"] == superhuman


def test_published_halves_of_diamond():
    found = values(published("DIAMOND"))
    golden = {"agent_optimal": 2.791, "human_optimal": 0.127, "harmonic_hns": 0.319}
    for name, value in golden.items():
        assert found[name] == pytest.approx(value, abs=5e-4)


def test_table_is_that_of_the_seeds_and_its_halves_are_those_of_the_definition():
    assert len(GAMES) == 26
    for game in GAMES:
        assert np.mean(SEEDS[game]) == pytest.approx(published("DIAMOND")[game][0], abs=0.06)
    judged = {}
    for game in GAMES:
        judges = [published(name)[game][0] for name in ("IRIS", "TWM", "DreamerV3", "STORM")]
        judged[game] = -ev.normalise(game, np.mean(judges))
    assert sorted(sorted(GAMES, key=judged.get)[:13]) == AGENT


# ---------------------------------------------------------------- definitions
def test_every_resample_equals_formulas_written_game_by_game():
    rng = np.random.default_rng(3)
    runs = [rng.choice(SEEDS[game], (20, 5)) for game in GAMES]
    found = ev.aggregates(GAMES, runs)
    for i in range(20):
        hns = {}
        for game, drawn in zip(GAMES, runs):
            random, human = ev.SCORES[game][:2]
            hns[game] = [(x - random) / (human - random) for x in drawn[i]]
        means = {game: sum(x) / 5 for game, x in hns.items()}
        pooled = sorted(sum(hns.values(), []))
        ao = np.mean([means[game] for game in AGENT])
        ho = np.mean([x for game, x in means.items() if game not in AGENT])
        expected = {
            "mean": np.mean(list(means.values())),
            "median": np.median(list(means.values())),
            "iqm": np.mean(pooled[32:98]),
            "optimality_gap": 1 - np.mean([min(x, 1) for x in pooled]),
            "superhuman": sum(x >= 1 for x in means.values()),
            "human_optimal": ho,
            "agent_optimal": ao,
            "asymmetry": ao / ho,
            "sym_hns": 2 / (1 / ao + 1 / ho),
            "harmonic_hns": 26 / sum(1 / (x + 0.1) for x in means.values()),
        }
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(value)


LOW = [(0.0, 2.0, 0.0), (-0.1, 2.0, -0.1), (-0.2, -0.1, -0.2), (1e-9, 2.0, 0.0)]


@pytest.mark.parametrize("ho, ao, sym", LOW)
def test_a_half_at_or_below_random_decides_sym_hns(ho, ao, sym):
    found = values(at_hns({game: [ao if game in AGENT else ho] for game in GAMES}))
    assert found["sym_hns"] == pytest.approx(sym, abs=1e-8)
    assert (found["asymmetry"] is None) == (ho <= 0)
    assert (found["harmonic_hns"] is None) == (ho <= -0.1)


# ---------------------------------------------------------------- bootstrap
def test_bootstrap_of_coin_flips_is_binomial():
    """Two seeds, 0 and 1, in each of 26 games: a resampled mean is Binomial(52, 1/2) / 52."""
    cdf = np.cumsum([math.comb(52, k) / 2**52 for k in range(53)])
    low, high = np.searchsorted(cdf, [0.025, 0.975])
    found = summary(at_hns({game: [0.0, 1.0] for game in GAMES}))
    assert found["mean"][:3] == pytest.approx([0.5, low / 52, high / 52])


def test_each_game_draws_from_its_own_runs():
    """Games of constant scores have no spread, however far apart they are."""
    found = summary(at_hns({game: [i, i, i] for i, game in enumerate(GAMES)}))
    assert found["mean"][:3] == pytest.approx([12.5] * 3)


def test_seed_decides_the_interval(few_resamples):
    assert summary(SEEDS, seed=1) == summary(SEEDS, seed=1) != summary(SEEDS, seed=2)


def test_single_seeds_have_no_interval(few_resamples):
    for scores in (published("IRIS"), SEEDS | {"Alien": [500.0]}):
        assert all(low is None and high is None for _, low, high, _ in summary(scores).values())


def test_some_undefined_resamples_leave_an_interval_of_the_others_and_a_remark(tmp_path, capsys):
    """A seed of Pong is so low that the harmonic HNS is undefined where it is drawn often."""
    hns = {game: [0.5, 0.6, 0.7, 0.8] for game in GAMES} | {"Pong": [-1.0, 0.5, 0.6, 0.7]}
    value, low, high, share = summary(at_hns(hns))["harmonic_hns"]
    four_draws = [math.comb(4, k) * 0.25**k * 0.75 ** (4 - k) for k in range(5)]
    assert share == pytest.approx(sum(four_draws[2:]), abs=0.07)
    assert 0 < low < value < high
    file = tmp_path / "low.json"
    file.write_text(json.dumps(at_hns(hns)))
    assert run(file) == 0
    out = capsys.readouterr().out
    assert f"low: harmonic_hns is undefined in {share:.1%} of resamples" in out
    assert "[" in " ".join(cells(out)["harmonic_hns"])


# ---------------------------------------------------------------- two methods
# rliable 1.2.0 on DIAMOND[:n] against IRIS: get_interval_estimates with 20,000 (aggregates) and
# 1,000 (P) resamples
RLIABLE = {
    5: {
        "mean": (0.4131, 0.2831, 0.5482),
        "median": (0.0846, -0.0599, 0.1989),
        "iqm": (0.1396, 0.0511, 0.2281),
        "optimality_gap": (-0.0315, -0.0578, -0.0057),
        "P(A > B)": (0.6662, 0.6177, 0.7116),
    },
    3: {
        "mean": (0.3693, 0.2508, 0.4889),
        "median": (0.1176, -0.0543, 0.2672),
        "iqm": (0.1613, 0.0714, 0.2513),
        "optimality_gap": (-0.0361, -0.0654, -0.0072),
        "P(A > B)": (0.6859, 0.6282, 0.7436),
    },
}


@pytest.mark.parametrize("seeds", RLIABLE)
def test_comparison_agrees_with_rliable(seeds):
    found = compared({game: SEEDS[game][:seeds] for game in GAMES}, IRIS)
    for name, (value, low, high) in RLIABLE[seeds].items():
        assert found[name][0] == pytest.approx(value, abs=1e-4)
        assert found[name][1:3] == pytest.approx([low, high], abs=0.014)


def test_comparison_has_its_closed_form():
    """One game, two seeds each: the mean of a resample is that of one seed with probability 1/4.

    So the lowest and the highest difference of two such means have probability 1/16, more than
    2.5 %: they are the ends of the interval.
    """
    found = compared({"Catch": [1.0, 3.0]}, {"Catch": [0.0, 1.0]})
    assert list(found) == ["Catch", "P(A > B)"]
    assert found["Catch"][:3] == pytest.approx([1.5, 0.0, 3.0])
    assert found["P(A > B)"][:3] == pytest.approx([(1 + 1 + 1 + 0.5) / 4, 0.5, 1.0])
    mirrored = compared({"Catch": [0.0, 1.0]}, {"Catch": [1.0, 3.0]})
    assert mirrored["Catch"][0] == -1.5
    assert mirrored["P(A > B)"][0] == pytest.approx(1 - found["P(A > B)"][0])


def test_compare_command(tmp_path, capsys, few_resamples):
    a = tmp_path / "a.json"
    b = tmp_path / "b.json"
    a.write_text(json.dumps(SEEDS))
    b.write_text(json.dumps(IRIS))
    assert run(a, b, "--compare", "b", "a") == 0
    out = capsys.readouterr().out
    assert out.split("\n")[0].split() == ["b", "a", "b", "-", "a"]
    rows = {line.split()[0]: line.split("  ")[-1].strip() for line in out.splitlines()}
    for row, value in {"Alien": "-324 [", "iqm": "-0.14 [", "P(A": "0.334 ["}.items():
        assert rows[row].startswith(value)


def test_a_hundred_seeds_need_little_memory(few_resamples):
    """300 resamples of all pairs would be 78 MB of truth values at once.

    The pairs are 100 x 100 in each of 26 games.
    """
    rng = np.random.default_rng(0)
    scores = {game: rng.normal(size=100).tolist() for game in GAMES}
    tracemalloc.start()
    compared(scores, scores)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


# ---------------------------------------------------------------- reading
def result(**changes):
    protocol = {"policy": "sampled", "noop_max": 30, "sticky_actions": 0.0, "eval_seed": 5}
    content = {
        "env_id": "BreakoutNoFrameskip-v4",
        "exp_name": "jedi",
        "seed": 1,
        "preset": "paper",
        "returns": [10.0, 20.0, 60.0],
        "lengths": [5, 6, 7],
        "protocol": protocol,
        "global_step": 100_000,
    }
    return content | changes


@pytest.fixture
def write(tmp_path):
    """Writes a text, or JSON, below tmp_path and returns its path."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def rows_of(path):
    """{game: [scores]} of a file."""
    found = {}
    for game, _, score in ev.read_file(path)[2]:
        found.setdefault(game, []).append(score)
    return found


SPELLINGS = [
    "{}",
    "{}NoFrameskip-v4",
    "{}Deterministic-v4",
    "ALE/{}-v5",
    "{}-v4",
    "atari_{}",
    "atari100k_{}",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_games_are_known_under_the_usual_spellings(spelling):
    for game in GAMES:
        snake = "".join("_" + c.lower() if c.isupper() else c for c in game).lstrip("_")
        assert ev.game_of(spelling.format(game)) == ev.game_of(spelling.format(snake)) == game


NAMES = [
    ("BreakoutNoFrameskip-v4", {}, "Breakout", "0.98"),
    ("BreakoutNoFrameskip-v4", {"atari": True}, "Breakout", "0.98"),
    ("ALE/Breakout-v5", {}, "Breakout", "0.98"),
    ("Breakout-v1", {"atari": False}, "Breakout-v1", None),
    ("tests.toy:Catch-v0", {}, "tests.toy:Catch-v0", None),
    ("mini:Tiny/Pong-v1", {}, "mini:Tiny/Pong-v1", None),
    ("mini:Tiny/Pong-v1", {"atari": False}, "mini:Tiny/Pong-v1", None),
]


@pytest.mark.parametrize("env_id, recorded, name, hns", NAMES)
def test_human_scores_are_those_of_ale_pys_games(env_id, recorded, name, hns, write, capsys):
    """Older files do not say who made the environment: then an id with a module is not ale_py's."""
    content = result(env_id=env_id) | recorded
    assert run(write("run/result.json", content)) == 0
    rows = cells(capsys.readouterr().out)
    assert rows[name] == (["agent", "30", hns] if hns else ["30"])
    assert ("mean" in rows) == (hns is not None)


def test_runs_of_an_experiment_are_a_method_and_unfinished_ones_are_said(write, tmp_path, capsys):
    write("runs/a/result.json", result())
    other_games = result()["protocol"] | {"eval_seed": 6}
    write("runs/b/result.json", result(seed=2, returns=[40.0] * 3, protocol=other_games))
    write("runs/c/result.json", result(exp_name="fork"))
    write("runs/d/args.json", {})
    scores, protocols = ev.read_methods([str(tmp_path / "runs"), f"OURS={tmp_path}/runs/c"])
    fork = {"Breakout": [30.0]}
    assert scores == {"jedi": {"Breakout": [30.0, 40.0]}, "fork": fork, "OURS": fork}
    assert len(protocols["jedi"]) == 1  # where the seed of the games alone differs
    assert capsys.readouterr().err == f"note: no result.json in {tmp_path}/runs/d, left out\n"


TABLES = {
    "plain": "game,seed,score\nPong,1,20\nPong,2,18.5\nms_pacman,1,900\n",
    "other order, case, columns": (
        "Score, Game,steps,SEED\n"
        "20,Pong,9,a\n18.5,Pong,9,b\n900,MsPacman,9,a\n"
    ),
    "byte order mark, quotes": (
        "\ufeffgame,seed,score\r\n"
        '"Pong",1,20\r\n"Pong",2,18.5\r\n\r\nMsPacman,1,900\r\n'
    ),
}


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES)
def test_csv(text, write):
    assert rows_of(write("ours.csv", text)) == {"Pong": [20.0, 18.5], "MsPacman": [900.0]}


BAD_FILES = {
    "a.json: not json": ("{Alien: 1}", "expected"),
    "a.json: empty": ("", "expected"),
    "a.json: deep": ("[" * 100_000, "expected"),
    "a.json: list": ("[1, 2]", "expected"),
    "a.json: number": ("3", "expected"),
    "a.json: no games": ("{}", "no score in it"),
    "a.json: dict": (SEEDS | {"Alien": {"a": 1}}, 'Alien holds {"a": 1}'),
    "a.json: scalar": (SEEDS | {"Alien": 744.1}, "Alien holds 744.1"),
    "a.json: text": (SEEDS | {"Alien": "744"}, 'Alien holds "744"'),
    "a.json: null": (SEEDS | {"Alien": None}, "Alien holds null"),
    "a.json: nan": (SEEDS | {"Alien": [1, math.nan]}, "Alien holds NaN"),
    "a.json: inf": (SEEDS | {"Alien": [math.inf]}, "Alien holds Infinity"),
    "a.json: huge": (SEEDS | {"Alien": [10**400]}, "Alien holds 1000"),
    "a.json: text in a list": (SEEDS | {"Alien": ["744"]}, 'Alien holds "744"'),
    "a.json: bool": (SEEDS | {"Alien": [True]}, "Alien holds true"),
    "a.json: two names": (SEEDS | {"ALE/Alien-v5": [1]}, "Alien, seed 0 of a is in"),
    "a.csv: no header": ("Pong,1,20\nPong,2,20\n", "CSV with game, seed, score"),
    "a.csv: no rows": ("game,seed,score\n", "no score in it"),
    "a.csv: empty": ("", "CSV with game, seed, score"),
    "a.csv: short row": ("game,seed,score\nPong,1\n", "CSV with game, seed, score"),
    "a.csv: twice": ("game,seed,score\nPong,1,20\npong,1,21\n", "Pong, seed 1 of a is in"),
    "a.csv: words": ("game,seed,score\nPong,1,high\n", "'high'"),
    "a.csv: nan": ("game,seed,score\nPong,1,nan\n", "Pong holds NaN"),
    "r/result.json: half-written": (json.dumps(result())[:80], "expected"),
    "r/result.json: no protocol": (result(protocol="?"), "expected"),
    "r/result.json: no returns": (result(returns=[]), "expected"),
    "r/result.json: nan": (result(returns=[math.nan]), "Breakout holds NaN"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case, write, capsys):
    content, words = BAD_FILES[case]
    file = write(case.split(":")[0], content)
    message = failure(capsys, file)
    assert words in message and file.name in message


def test_other_refusals(write, tmp_path, capsys):
    assert "no such file or folder" in failure(capsys, tmp_path / "nowhere", "--baselines")
    assert "no such method in []" in failure(capsys)
    assert "no such method in []" in failure(capsys, write("new/args.json", {}).parent)
    assert "--seed at least 0" in failure(capsys, SEEDS_FILE, "--seed", -1)
    a = write("a/result.json", result())
    assert "Breakout, seed 1 of jedi is in" in failure(capsys, a, write("b/result.json", result()))
    assert "seed 1 of jedi is in" in failure(capsys, a, a)
    one = write("one.json", {"Pong": [1]})
    two = write("two.json", {"Qbert": [1]})
    assert "no game in common" in failure(capsys, one, two, "--compare", "one", "two")
    message = failure(capsys, one, two, "--compare", "one", "three")
    assert "no such method in ['one', 'two']" in message


# ---------------------------------------------------------------- output
def test_aggregates_are_over_the_games_in_common(write, capsys, few_resamples):
    """An empty list is a game that was not run; environments of one's own are in no aggregate."""
    scores = {"Pong": [20.0], "Qbert": [1000.0], "Krull": [], "mine:Toy-v0": [1.0]}
    file = write("ours.json", scores)
    assert run(file, SEEDS_FILE, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert "INCOMPLETE: aggregates are over 2 of 26 games" in told["remarks"]
    expected = [ev.normalise(game, np.mean(SEEDS[game])) for game in ("Pong", "Qbert")]
    assert told["aggregates"]["diamond_seeds"]["mean"][0] == pytest.approx(np.mean(expected))
    assert run(file, write("other.json", {"Alien": [1]})) == 0
    assert "mean" not in cells(capsys.readouterr().out)  # there is no game in common


def test_baselines_quote_or_omit_what_needs_seeds(write, capsys):
    assert run("--baselines") == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 125
    rows = cells(out)
    assert rows["iqm"][2:] == ["0.13", "0.459", "0.501", "-", "-", "0.641", "0.688"]
    assert rows["Alien"][:3] == ["human", "228", "0.00"] and rows["Alien"][-2:] == ["744", "0.07"]
    # quoted are aggregates of 26 games
    assert run("--baselines", write("ours.json", {"Pong": [1.0]})) == 0
    assert "0.688" not in capsys.readouterr().out


def test_json_holds_what_the_terminal_shows(capsys, few_resamples):
    run(SEEDS_FILE, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["scores"] == {"diamond_seeds": SEEDS}
    run(SEEDS_FILE)
    out = capsys.readouterr().out
    assert out.rstrip().endswith("\n".join(told["remarks"])) and "This definition is OURS" in out
    for name, found in told["aggregates"]["diamond_seeds"].items():
        assert " ".join(cells(out)[name]) == ev.interval(*found)


def in_a_process(command, **environment):
    environment = os.environ | environment
    return subprocess.run(
        command,
        shell=True,
        capture_output=True,
        cwd=SCRIPT.parent,
        env=environment,
    )


def test_scores_need_numpy_only():
    others = ["torch", "gymnasium", "ale_py", "tyro", "jedi", "matplotlib", "PIL"]
    code = f"import sys; sys.modules.update(dict.fromkeys({others})); "
    code += f"import evaluate; sys.exit(evaluate.main(['{SEEDS_FILE}']))"
    done = in_a_process(f'{sys.executable} -c "{code}"')
    assert done.returncode == 0 and b"sym_hns" in done.stdout and done.stderr == b""


@pytest.mark.parametrize("encoding", ["cp437", "ascii"])
def test_any_terminal_can_show_it(encoding, write):
    file = write("日本.json", {"Pong": [1]})
    command = f"{sys.executable} evaluate.py --baselines {file}"
    done = in_a_process(command, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and done.stderr == b""
    assert b"sym_hns" in done.stdout and b"??" in done.stdout


def test_a_reader_may_leave_early():
    done = in_a_process(f"{sys.executable} evaluate.py --baselines | head -n 1")
    assert b"SimPLe" in done.stdout and done.stderr == b""


# ---------------------------------------------------------------- curves
def write_run(path, returns):
    """A run whose game i ended at agent step 10 (i + 1)."""
    path.mkdir(parents=True)
    (path / "args.json").write_text("{}")
    lines = []
    for i, x in enumerate(returns):
        lines.append({"global_step": 10 * (i + 1), "charts/episodic_return": x})
    lines.append({"global_step": 50, "world_model/error_1": 0.5, "world_model/error_H": None})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text + '{"global_step": 3')  # the last line was cut off


def test_curves_are_those_of_the_log(tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    drawn = []
    monkeypatch.setattr(axes.Axes, "plot", lambda self, x, y, label: drawn.append((label, x, y)))
    monkeypatch.setattr(axes.Axes, "legend", lambda self: None)
    write_run(tmp_path / "runs" / "Catch__jedi__1", list(range(20)))
    write_run(tmp_path / "runs" / "Catch__mse__1", [5.0])
    png = tmp_path / "curves.png"
    assert run("--curves", tmp_path / "runs", "--plot", png) == 0
    assert png.read_bytes()[:4] == b"\x89PNG"
    (label, steps, means), error_1, error_h, *others = drawn
    assert label == "Catch__jedi__1" and steps == list(range(10, 201, 10))
    assert means[0] == 0 and means[1] == 0.5
    # of the last 10 games
    assert means[-1] == np.mean(range(10, 20))
    assert error_1[1:] == ([50], [0.5]) and error_h[1:] == ([], [])
    assert others[0] == ("Catch__mse__1", [10], [5.0])


def test_refusals_of_curves(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "runs" / "Catch__jedi__1", [1.0])
    assert "--plot PNG" in failure(capsys, "--curves", tmp_path / "runs")
    assert "nothing to draw" in failure(capsys, "--curves", "--plot", tmp_path / "a.png")
    nowhere = tmp_path / "no" / "a.png"
    assert "no/a.png: not written" in failure(capsys, "--curves", tmp_path, "--plot", nowhere)
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    message = failure(capsys, "--curves", tmp_path, "--plot", tmp_path / "a.png")
    assert "pip install matplotlib" in message


# ---------------------------------------------------------------- an agent, its game, its dreams
FORK = '''"""A stand-in for a script that trains.

A frame is of one grey, and its latent is that grey.
"""
from typing import NamedTuple
import dataclasses
import gymnasium as gym
import numpy as np
import torch
from torch import Tensor
from jedi import ReplayBuffer, UsageError

@dataclasses.dataclass
class Args:
    env_id: str = "mine:Grey-v0"
    exp_name: str = "mse"
    seed: int = 1
    horizon: int = 3
    num_conditioning_steps: int = 2
    recency_weights: tuple = (1.0,)
    image_size: int = 8
    total_steps: int = 100
    device: str = "cpu"

class Grey(gym.Env):
    """The grey grows by the action + 1 at every step; a game ends with reward 1 at its 6th step."""
    action_space = gym.spaces.Discrete(2)
    open = 0
    def __init__(self):
        Grey.open += 1
    def close(self):
        Grey.open -= 1
    def get_action_meanings(self):
        return ["STAY", "PUSH"]
    def frame(self):
        return np.full((3, 8, 8), self.grey, np.uint8)
    def reset(self):
        self.grey = 10
        self.steps = 0
        return self.frame(), {}
    def step(self, act):
        self.grey += act + 1
        self.steps += 1
        return self.frame(), float(self.steps == 6), self.steps == 6, False, {}

def make_env(env_id, seed, image_size):
    if env_id != "mine:Grey-v0":
        raise UsageError(f"--env-id {env_id}: no such game")
    return Grey()

class Rollout(NamedTuple):
    z: Tensor
    real: Tensor
    act: Tensor
    rew: Tensor
    end: Tensor

class Agent(torch.nn.Module):
    """Always pushes."""
    def __init__(self, args, num_actions):
        super().__init__()
        self.args = args
        self.weight = torch.nn.Parameter(torch.zeros(num_actions))
    def encoder(self, obs):
        return obs[..., :1, :1, :1].float()  # [..., 1, 1, 1]
    def act(self, obs, state=None, epsilon=0.0):
        return 1, state

def imagine(agent, z, act, real, horizon, actions=None):
    """Right but for the 3rd step, when it stands still. The dream ends at its 4th step."""
    if actions is None:
        actions = torch.ones(len(z), horizon, dtype=torch.long)
    moves = (actions + 1.0) * (torch.arange(horizon) != 2)
    dreamt = z[:, -1:] + moves.cumsum(1)[..., None, None, None]
    end = (torch.arange(horizon) == 3).float().expand(len(z), -1)
    return Rollout(torch.cat([z, dreamt], 1), real, actions, 2 * end, end)

def evaluate_policy(agent, env_id, num_episodes, seed):
    assert Grey.open == 0
    returns = [float(seed + i) for i in range(num_episodes)]
    found = dataclasses.asdict(agent.args) | {"preset": "small", "atari": False, "returns": returns}
    found["protocol"] = {"policy": "sampled", "eval_seed": seed}
    return found | {"mean_return": float(np.mean(returns))}
'''


@pytest.fixture
def fork(write):
    """A finished run of a fork, whose script has a name of its own."""
    torch = pytest.importorskip("torch")
    path = write("runs/Grey__mse__1/jedi_mse.py", FORK).parent
    torch.save({"agent": {"weight": torch.zeros(2)}, "global_step": 77}, path / "ckpt.pt")
    write("runs/Grey__mse__1/args.json", {"exp_name": "mse"})
    write("runs/Grey__mse__1/result.json", result())
    return path


def content(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def greys_of(path, size, columns=1, rows=1):
    """The grey in the middle of every frame of a picture or film, row by row."""
    film = pytest.importorskip("PIL.Image").open(path)
    found = []
    for page in range(getattr(film, "n_frames", 1)):
        film.seek(page)
        for y in range(rows):
            for x in range(columns):
                at = ((size + 8) * x + size // 2, (size + 28) * y + size // 2)
                found.append(film.convert("RGB").getpixel(at)[0])
    return found


def test_looking_leaves_the_run_as_it_was(fork, tmp_path, capsys):
    pytest.importorskip("PIL")
    before = content(fork)
    assert run("--checkpoint", fork, "--episodes", 2) == 0
    assert run("--checkpoint", fork, "--episodes", 2, "--out", tmp_path / "score.json") == 0
    assert run("--imagine", fork, tmp_path / "strip.png") == 0
    assert run("--dream", fork, tmp_path / "dream.gif", "--steps", 7) == 0
    assert run(fork.parent) == 0
    assert content(fork) == before
    written = sorted(file.name for file in tmp_path.iterdir())
    assert written == ["dream.gif", "runs", "score.json", "strip.png"]


def test_a_score_is_one_like_that_of_training(fork, tmp_path, capsys):
    out = tmp_path / "score.json"
    assert run("--checkpoint", fork, "--episodes", 4, "--seed", 5, "--out", out) == 0
    assert "mean return 6.50 of 4 games" in capsys.readouterr().out
    assert run(out) == 0
    printed = capsys.readouterr().out
    assert cells(printed)["mine:Grey-v0"] == ["6.5"] and "'global_step': 77" in printed


def test_strips_show_reality_and_imagination_under_its_actions(fork, tmp_path):
    """In the picture as in the tensors. A frame that nobody recorded is shown as the nearest."""
    pytest.importorskip("PIL")
    agent = ev.Run(fork, None, seed=0)
    replay = agent.play(1000)
    assert replay.data["obs"][:7, 0, 0, 0].tolist() == [10, 12, 14, 16, 18, 20, 22]
    films = agent.imagine(replay)
    columns = max(len(film[0]) for film in films)
    pixels = []
    for real, imagined in zip(films[::2], films[1::2]):
        first = int(real[0][0, 0, 0, 0])  # the frame after the action at the context's last one
        steps = min(3, (22 - first) // 2 + 1)  # to the horizon, or to the end of the game at 22
        moving = [first, first + 2, first + 4][:steps]
        still = [first, first + 2, first + 2][:steps]  # imagination stands still at its 3rd step
        assert real[0][:, 0, 0, 0].tolist() == moving and imagined[0][:, 0, 0, 0].tolist() == still
        assert real[1].tolist() == imagined[1].tolist() == [1] * steps
        assert real[2].tolist() == real[3].tolist() == [int(grey == 22) for grey in moving]
        for greys in (moving, still):
            pixels += greys + [255] * (columns - steps)
    assert run("--imagine", fork, tmp_path / "strip.png") == 0
    assert greys_of(tmp_path / "strip.png", 128, columns, rows=8) == pixels


def test_a_dream_is_as_long_as_asked_and_begins_anew_after_its_end(fork, tmp_path):
    pytest.importorskip("PIL")
    agent = ev.Run(fork, None, seed=0)
    frames, act, rew, end = agent.dream(agent.play(1000), 6)
    shown = frames[:, 0, 0, 0].tolist()
    second = min(shown[0] + 2, 22)  # nothing brighter was recorded
    assert shown[1:4] == [second, second, min(second + 2, 22)] and len(shown) == 6
    assert rew[:6].tolist() == [0, 0, 0, 2, 0, 0] and end[:6].tolist() == [0, 0, 0, 1, 0, 0]
    assert run("--dream", fork, tmp_path / "dream.gif", "--steps", 6) == 0
    film = zip(shown, rew[:6].tolist(), end[:6].tolist())
    # equal ones in a row are one page, shown longer
    pages = [page for page, _ in itertools.groupby(film)]
    assert greys_of(tmp_path / "dream.gif", 320) == [grey for grey, _, _ in pages]


def test_pages_of_a_film_are_drawn_when_they_are_written(fork, tmp_path, monkeypatch):
    """So that one of them is in memory, not all."""
    pytest.importorskip("PIL")
    pages = []
    most = []
    draw = ev.draw

    def counted(*arguments):
        page = draw(*arguments)
        pages.append(weakref.ref(page))
        most.append(sum(ref() is not None for ref in pages))
        return page

    monkeypatch.setattr(ev, "draw", counted)
    assert run("--dream", fork, tmp_path / "dream.gif", "--steps", 40) == 0
    assert len(most) == 40 and max(most) <= 3


def test_refusals_of_looking(fork, tmp_path, capsys, monkeypatch):
    pytest.importorskip("PIL")
    before = content(fork)
    assert "at least 1" in failure(capsys, "--checkpoint", fork, "--episodes", 0)
    assert "at least 1" in failure(capsys, "--dream", fork, tmp_path / "a.gif", "--steps", 0)
    assert "nowhere: no run of" in failure(capsys, "--checkpoint", tmp_path / "nowhere")
    assert "no run of" in failure(capsys, "--dream", "game.gif", fork)  # the two swapped
    message = failure(capsys, "--dream", fork, tmp_path / "a.gif", "--device", "toaster")
    assert "no device" in message
    assert "a.abc: not written" in failure(capsys, "--imagine", fork, tmp_path / "a.abc")
    assert "no/a.gif: not written" in failure(capsys, "--dream", fork, tmp_path / "no" / "a.gif")
    assert run("--checkpoint", fork, "--out", fork / "result.json") == 2
    assert "result.json: not written" in capsys.readouterr().err
    assert content(fork) == before
    for module in ("PIL", "PIL.ImageFont"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "pip install pillow" in failure(capsys, "--imagine", fork, tmp_path / "a.png")


BROKEN = {
    "no checkpoint": ("ckpt.pt", None, "no whole checkpoint"),
    "truncated checkpoint": ("ckpt.pt", 300, "no whole checkpoint"),
    "other settings": ("args.json", '{"lstm_layers": 3}', "lstm_layers"),
    "half-written settings": ("args.json", '{"seed"', "no run of"),
    "unknown game": ("args.json", '{"env_id": "mine:Blue-v0"}', "mine:Blue-v0: no such game"),
    "other networks": (
        "jedi_mse.py",
        FORK.replace("torch.zeros(num_actions)", "torch.zeros(9)"),
        "is not of",
    ),
}


@pytest.mark.parametrize("file, change, words", BROKEN.values(), ids=BROKEN)
def test_broken_runs(file, change, words, fork, capsys):
    whole = (fork / file).read_bytes()
    (fork / file).unlink()
    if isinstance(change, int):
        (fork / file).write_bytes(whole[:change])
    if isinstance(change, str):
        (fork / file).write_text(change)
    assert words in failure(capsys, "--checkpoint", fork)


def test_what_an_environment_raises_keeps_its_traceback(fork, tmp_path):
    pytest.importorskip("PIL")
    broken = FORK.replace("self.grey += act + 1", "open('/nonexistent/level')")
    (fork / "jedi_mse.py").write_text(broken)
    with pytest.raises(FileNotFoundError, match="level"):
        run("--dream", fork, tmp_path / "a.gif")


# ---------------------------------------------------------------- names of actions
class Five(gym.Env):
    action_space = gym.spaces.Discrete(5)

    def get_action_meanings(self):
        return ["WAIT", "A", "B", "C", "D"]


class Short(Five):
    def get_action_meanings(self):
        return ["WAIT", "A"]


class Unnamed(gym.Env):
    action_space = gym.spaces.Discrete(5)


class Reverse(gym.ActionWrapper):
    """Of as many actions as the game, in another order."""

    def action(self, action):
        return 4 - action


class Chosen(gym.Wrapper):
    """Offers some actions of the game."""

    def __init__(self, env, count):
        super().__init__(env)
        self.action_space = gym.spaces.Discrete(count)


class Named(Chosen):
    def get_action_meanings(self):
        return ["D", "C"]


NAMED = {
    "the game's": (Five(), ["WAIT", "A", "B", "C", "D"]),
    "kept by a wrapper": (gym.wrappers.TimeLimit(Five(), 9), ["WAIT", "A", "B", "C", "D"]),
    "the outermost": (gym.wrappers.TimeLimit(Named(Five(), 2), 9), ["D", "C"]),
    "the outermost, too few": (Named(Five(), 3), None),
    "too few": (Short(), None),
    "none": (gym.wrappers.TimeLimit(Unnamed(), 9), None),
    "fewer actions": (Chosen(Five(), 3), None),
    "as many other actions": (gym.wrappers.TimeLimit(Chosen(Five(), 5), 9), None),
    "another order": (Reverse(Five()), None),
}


@pytest.mark.parametrize("env, names", NAMED.values(), ids=NAMED)
def test_names_of_actions(env, names):
    assert ev.action_names(env) == (names or [f"action {i}" for i in range(env.action_space.n)])


# ---------------------------------------------------------------- end to end, with the real jedi.py
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real run of seconds: what it returned, and its directory."""
    import jedi

    runs = tmp_path_factory.mktemp("trained")
    returned = jedi.main(tiny(runs_dir=str(runs)))
    [path] = runs.iterdir()
    return returned, path


def test_a_real_run_can_be_looked_at_and_stays_as_it_is(trained, tmp_path, capsys):
    """Also: agent, seed and games of the final score give the final score again."""
    pytest.importorskip("PIL")
    returned, path = trained
    before = content(path)
    final = json.loads((path / "result.json").read_text())
    seed = final["protocol"]["eval_seed"]
    out = tmp_path / "score.json"
    assert run("--checkpoint", path, "--episodes", 3, "--seed", seed, "--out", out) == 0
    score = json.loads(out.read_text())
    for key in ("returns", "protocol", "global_step"):
        assert score[key] == final[key]
    assert run("--imagine", path, tmp_path / "strip.png") == 0
    assert run("--dream", path, tmp_path / "dream.gif", "--steps", 12) == 0
    capsys.readouterr()
    assert run(path.parent, f"again={out}") == 0
    assert "tests.toy:Catch-v0" in cells(capsys.readouterr().out)
    assert content(path) == before


