"""evaluate.py: Atari 100k scores -> the aggregates that papers quote, with intervals and without the usual mistakes.

    python evaluate.py runs/*                          # what jedi.py wrote: one run directory per game and seed
    python evaluate.py scores.json OURS=other.json     # {"Alien": [one score per seed], ...}: the format peers publish
    python evaluate.py --baselines                     # the published methods alone, or beside yours
    python evaluate.py --checkpoint runs/<run>         # play a trained agent, headless, and write its result.json

Only --checkpoint, --plot and --video need more than numpy. HNS: human-normalised score. G games, N runs, R resamples.
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

import numpy as np

# game random human SimPLe TWM IRIS DreamerV3 STORM DIAMOND: Agent-Optimal games on the left, Human-Optimal ones on the right.
# random, human: RANDOM.json, HUMAN.json of eloialonso/iris, as in SPR, STORM and DIAMOND. Methods: means over seeds as printed
# in DIAMOND (SimPLe, TWM, IRIS, DIAMOND) and in STORM (DreamerV3, STORM).
TABLE = """\
Assault 222.4 742 527.2 682.6 1524.4 706 801 1526.4       |Alien 227.8 7127.7 616.9 674.6 420 959 984 744.1
Boxing 0.1 12.1 7.8 77.5 70.1 78 80 86.9                  |Amidar 5.8 1719.5 74.3 121.8 143 139 205 225.8
Breakout 1.7 30.5 16.4 20 83.7 31 16 132.5                |Asterix 210 8503.3 1128.3 1116.6 853.6 932 1028 3698.5
CrazyClimber 10780.5 35829.4 62583.6 71820.4 59324.2 97190 66776 99167.8|BankHeist 14.2 753.1 34.2 466.7 53.1 649 641 19.7
Freeway 0 29.6 16.7 24.3 31.1 0 34 33.3                   |BattleZone 2360 37187.5 4031.2 5068 13074 12250 13540 4702
Gopher 257.6 2412.5 596.8 1674.8 2236.1 3730 8240 5897.9  |ChopperCommand 811 7387.8 979.4 1697.4 1565 420 1888 1369.8
Jamesbond 29 302.8 100.5 362.4 462.7 445 509 427.4        |DemonAttack 152.1 1971 208.1 350.2 2034.4 303 165 288.1
Kangaroo 52 3035 51.2 1240 838.2 4098 4208 5382.2         |Frostbite 65.2 4334.7 236.9 1475.6 259.1 909 1316 274.1
Krull 1598 2665.5 2204.8 6349.2 6616.4 7782 8413 8610.1   |Hero 1027 30826.4 2656.6 7254 7037.4 11161 11044 5621.8
KungFuMaster 258.5 22736.3 14862.5 24554.6 21759.8 21420 26182 18713.6|MsPacman 307.3 6951.6 1480 1588.4 999.1 1327 2673 1958.2
Pong -20.7 14.6 12.8 18.8 14.6 18 11 20.4                 |PrivateEye 24.9 69571.3 35 86.6 100 882 7781 114.3
RoadRunner 11.5 7845 5640.6 9109 9614.6 15565 17564 20673.2|Qbert 163.9 13455 1288.8 3330.8 745.7 3405 4522 4499.3
UpNDown 533.4 11693.2 3350.3 15981.7 3546.2 7600 7985 3856.3|Seaquest 68.4 42054.7 683.3 774.4 661.3 618 525 551.2"""
ROWS = [half.split() for column in zip(*(line.split("|") for line in TABLE.splitlines())) for half in column]
SCORES = {game: tuple(map(float, scores)) for game, *scores in ROWS}  # {game: (random, human, SimPLe, ...)}
HALVES = {"Agent-Optimal": list(SCORES)[:13], "Human-Optimal": list(SCORES)[13:]}
PUBLISHED = {  # paper, its evaluation protocol, IQM and optimality gap of its published per-seed file if that file agrees
    "SimPLe": ("Kaiser et al. 2020, arXiv 1903.00374", "not known", [0.130, 0.729]),
    "TWM": ("Robine et al. 2023, arXiv 2303.07109", "100 episodes, no no-ops, FIRE after a lost life", [0.459, 0.513]),
    "IRIS": ("Micheli et al. 2023, arXiv 2209.00588", "100 episodes, temperature 0.5, 1 no-op", [0.501, 0.512]),
    "DreamerV3": ("Hafner et al. 2023, arXiv 2301.04104", "training episodes", [None, None]),
    "STORM": ("Zhang et al. 2023, arXiv 2310.09615", "20 episodes, no no-ops, sticky actions in its code", [None, None]),
    "DIAMOND": ("Alonso et al. 2024, arXiv 2405.12399", "100 episodes, temperature 1, 1 to 30 no-ops", [0.641, 0.480]),
}
SYM_HNS = """harmonic mean of the halves, 2 HO AO / (HO + AO). This definition is OURS: arXiv 2505.19698 v3 introduces Sym-HNS
but no public text gives its formula. If a half is at or below 0 (random), it is the lower half, its limit at 0."""
HALVES_TEXT = """AO, Agent-Optimal: the 13 games with the highest HNS averaged over IRIS, TWM, DreamerV3 and STORM; HO,
Human-Optimal: the other 13. The even partition of arXiv 2505.19698 v3, made from the published means: no list is public."""
CELLS = """score (mean over seeds), ± standard deviation, HNS. Aggregates are of HNS, with their interval. * best of the row,
- undefined or unknown, † computed from the seeds that were published, for it cannot be computed from means."""
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
show = lambda score: f"{score:.0f}" if abs(score) >= 100 else f"{score:.1f}"  # noqa: E731


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
    """All of AGGREGATES, in their order, for R weightings of the same runs: {key: [R]}, nan where undefined.
    hns [N] ascending and index [N] from `flatten`; agent [G], is the game Agent-Optimal; weights [R, N], rows sum to 1.
    IQM cuts floor(N / 4) / N of the weight at either end: rliable's trim_mean(0.25) if all games have as many seeds."""
    means = weights @ (hns[:, None] * (index[:, None] == np.arange(len(agent)))) * len(agent)  # [R, G]
    mean, median, superhuman = means.mean(axis=1), np.median(means, axis=1), (means >= 1 - 1e-9).sum(axis=1)
    trim = len(hns) // 4 / len(hns)
    kept = np.diff(np.clip(np.cumsum(weights, axis=1), trim, 1 - trim), axis=1, prepend=trim)  # [R, N]
    iqm, gap = kept @ hns / (1 - 2 * trim), 1 - weights @ np.minimum(hns, 1)
    ao, ho = (means[:, half].mean(axis=1) if half.any() else np.full(len(means), np.nan) for half in (agent, ~agent))
    positive, lower = (ao > 0) & (ho > 0), np.minimum(ao, ho)
    with np.errstate(all="ignore"):  # where() computes both of its branches
        asymmetry = np.where(positive, ao / ho, np.nan)
        sym_hns = np.where(positive, 2 * ao * ho / (ao + ho), lower)
        geometric = np.where(positive, np.sqrt(ao * ho), lower)
        harmonic = np.where((means > -0.1).all(axis=1), 1 / np.mean(1 / (means + 0.1), axis=1), np.nan)
    return dict(zip(AGGREGATES, (mean, median, iqm, gap, superhuman, ho, ao, asymmetry, sym_hns, geometric, harmonic)))


def summarise(scores, games, seed=0):
    """{game: [one score per seed]} -> {key: [value, low, high]}, with a 95 % percentile interval, None where undefined. A run
    weighs 1 / (G x seeds of its game). No interval if some game has a single seed or some resample is undefined."""
    hns, index = flatten(scores, games)
    seeds, agent = np.bincount(index), np.array([game in HALVES["Agent-Optimal"] for game in games])
    weight = 1 / (len(games) * seeds[index])  # [N]
    point = aggregate(hns, index, agent, weight[None])
    draws = [aggregate(hns, index, agent, weight * n) for n in bootstrap_counts(index, RESAMPLES * (seeds.min() > 1), seed)]
    ends = {k: np.percentile(np.concatenate([d[k] for d in draws]), [2.5, 97.5]) if draws else [np.nan] * 2 for k in point}
    return {key: [float(x) if np.isfinite(x) else None for x in (point[key][0], *ends[key])] for key in point}


# ---------------------------------------------------------------- reading
def read_scores(pairs, path):
    """(("Alien", [scores]), ...) -> {game: [floats]}, checked. Knows ms_pacman, MsPacmanNoFrameskip-v4, ALE/MsPacman-v5."""
    if not isinstance(pairs, tuple) or not pairs:
        raise Problem(f'{path}: expected {{"Alien": [one score per seed], ...}}, got {json.dumps(pairs)[:40]}; rewrite it')
    scores, known = {}, {game.lower(): game for game in SCORES}
    for name, values in pairs:
        key = re.sub(r"^ALE/|^atari_|(NoFrameskip|Deterministic)?-v\d+$", "", str(name))
        if (key := re.sub(r"[\W_]", "", key).lower()) not in known:
            close = [f"did you mean {known[k]}? Rename" for k in difflib.get_close_matches(key, known, n=1)] or ["remove"]
            raise Problem(f"{path}: unknown game '{name}'; {close[0]} it (--baselines lists the 26 games of Atari 100k)")
        if (game := known[key]) in scores:
            raise Problem(f"{path}: {game} appears twice, perhaps under two names; merge the two or remove one")
        bad = [v for v in values if type(v) not in (int, float) or not abs(v) < 1e15] if isinstance(values, list) else [values]
        if bad or not values:
            raise Problem(f"{path}: {game} must be a list of finite numbers, not {json.dumps([*bad, []][0])[:40]}; mend it")
        scores[game] = [float(value) for value in values]
    return scores


def read_file(path):
    """-> method, {game: [scores]}, seed, protocol. The file is {"Alien": [one score per seed], ...}, as DIAMOND, IRIS, STORM
    and TWM publish it (seed: None), or the result.json of a run, whose score is the mean return of its episodes."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=tuple)  # a dict would hide repeated names
    except (OSError, ValueError, RecursionError) as error:
        raise Problem(f"{path}: unreadable, half-written or not JSON ({error}); write it again or leave it out") from error
    run = dict(data) if isinstance(data, tuple) else {}
    if path.name != "result.json" and "returns" not in run:
        return path.stem, read_scores(data, path), None, {"protocol": f"not recorded in {path.name}"}
    kinds = {"env_id": str, "exp_name": str, "seed": int, "returns": list, "protocol": tuple, "global_step": int}
    if bad := [key for key, kind in kinds.items() if not isinstance(run.get(key), kind)]:
        raise Problem(f"{path}: no result of jedi.py, no valid '{bad[0]}'; delete it and score the run with --checkpoint")
    [(game, returns)] = read_scores(((run["env_id"], run["returns"]),), path).items()
    protocol = {k: v for k, v in run["protocol"] if k != "eval_seed"} | {k: run.get(k) for k in ("preset", "global_step")}
    return run["exp_name"], {game: [float(np.mean(returns))]}, run["seed"], protocol


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
                print(f"note: {path} has no result.json (unfinished? a folder of runs?), left out", file=sys.stderr)
                continue
            name, scores, seed, protocol = read_file(path / "result.json" if path.is_dir() else path)
            method = methods.setdefault(given or name, argparse.Namespace(scores={}, origin={}, protocols={}, quoted={}))
            for game, values in scores.items():
                if clash := [p for (g, s), p in method.origin.items() if g == game and (None in (s, seed) or s == seed)]:
                    raise Problem(f"{path}: {game} of this method and seed is in {clash[0]}, too; drop one or pass NEW={path}")
                method.origin[game, seed] = path
                method.scores.setdefault(game, []).extend(values)
            method.protocols[path] = protocol
    return methods


# ---------------------------------------------------------------- output
def make_records(methods, games, seed):
    """{name: method} -> flat records: the csv and json output, and what the table shows. The aggregates are over `games`."""
    records, texts = [], [(key, text) for key, (*_, text) in AGGREGATES.items()] + [("halves", HALVES_TEXT), ("cells", CELLS)]
    texts += [("intervals", f"95 % percentile, stratified bootstrap over seeds, {RESAMPLES} resamples, seed {seed}")]
    texts += [("INCOMPLETE", f"the aggregates are over {len(games)} of 26 games, those of all methods")] * (len(games) < 26)
    for name, method in methods.items():
        for half, game in [(half, game) for half in HALVES for game in HALVES[half] if game in method.scores]:
            seeds, (random, human, *_) = method.scores[game], SCORES[game]
            mean, std = float(np.mean(seeds)), float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None
            record = {"kind": "game", "name": game, "label": game, "half": half, "method": name, "value": mean, "std": std}
            hns, spread = (mean - random) / (human - random), "" if std is None else f" ±{show(std):<5}"
            text = f"{show(mean)}{spread} {round(hns, 2) + 0.0:.2f}"  # + 0.0: no -0.00
            records.append(record | {"hns": hns, "random": random, "human": human, "seeds": seeds, "text": text})
        summary = summarise(method.scores, games, seed)
        summary |= {key: [x if len(games) == 26 else None, None, None] for key, x in method.quoted.items()}
        for key, (value, low, high) in summary.items():
            label, _, digits, _ = AGGREGATES[key]
            held = HALVES.get(label.removesuffix(" mean"), SCORES)
            over = f"{len(set(held) & set(games))} of {len(held)} games"
            text = "-" if value is None else f"{value:.{digits}f}" + "†" * (key in method.quoted)
            text += "" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
            record = {"kind": "aggregate", "name": key, "label": label + f", {over}" * (len(games) < 26)}
            records.append(record | {"method": name, "value": value, "low": low, "high": high, "over": over, "text": text})
        more, seeds = len(method.protocols) - 1, [len(method.scores[game]) for game in games]
        protocols = dict.fromkeys(", ".join(f"{key} {x}" for key, x in run.items()) for run in method.protocols.values())
        texts.append((name, f"{[*method.protocols][0]}{f' and {more} more' * (more > 0)}; {' / '.join(protocols)}"))
        single, ragged = min(seeds) == 1 and not method.quoted, min(seeds) < max(seeds)
        texts += [(name, "single scores, so no interval; if they are means over seeds, IQM and gap are wrong")] * single
        texts += [(name, f"{min(seeds)} to {max(seeds)} seeds per game, all used: a run weighs 1 / (games x seeds)")] * ragged
        texts += [(name, "a Freeway score of 0: that agent never crossed the road")] * (0 in method.scores.get("Freeway", []))
    runs = [run for method in methods.values() for run in method.protocols.values()]
    keys = [key for key in dict.fromkeys(k for run in runs for k in run) if len({str(run.get(key)) for run in runs}) > 1]
    texts += [("WARNING", f"mixed protocols ({', '.join(keys)}; see above), compare with care")] * bool(keys)
    return records + [{"kind": "text", "name": name, "text": " ".join(text.split())} for name, text in texts]


def render(records, names, markdown):
    """Records -> text: the games by half, the aggregates, then definitions, sources and notes. 100 columns, or markdown."""
    rows = [("", "random", "human", *(f"{name} " for name in names))]
    for title, members in (HALVES | {"Aggregates": AGGREGATES}).items():
        rows.append((title, "", "", *("" for _ in names)))
        for member in members:
            if found := {r["method"]: r for r in records if r["name"] == member and r["kind"] != "text"}:
                sign = AGGREGATES.get(member, ("", 1))[1] if names[1:] else 0
                ranks = {name: sign * r["value"] for name, r in found.items() if r["value"] is not None}
                best = [name for name, rank in ranks.items() if sign and rank == max(ranks.values())]
                cells = [found[name]["text"] + " *"[name in best] if name in found else "- " for name in names]
                one = next(iter(found.values()))
                rows.append((one["label"], *(show(one[x]) if x in one else "" for x in ("random", "human")), *cells))
    texts = [f"{r['name']}: {r['text']}" for r in records if r["kind"] == "text"]
    if markdown:
        lines = ["| " + " | ".join(f"**{x[:-1]}**" if x.endswith("*") else x.strip() for x in row) + " |" for row in rows]
        return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:], "", *(f"- {text}" for text in texts)])
    heads = [f"{label:<14}{random:>6}{human:>6}".rstrip() for label, random, human, *_ in rows]
    left, width, lines = max(map(len, heads)), 1 + max(len(cell) for row in rows for cell in row[3:]), []
    for i in range(3, len(rows[0]), fit := max(1, (100 - left) // width)):  # as many methods side by side as fit
        for head, row in zip(heads, rows):
            lines.append((head.ljust(left) + "".join(cell.rjust(width) for cell in row[i : i + fit])).rstrip())
        lines.append("")
    return "\n".join(lines + [textwrap.fill(text, 100, subsequent_indent="  ") for text in texts])


def plot(methods, games, records, path):
    """Left: performance profiles, the share of runs x games above each HNS. Right: the two halves of every method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    profile, halves = figure.subplots(1, 2)
    for i, (name, method) in enumerate(methods.items()):
        hns, index = flatten(method.scores, games)
        above = 1 - np.cumsum(1 / np.bincount(index)[index]) / len(games)
        profile.step([hns[0], *hns], [1, *above], where="post", label=name + " (means over seeds)" * bool(method.quoted))
        for r in records:
            if r["name"] in ("human_optimal", "agent_optimal") and r.get("method") == name and r["value"] is not None:
                halves.plot([r["low"], r["high"]], [i, i], f"C{i}", linewidth=3)
                halves.plot(r["value"], i, f"C{i}" + "os"[r["name"] == "agent_optimal"])
                halves.annotate(f"{r['value']:.2f}", (r["value"], i), (0, 7), textcoords="offset points", ha="center")
    for axes, title in ((profile, "Share of runs x games above HNS"), (halves, "Human-Optimal (o) and Agent-Optimal means")):
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set(xticks=[0, 0.1, 1, 10], xticklabels=["0", "0.1", "1", "10"], title=title, xlabel="HNS (0 random, 1 human)")
        axes.grid(alpha=0.3)
    halves.set(yticks=range(len(methods)), yticklabels=methods, ylim=(len(methods) - 0.5, -0.5))
    profile.legend()
    figure.savefig(path, format="png", dpi=120)


# ---------------------------------------------------------------- playing and the command line
def play(run, episodes, seed, device, video):
    """Plays full games with the agent of a run in jedi.py's own environment, and writes the result.json of that run."""
    import jedi

    if video:
        from PIL import Image
    if episodes < 1:
        raise Problem(f"--episodes {episodes}: nothing to play; ask for at least 1")
    start, frames, path = time.time(), [] if video else None, Path(run) / "result.json"
    progress = lambda done, total: print(f"\r{done}/{total} games", end="\n" * (done == total), file=sys.stderr)  # noqa: E731
    args, agent, step = jedi.load_agent(path.parent, device)
    games = jedi.evaluate_policy(agent, args.env_id, episodes, seed, progress=progress, frames=frames)
    result = jedi.make_result(args, games, step, time.time() - start, eval_seed=seed)
    if path.exists():
        kept = next(p for i in range(1, 10**6) if not (p := path.with_name(f"result.{i}.json")).exists())
        print(f"the earlier result is now {path.rename(kept)}")
    jedi.write_json(path, result)
    print(f"{path}: {result['game']}, mean return {result['mean_return']:.1f} of {episodes} games")
    if video:
        first, *rest = (Image.fromarray(frame).resize((256, 256)) for frame in frames)
        first.save(video, "GIF", save_all=True, append_images=rest, duration=67, loop=0)


def main(argv=None):
    """Returns the exit code: 0, or 2 after a mistake of the user, told in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="run directories, score files, patterns of them; NAME=PATH names the method")
    parser.add_argument("--baselines", action="store_true", help="add the published methods")
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
        for i, (name, (paper, text, quoted)) in enumerate(PUBLISHED.items() if options.baselines else ()):
            scores, quoted = {game: [row[2 + i]] for game, row in SCORES.items()}, dict(zip(("iqm", "optimality_gap"), quoted))
            methods.setdefault(name, argparse.Namespace(scores=scores, protocols={paper: {"protocol": text}}, quoted=quoted))
        if not methods:
            raise Problem("nothing to evaluate; give finished runs, score files, --baselines or --checkpoint RUN")
        for name, method in methods.items():
            if (missing := sorted(set(SCORES) - set(method.scores))) and not options.allow_missing:
                some = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
                raise Problem(f"{[*method.protocols][0]}: {len(missing)} of 26 games missing ({some}); pass --allow-missing")
        if not (games := [game for game in SCORES if all(game in method.scores for method in methods.values())]):
            raise Problem(f"{' and '.join(methods)} have no game in common; compare them on the same games")
        records = make_records(methods, games, options.seed)
        if options.plot:
            plot(methods, games, records, options.plot)
    except (Problem, OSError, ImportError, getattr(sys.modules.get("jedi"), "UsageError", Problem)) as error:
        text = f"error: {error}" + "; install it with pip (PIL is pillow)" * isinstance(error, ImportError)
        print(" ".join(text.split()), file=sys.stderr)
        return 2
    if options.format == "json":
        print(json.dumps(records, indent=1))
    elif options.format == "csv":
        keys = list(dict.fromkeys(key for record in records for key in record))
        csv.writer(sys.stdout).writerows([keys, *([record.get(key) for key in keys] for record in records)])
    else:
        print(render(records, list(methods), options.format == "markdown"))


if __name__ == "__main__":
    sys.exit(main())
