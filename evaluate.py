"""evaluate.py: Atari 100k scores -> the aggregates that papers quote, with intervals and without the usual mistakes.

    python evaluate.py runs/*                          # what jedi.py wrote: one run directory per game and seed
    python evaluate.py scores.json OURS=other.json     # {"Alien": [one score per seed], ...}: the format peers publish
    python evaluate.py --baselines                     # the published methods alone, or beside yours
    python evaluate.py --checkpoint runs/<run>         # play a trained agent, headless, and write its result.json

Needs numpy only; jedi.py is imported for --checkpoint, matplotlib for --plot, pillow for --video.
Letters: G games, N runs (the seeds of all games), R bootstrap resamples. HNS: human-normalised score.
"""

import argparse
import csv
import difflib
import glob
import json
import re
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

# ---------------------------------------------------------------- constants
# game, random, human, SimPLe, TWM, IRIS, DreamerV3, STORM, DIAMOND; left the Agent-Optimal games, right the Human-Optimal ones.
# random, human: the table of SPR, IRIS, STORM and DIAMOND (results/data/RANDOM.json and HUMAN.json of eloialonso/iris).
# Methods: means over seeds as printed in DIAMOND (SimPLe, TWM, IRIS, DIAMOND) and in STORM (DreamerV3, STORM).
TABLE = """\
Assault 222.4 742 527.2 682.6 1524.4 706 801 1526.4 | Alien 227.8 7127.7 616.9 674.6 420 959 984 744.1
Boxing 0.1 12.1 7.8 77.5 70.1 78 80 86.9 | Amidar 5.8 1719.5 74.3 121.8 143 139 205 225.8
Breakout 1.7 30.5 16.4 20 83.7 31 16 132.5 | Asterix 210 8503.3 1128.3 1116.6 853.6 932 1028 3698.5
CrazyClimber 10780.5 35829.4 62583.6 71820.4 59324.2 97190 66776 99167.8 | BankHeist 14.2 753.1 34.2 466.7 53.1 649 641 19.7
Freeway 0 29.6 16.7 24.3 31.1 0 34 33.3 | BattleZone 2360 37187.5 4031.2 5068 13074 12250 13540 4702
Gopher 257.6 2412.5 596.8 1674.8 2236.1 3730 8240 5897.9 | ChopperCommand 811 7387.8 979.4 1697.4 1565 420 1888 1369.8
Jamesbond 29 302.8 100.5 362.4 462.7 445 509 427.4 | DemonAttack 152.1 1971 208.1 350.2 2034.4 303 165 288.1
Kangaroo 52 3035 51.2 1240 838.2 4098 4208 5382.2 | Frostbite 65.2 4334.7 236.9 1475.6 259.1 909 1316 274.1
Krull 1598 2665.5 2204.8 6349.2 6616.4 7782 8413 8610.1 | Hero 1027 30826.4 2656.6 7254 7037.4 11161 11044 5621.8
KungFuMaster 258.5 22736.3 14862.5 24554.6 21759.8 21420 26182 18713.6 | MsPacman 307.3 6951.6 1480 1588.4 999.1 1327 2673 1958.2
Pong -20.7 14.6 12.8 18.8 14.6 18 11 20.4 | PrivateEye 24.9 69571.3 35 86.6 100 882 7781 114.3
RoadRunner 11.5 7845 5640.6 9109 9614.6 15565 17564 20673.2 | Qbert 163.9 13455 1288.8 3330.8 745.7 3405 4522 4499.3
UpNDown 533.4 11693.2 3350.3 15981.7 3546.2 7600 7985 3856.3 | Seaquest 68.4 42054.7 683.3 774.4 661.3 618 525 551.2
"""
HALVES = [[part.split() for part in column] for column in zip(*(line.split(" | ") for line in TABLE.splitlines()))]
AGENT_OPTIMAL, HUMAN_OPTIMAL = ([game for game, *_ in half] for half in HALVES)
SCORES = {game: tuple(map(float, scores)) for half in HALVES for game, *scores in half}  # {game: (random, human, SimPLe, ...)}
PUBLISHED = {  # paper, its evaluation protocol, IQM and optimality gap of its published per-seed file if that file agrees
    "SimPLe": ("Kaiser et al. 2020, arXiv 1903.00374", "not known", [0.130, 0.729]),
    "TWM": ("Robine et al. 2023, arXiv 2303.07109", "100 episodes, no no-ops, FIRE after a lost life", [0.459, 0.513]),
    "IRIS": ("Micheli et al. 2023, arXiv 2209.00588", "100 episodes, temperature 0.5, 1 no-op", [0.501, 0.512]),
    "DreamerV3": ("Hafner et al. 2023, arXiv 2301.04104", "training episodes", [None, None]),
    "STORM": ("Zhang et al. 2023, arXiv 2310.09615", "20 episodes, no no-ops, sticky actions in its code", [None, None]),
    "DIAMOND": ("Alonso et al. 2024, arXiv 2405.12399", "100 episodes, temperature 1, 1 to 30 no-ops", [0.641, 0.480]),
}
HALVES_TEXT = """Agent-Optimal (AO) are the 13 games with the highest HNS averaged over IRIS, TWM, DreamerV3 and STORM, Human-Optimal (HO)
the other 13: the even partition of arXiv 2505.19698 v3, recomputed from the published means because no list of it is public."""
SYM_HNS = """harmonic mean of the halves, 2 HO AO / (HO + AO). This definition is OURS: arXiv 2505.19698 v3 introduces Sym-HNS, but
no public text gives its formula. If a half is at or below 0 (random), it is the lower half, its limit at 0."""
AGGREGATES = {  # key: (label, which is best: 1 highest, -1 lowest, 0 neither, decimals, definition)
    "mean": ("Mean", 1, 3, "mean over games of the mean over seeds of HNS = (score - random) / (human - random)"),
    "median": ("Median", 1, 3, "median over games of the mean over seeds"),
    "iqm": ("IQM", 1, 3, "mean of the middle half of all runs x games, not of the game means (Agarwal et al. 2021)"),
    "optimality_gap": ("Optimality gap", -1, 3, "1 - mean of min(HNS, 1) over all runs x games; lower is better"),
    "superhuman": ("Superhuman games", 1, 0, "games whose mean over seeds is at or above human"),
    "human_optimal": ("Human-Optimal mean", 1, 3, "HO, mean over the Human-Optimal games"),
    "agent_optimal": ("Agent-Optimal mean", 1, 3, "AO, mean over the Agent-Optimal games"),
    "asymmetry": ("Asymmetry AO / HO", 0, 2, "AO / HO, undefined unless both are above 0"),
    "sym_hns": ("Sym-HNS (harmonic)", 1, 3, SYM_HNS),
    "sym_hns_geometric": ("Sym-HNS (geometric)", 1, 3, "the same with sqrt(HO AO), for comparison"),
    "harmonic_hns": ("Harmonic HNS (+0.1)", 1, 3, "1 / mean of 1 / (HNS + 0.1), arXiv 2605.13013 eq. 10; needs HNS > -0.1"),
}
RESAMPLES = 50_000


class Problem(Exception):
    """A mistake that the user can mend. Its text is one line: where, what is wrong, the remedy."""


# ---------------------------------------------------------------- aggregates and their bootstrap
def flatten(scores, games):
    """{game: [one score per seed]} -> HNS of all runs, ascending [N], and the index of each one's game in `games` [N]."""
    hns = [(np.asarray(scores[game], float) - SCORES[game][0]) / (SCORES[game][1] - SCORES[game][0]) for game in games]
    index = np.repeat(np.arange(len(games)), [len(seeds) for seeds in hns])
    order = np.argsort(np.concatenate(hns), kind="stable")
    return np.concatenate(hns)[order], index[order]


def bootstrap_counts(index, resamples, seed):
    """Stratified bootstrap: every game draws as many runs as it has from its own runs, with replacement. index [N] from
    `flatten`. Yields how often each run was drawn, [<= R, N] in chunks of 2 MB."""
    rng, size, seeds = np.random.default_rng(seed), len(index), np.bincount(index)
    by_game = np.argsort(index, kind="stable")  # [N] the runs of game 0, then those of game 1, ...
    start, seeds = (np.cumsum(seeds) - seeds)[index[by_game]], seeds[index[by_game]]  # [N] of the game of each
    for done in range(0, resamples, chunk := max(1, 2**18 // size)):
        rows = min(chunk, resamples - done)
        drawn = by_game[start + (rng.random((rows, size)) * seeds).astype(int)]  # [rows, N]
        yield np.bincount((drawn + size * np.arange(rows)[:, None]).ravel(), minlength=rows * size).reshape(rows, size)


def aggregate(hns, index, agent, weights):
    """Every entry of AGGREGATES for R weightings of the same runs: {key: [R]}, nan where undefined.

    hns [N] ascending and index [N] from `flatten`; agent [G], is the game Agent-Optimal; weights [R, N], rows sum to 1.
    IQM cuts floor(N / 4) / N of the weight at either end: rliable's trim_mean(0.25) if all games have as many seeds."""
    means = weights @ (hns[:, None] * (index[:, None] == np.arange(len(agent)))) * len(agent)  # [R, G]
    trim = len(hns) // 4 / len(hns)
    kept = np.diff(np.clip(np.cumsum(weights, axis=1), trim, 1 - trim), axis=1, prepend=trim)  # [R, N]
    ao, ho = (means[:, half].mean(axis=1) if half.any() else np.full(len(means), np.nan) for half in (agent, ~agent))
    positive, lower = (ao > 0) & (ho > 0), np.minimum(ao, ho)
    with np.errstate(all="ignore"):  # where() computes both of its branches
        return {
            "mean": means.mean(axis=1),
            "median": np.median(means, axis=1),
            "iqm": kept @ hns / (1 - 2 * trim),
            "optimality_gap": 1 - weights @ np.minimum(hns, 1),
            "superhuman": (means >= 1 - 1e-9).sum(axis=1),
            "human_optimal": ho,
            "agent_optimal": ao,
            "asymmetry": np.where(positive, ao / ho, np.nan),
            "sym_hns": np.where(positive, 2 * ao * ho / (ao + ho), lower),
            "sym_hns_geometric": np.where(positive, np.sqrt(ao * ho), lower),
            "harmonic_hns": np.where((means > -0.1).all(axis=1), 1 / np.mean(1 / (means + 0.1), axis=1), np.nan),
        }


def summarise(scores, games, seed=0):
    """{game: [one score per seed]} -> {key: [value, low, high]}, ends of a 95 % percentile interval, None where undefined. A run
    weighs 1 / (G x seeds of its game). No interval if some game has a single seed or some resample is undefined."""
    hns, index = flatten(scores, games)
    seeds, agent = np.bincount(index), np.array([game in AGENT_OPTIMAL for game in games])
    weight = 1 / (len(games) * seeds[index])  # [N]
    point = aggregate(hns, index, agent, weight[None])
    counts = bootstrap_counts(index, RESAMPLES if seeds.min() > 1 else 0, seed)
    draws = [aggregate(hns, index, agent, weight * count) for count in counts] or [{key: [np.nan] for key in point}]
    ends = {key: np.percentile(np.concatenate([draw[key] for draw in draws]), [2.5, 97.5]) for key in point}
    return {key: [float(x) if np.isfinite(x) else None for x in (point[key][0], *ends[key])] for key in point}


# ---------------------------------------------------------------- reading
def canonical_game(name, path):
    """'MsPacman', 'MsPacmanNoFrameskip-v4', 'ALE/MsPacman-v5' or 'ms_pacman' -> 'MsPacman'."""
    known = {game.lower(): game for game in SCORES}
    key = re.sub(r"^ALE/|^atari_|(NoFrameskip|Deterministic)?-v\d+$", "", str(name))
    if (key := re.sub(r"[\W_]", "", key).lower()) not in known:
        close = [f"did you mean {known[k]}? Rename" for k in difflib.get_close_matches(key, known, n=1)] or ["remove"]
        raise Problem(f"{path}: unknown game '{name}'; {close[0]} it (--baselines lists the 26 games of Atari 100k)")
    return known[key]


def read_scores(pairs, path):
    """(("Alien", [one score per seed]), ...) -> {game: [float, ...]}, checked, with canonical names."""
    if not isinstance(pairs, tuple) or not pairs:
        raise Problem(f'{path}: expected {{"Alien": [one score per seed], ...}}, got {json.dumps(pairs)[:40]}; rewrite it')
    scores = {}
    for name, values in pairs:
        if (game := canonical_game(name, path)) in scores:
            raise Problem(f"{path}: {game} appears twice, perhaps under two names; merge the two or remove one")
        bad = [v for v in values if type(v) not in (int, float) or not abs(v) < 1e15] if isinstance(values, list) else [values]
        if bad or not values:
            raise Problem(f"{path}: {game} must be a list of finite numbers, not {json.dumps([*bad, []][0])[:40]}; mend or remove it")
        scores[game] = [float(value) for value in values]
    return scores


def read_file(path):
    """-> method, {game: [scores]}, seed, protocol. Either {"Alien": [one score per seed], ...}, the format of DIAMOND, IRIS, STORM
    and TWM (seed None), or the result.json of a run, whose score is the mean return of its episodes."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=tuple)  # a dict would hide repeated names
    except (OSError, ValueError, RecursionError) as error:
        raise Problem(f"{path}: unreadable, half-written or not JSON ({error}); write it again or leave it out") from error
    run = dict(data) if isinstance(data, tuple) else {}
    if path.name != "result.json" and "returns" not in run:
        return path.stem, read_scores(data, path), None, {"protocol": f"not recorded in {path}"}
    if missing := [key for key in ("env_id", "exp_name", "seed", "returns", "protocol", "global_step") if key not in run]:
        raise Problem(f"{path}: no result of jedi.py, '{missing[0]}' is missing; delete it and score the run with --checkpoint")
    [(game, returns)] = read_scores(((run["env_id"], run["returns"]),), path).items()
    protocol = dict(run["protocol"]) | {key: run.get(key) for key in ("preset", "global_step")}
    return str(run["exp_name"]), {game: [float(np.mean(returns))]}, run["seed"], protocol


def read_methods(arguments):
    """Paths, patterns and NAME=PATH -> {name: method}. Files and runs of one name (given, exp_name or stem) are one method:
    scores {game: [one score per seed]}, origin {(game, seed): path}, protocols {path: dict}, quoted (of PUBLISHED ones)."""
    methods = {}
    for argument in arguments:
        given, _, pattern = ("", "", argument) if Path(argument).exists() else argument.rpartition("=")
        if not (paths := [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))):  # Windows leaves * to us
            raise Problem(f"{pattern}: no files matched; check the path")
        for path in map(Path, paths):
            if path.is_dir() and not (path / "result.json").exists():
                print(f"note: {path} left out: no result.json, unfinished? (A folder of runs is given as {path}/*)", file=sys.stderr)
                continue
            name, scores, seed, protocol = read_file(path / "result.json" if path.is_dir() else path)
            method = methods.setdefault(name := given or name, SimpleNamespace(scores={}, origin={}, protocols={}, quoted=None))
            for game, values in scores.items():
                if clash := [p for (g, s), p in method.origin.items() if g == game and (None in (s, seed) or s == seed)]:
                    raise Problem(f"{path}: '{name}' has {game}, seed {seed}, from {clash[0]}; leave one out or pass NAME={path}")
                method.origin[game, seed] = path
                method.scores.setdefault(game, []).extend(values)
            method.protocols[path] = {key: value for key, value in protocol.items() if key != "eval_seed"}
    return methods


# ---------------------------------------------------------------- report
def make_records(methods, games, seed):
    """{name: method} -> flat records: the csv and json output, and what the table shows. The aggregates are over `games`."""
    show = lambda x: f"{x:.0f}" if abs(x) >= 1000 else f"{x:.1f}"  # noqa: E731
    records, texts = [], [(key, text) for key, (*_, text) in AGGREGATES.items()] + [("halves", HALVES_TEXT), ("cells", CELLS)]
    texts += [("intervals", f"95 % percentile, stratified bootstrap over seeds, {RESAMPLES} resamples, seed {seed}")]
    notes = [f"INCOMPLETE: all aggregates are over the {len(games)} of 26 games that every method has"] * (len(games) < 26)
    for name, method in methods.items():
        for game, seeds in method.scores.items():
            (random, human, *_), mean, std = SCORES[game], float(np.mean(seeds)), float(np.std(seeds, ddof=len(seeds) > 1))
            hns, spread = (mean - random) / (human - random), f" ±{show(std):<5}" * (len(seeds) > 1)
            record = {"kind": "game", "name": game, "random": random, "human": human, "method": name, "value": mean, "seeds": seeds}
            text = f"{show(mean)}{spread} {round(hns, 2) + 0.0:.2f}"  # + 0.0: no -0.00
            records.append(record | {"std": std if seeds[1:] else None, "hns": hns, "text": text})
        summary = summarise(method.scores, games, seed)
        summary |= {key: [x if len(games) == 26 else None, None, None] for key, x in method.quoted.items()}
        for key, (value, low, high) in summary.items():
            held = {"agent_optimal": AGENT_OPTIMAL, "human_optimal": HUMAN_OPTIMAL}.get(key, SCORES)
            over, digits = f"{len(set(held) & set(games))} of {len(held)} games", AGGREGATES[key][2]
            text = "-" if value is None else f"{value:.{digits}f}" + "†" * (key in method.quoted)
            text += "" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
            record = {"kind": "aggregate", "name": key, "over": over, "method": name, "value": value, "low": low, "high": high}
            records.append(record | {"text": text})
        path, *more = method.protocols
        protocol = " / ".join({", ".join(f"{key} {value}" for key, value in run.items()): 0 for run in method.protocols.values()})
        texts.append((name, f"{path}{f' and {len(more)} more' * bool(more)}; {protocol}"))
        low, high = min(seeds := [len(method.scores[game]) for game in games]), max(seeds)
        notes += [f"{name}: single scores, so no interval; if they are means, IQM and gap are wrong"] * (low == 1 and not method.quoted)
        notes += [f"{name}: {low} to {high} seeds a game, all used: games weigh the same, the seeds of one share"] * (low < high)
        notes += [f"{name}: exactly 0 in Freeway, a failure to explore (see the README)"] * (0 in method.scores.get("Freeway", []))
    runs = [run for method in methods.values() for run in method.protocols.values()]
    if keys := [key for key in dict.fromkeys(key for run in runs for key in run) if len({str(run.get(key)) for run in runs}) > 1]:
        notes.append(f"WARNING, mixed protocols, compare with care: {', '.join(keys)} differ (see the sources)")
    texts += [("note", text) for text in notes]
    return records + [{"kind": "text", "name": name, "text": " ".join(text.split())} for name, text in texts]


# ---------------------------------------------------------------- output
def render(records, names, markdown):
    """Records -> text: the games by half, the aggregates, then definitions, sources and notes. 100 columns, or markdown."""
    rows, groups = [["", "random", "human", *(f"{name} " for name in names)]], {"Agent-Optimal games": AGENT_OPTIMAL}
    for title, members in (groups | {"Human-Optimal games": HUMAN_OPTIMAL, "Aggregates": AGGREGATES}).items():
        rows.append([title] + [""] * (len(names) + 2))
        for member in members:
            if found := {r["method"]: r for r in records if r["name"] == member and r["kind"] != "text"}:
                one, (label, sign, *_) = [*found.values()][0], AGGREGATES.get(member, (member, 1))
                label += f", {one['over']}" * (one.get("over", "26")[:2] != "26" and one["over"] != "13 of 13 games")
                ranks = {name: sign * r["value"] for name, r in found.items() if sign and names[1:] and r["value"] is not None}
                cells = [(found[name]["text"], ranks.get(name, np.inf) == max(ranks.values())) if name in found else ("-",0) for name in names]
                rows.append([label, *(f"{one[x]:.0f}"... , *[text + "*" if best else " "]])
    texts = [f"{r['name']}: {r['text']}" for r in records if r["kind"] == "text"]
    if markdown:
        lines = ["| " + " | ".join(f"**{x[:-1]}**" if x.endswith("*") else x.strip() for x in row) + " |" for row in rows]
        return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:], "", *(f"- {text}" for text in texts)])


def plot(methods, games, records, path):
    """Left: performance profiles, the share of runs x games above each HNS. Right: the two halves of every method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    profile, halves = figure.subplots(1, 2)
    for i, (name, method) in enumerate(methods.items()):
        hns, index = flatten(method.scores, games)
        above = 1 - np.cumsum(1 / np.bincount(index)[index]) / len(games)
        profile.step(hns, above, where="post", label=name + " (means over seeds)" * bool(method.quoted))
        for key, marker in (("human_optimal", "o"), ("agent_optimal", "s")):
            [r] = [r for r in records if r["name"] == key and r["method"] == name]
            halves.plot([r["low"], r["high"]], [i, i], f"C{i}")
            halves.plot(r["value"], i, f"C{i}{marker}")
    profile.axvline(1, color="grey", linestyle=":")
    profile.set(xscale="symlog", xlabel="human-normalised score", ylabel="share of runs x games above it")
    figure.savefig(path)


# ---------------------------------------------------------------- playing and the command line
def play(run, episodes, seed, device, video):
    """Plays full games with the agent of a run in jedi.py's own environment, and writes the result.json of that run."""
    import jedi

    if video:
        from PIL import Image
    start, frames, path = time.time(), [] if video else None, Path(run) / "result.json"
    show = lambda done, total: print(f"\r{done} of {total} games, {time.time() - start:.0f} s ", end="", file=sys.stderr, flush=True)
    try:
        args, agent, step = jedi.load_agent(path.parent, device)
        games = jedi.evaluate_policy(agent, args.env_id, episodes, seed, progress=show, frames=frames)
    except jedi.UsageError as error:
        raise Problem(str(error)) from error
    result = jedi.make_result(args, games, step, time.time() - start, episodes=episodes, eval_seed=seed)
    if path.exists():
        kept = next(p for i in range(1, 10**6) if not (p := path.with_name(f"result.{i}.json")).exists())
        print(f"\nthe earlier result is now {path.rename(kept)}")
    jedi.write_json(path, result)
    print(f"\n{path}: {result['game']}, mean return {result['mean_return']:.1f} of {episodes} games")
    if video:
        first, *rest = map(Image.fromarray, frames)
        first.save(video, save_all=True, append_images=rest, duration=67, loop=0)


def main(argv=None):
    """Exit code: 0, or 2 after a mistake of the user, told in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="run directories, score files, patterns of them; NAME=PATH names the method")
    parser.add_argument("--baselines", action="store_true", help="add the published methods that no file of yours replaces")
    parser.add_argument("--allow-missing", action="store_true", help="accept methods that lack some of the 26 games")
    parser.add_argument("--format", choices=("terminal", "markdown", "csv", "json"), default="terminal")
    parser.add_argument("--plot", metavar="PNG", help="also draw performance profiles and the two halves")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap, or of the games to play")
    parser.add_argument("--checkpoint", metavar="RUN", help="play the agent of this run directory instead")
    parser.add_argument("--episodes", type=int, default=100, help="full games to play")
    parser.add_argument("--device", default="auto", help="where the agent plays")
    parser.add_argument("--video", metavar="GIF", help="record the first game")
    options = parser.parse_args(argv)
    try:
        if options.checkpoint:
            return play(options.checkpoint, options.episodes, options.seed, options.device, options.video)
        methods = read_methods(options.paths)
        for i, (name, (paper, protocol, quoted)) in enumerate(PUBLISHED.items() if options.baselines else ()):
            scores = {game: [row[2 + i]] for game, row in SCORES.items()}
            methods.setdefault(name, SimpleNamespace(scores=scores, protocols={paper: {"protocol": protocol}}, quoted=quoted))
        if not methods:
            raise Problem("nothing to evaluate; give finished runs, score files, --baselines or --checkpoint RUN")
        for name, method in methods.items():
            if (missing := sorted(set(SCORES) - set(method.scores))) and not options.allow_missing:
                some = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
                raise Problem(f"{[*method.protocols][0]} ({name}): {len(missing)} of 26 games missing ({some}); pass --allow-missing")
        if not (games := [game for game in SCORES if all(game in method.scores for method in methods.values())]):
            raise Problem(f"{' and '.join(methods)} have no game in common; compare them on the same games")
        records = make_records(methods, games, options.seed)
        if options.plot:
            plot(methods, games, records, options.plot)
    except ImportError as error:
        raise Problem
    except Problem as problem:
        print(f"error: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
    if options.format == "json":
        print(json.dumps(records, indent=1))
    elif options.format == "csv":
        writer = csv.DictWriter(sys.stdout, dict.fromkeys(key for record in records for key in record))
        writer.writeheader()
        writer.writerows(records)
    else:
        print(render(records, list(methods), options.format == "markdown"))


if __name__ == "__main__":
    sys.exit(main())
