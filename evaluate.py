"""evaluate.py: Atari 100k scores -> the aggregates that papers quote, with intervals; and pictures of what an agent imagines.

    python evaluate.py runs OURS=scores.json            # finished runs below; {"Alien": [score per seed], ...} of peers
    python evaluate.py runs --compare mse jedi          # mse - jedi with intervals, and the probability of improvement
    python evaluate.py --baselines                      # the published methods alone, or beside yours
    python evaluate.py --checkpoint runs/<run>          # the score of a trained agent over --episodes full games
    python evaluate.py --imagine runs/<run> strip.png   # film strips: reality, and imagination under the same actions
    python evaluate.py --dream runs/<run> dream.gif     # the policy plays in imagination alone, --steps long
    python evaluate.py --video runs/<run> game.gif      # the policy plays a real game
    python evaluate.py --curves runs --plot curves.png  # returns and imagination error of all runs while they trained

Looking changes no run: only files that you name are written. Scores need numpy alone, --curves matplotlib, pictures pillow,
agents what jedi.py needs. HNS: human-normalised score. G games, N runs, R resamples; other letters of shapes as in jedi.py.
"""

import argparse
import dataclasses
import importlib.util
import json
import re
import sys
import time
from pathlib import Path

import numpy as np

# game random human SimPLe TWM IRIS DreamerV3 STORM DIAMOND; Agent-Optimal games on the left. random, human: as in SPR, DIAMOND
# Methods: means over seeds as printed in DIAMOND (SimPLe, TWM, IRIS, DIAMOND) and in STORM (DreamerV3, STORM).
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
PUBLISHED = {  # paper, its evaluation protocol, IQM, optimality gap, mean, harmonic HNS: printed or from its seeds
    "SimPLe": ("Kaiser et al. 2020, arXiv 1903.00374", "not known", [0.130, 0.729]),
    "TWM": ("Robine et al. 2023, arXiv 2303.07109", "100 episodes, no no-ops, FIRE after a lost life", [0.459, 0.513]),
    "IRIS": ("Micheli et al. 2023, arXiv 2209.00588", "100 episodes, temperature 0.5, 1 no-op", [0.501, 0.512]),
    "DreamerV3": ("Hafner et al. 2023, arXiv 2301.04104", "training episodes", [None, None]),
    "STORM": ("Zhang et al. 2023, arXiv 2310.09615", "20 episodes, no no-ops, sticky actions in its code", [None, None]),
    "DIAMOND": ("Alonso et al. 2024, arXiv 2405.12399", "100 episodes, temperature 1, 1 to 30 no-ops", [0.641, 0.480]),
    "JEDI": ("arXiv 2605.13013", "not known, nor are its scores per game", [0.688, 0.460, 1.450, 0.377]),
}
AGGREGATES = "mean median iqm optimality_gap superhuman human_optimal agent_optimal asymmetry sym_hns harmonic_hns".split()
NOTES = """\
score ± std over seeds, HNS; aggregates of HNS, [95 % interval]; † quoted; IQM and gap need seeds, not their means
agent_optimal (AO): 13 games of highest mean HNS of IRIS, TWM, DreamerV3, STORM; human_optimal (HO): the others; by us
sym_hns: Sym-HNS, 2 HO AO / (HO + AO), or the lower half if one is <= 0. This definition is OURS, see README"""
RESAMPLES = 50_000
LOOKS = {"checkpoint": ".json", "imagine": ".png", "dream": ".gif", "video": ".gif"}  # what they write


def outcome(rew, end):
    """A reward, if it is nearer to 1 than to 0 (an imagined one is an expectation), and a mark."""
    return f"{round(float(rew)):+} " * bool(round(float(rew))) + (end if type(end) is str else "END" * bool(end))


show = lambda score: f"{score:.0f}" if abs(score) >= 100 else f"{score:.1f}"  # noqa: E731


class Problem(Exception):
    """A mistake that the user can mend. Its text is one line: where, what is wrong, the remedy."""


# ---------------------------------------------------------------- aggregates and their bootstrap
def flatten(scores, games):
    """{game: [one score per seed]} -> HNS of all runs, ascending [N], raw where there is no human score; their games [N]."""
    ends = [SCORES.get(game, (0, 1)) for game in games]
    hns = [(np.asarray(scores[game], float) - low) / (high - low) for game, (low, high, *_) in zip(games, ends)]
    index = np.repeat(np.arange(len(games)), [len(seeds) for seeds in hns])
    order = np.argsort(np.concatenate(hns), kind="stable")
    return np.concatenate(hns)[order], index[order]


def bootstrap_counts(index, resamples, seed):
    """Stratified: each game draws from its own runs. index [N] -> how often each was drawn, [<= R, N], in chunks of 2 MB."""
    rng = np.random.default_rng(seed)
    for done in range(0, resamples, chunk := max(1, 2**18 // len(index))):
        counts = np.empty((min(chunk, resamples - done), len(index)), int)
        for game, seeds in enumerate(np.bincount(index)):
            counts[:, index == game] = rng.multinomial(seeds, np.full(seeds, 1 / seeds), len(counts))
        yield counts


def aggregate(hns, index, agent, weights):
    """{key of AGGREGATES: [R]}, nan where undefined, for R weightings of the same runs. hns [N] ascending, index [N] as above;
    agent [G], is the game Agent-Optimal; weights [R, N], rows sum to 1. IQM is rliable's trim_mean(0.25) of equal weights."""
    means = weights @ (hns[:, None] * (index[:, None] == np.arange(len(agent)))) * len(agent)  # [R, G]
    mean, median, superhuman = means.mean(axis=1), np.median(means, axis=1), (means >= 1 - 1e-9).sum(axis=1)
    trim = len(hns) // 4 / len(hns)
    kept = np.diff(np.clip(np.cumsum(weights, axis=1), trim, 1 - trim), axis=1, prepend=trim)  # [R, N]
    iqm, gap = kept @ hns / (1 - 2 * trim), 1 - weights @ np.minimum(hns, 1)
    ao, ho = (means[:, half].mean(axis=1) if half.any() else np.full(len(means), np.nan) for half in (agent, ~agent))
    positive = (ao > 0) & (ho > 0)
    with np.errstate(all="ignore"):  # where() computes both of its branches
        asymmetry = np.where(positive, ao / ho, np.nan)
        sym_hns = np.where(positive, 2 * ao * ho / (ao + ho), np.minimum(ao, ho))
        harmonic = np.where((means > -0.1).all(axis=1), 1 / np.mean(1 / (means + 0.1), axis=1), np.nan)
    return dict(zip(AGGREGATES, (mean, median, iqm, gap, superhuman, ho, ao, asymmetry, sym_hns, harmonic)))


def summarise(scores, games, seed=0, other=None):
    """{game: [one score per seed]} -> {key of AGGREGATES: [value, low, high]}, 95 % interval, None if undefined. With `other`
    scores: the difference, and "better", the probability of improvement P(>) + P(=) / 2 over games (Agarwal et al. 2021)."""
    (x, i), (y, j) = flatten(scores, games), flatten(other or scores, games)  # [N], [N2]
    agent, index = np.isin(games, HALVES["Agent-Optimal"]), np.concatenate([i, j + len(games)]) if other else i
    wins = ((x[:, None] > y) + (x[:, None] == y) / 2) * (i[:, None] == j)  # [N, N2]
    seeds, results = np.bincount(index), []
    for counts in (np.ones((1, len(index))), *bootstrap_counts(index, RESAMPLES * (seeds.min() > 1), seed)):
        u, v = np.split(counts / (len(games) * seeds[index]), [len(x)], axis=1)  # [R, N], [R, N2 or 0]
        results.append(aggregate(x, i, agent, u))
        if other:
            second, better = aggregate(y, j, agent, v), len(games) * ((u @ wins) * v).sum(axis=1)
            results[-1] = {key: results[-1][key] - second[key] for key in second} | {"better": better}
    point, *draws = results
    ends = {k: np.percentile(np.concatenate([d[k] for d in draws]), [2.5, 97.5]) if draws else [np.nan] * 2 for k in point}
    return {key: [float(x) if np.isfinite(x) else None for x in (point[key][0], *ends[key])] for key in point}


# ---------------------------------------------------------------- reading
def game_of(name):
    """ms_pacman, MsPacmanNoFrameskip-v4, ALE/MsPacman-v5 -> MsPacman; tests.toy:Catch-v0 -> Catch, of no human score."""
    name = re.sub(r"^.*[:/]|^atari_|(NoFrameskip|Deterministic)?-v\d+$", "", name)
    return {game.lower(): game for game in SCORES}.get(re.sub(r"[\W_]", "", name).lower(), name)


def read_file(path):
    """-> method, {game: [scores]}, seed, protocol. The file is {"Alien": [one score per seed], ...}, as DIAMOND, IRIS, STORM
    and TWM publish it (seed: None), or the result.json of a run, whose score is the mean return of its episodes."""
    try:
        pairs = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=tuple)  # a dict would hide repeated names
    except (OSError, ValueError, RecursionError) as error:
        raise Problem(f"{path}: unreadable, half-written or not JSON ({error}); write it again or leave it out") from error
    run = dict(pairs) if isinstance(pairs, tuple) else {}
    if is_run := path.name == "result.json" or "returns" in run:
        kinds = {"env_id": str, "exp_name": str, "seed": int, "returns": list, "protocol": tuple, "global_step": int}
        if bad := [key for key, kind in kinds.items() if not isinstance(run.get(key), kind)]:
            raise Problem(f"{path}: no result of jedi.py, no valid '{bad[0]}'; leave it out, or let its run finish")
        pairs = ((run["env_id"], run["returns"]),)
    if not isinstance(pairs, tuple) or not pairs:
        raise Problem(f'{path}: expected {{"Alien": [one score per seed], ...}}, got {json.dumps(pairs)[:40]}; rewrite it')
    scores = {}
    for name, values in pairs:
        bad = [v for v in values if type(v) not in (int, float) or not abs(v) < 1e15] if isinstance(values, list) else [values]
        if bad or not values or (game := game_of(name)) in scores:
            raise Problem(
                f"{path}: {name} must appear once, with a list of finite numbers, not {json.dumps(bad)[:40]}; mend it"
            )
        scores[game] = [float(np.mean(values))] if is_run else [float(value) for value in values]
    if not is_run:
        return path.stem, scores, None, "protocol not recorded"
    protocol = {k: v for k, v in run["protocol"] if k != "eval_seed"} | {k: run.get(k) for k in ("preset", "global_step")}
    return run["exp_name"], scores, run["seed"], ", ".join(f"{key} {value}" for key, value in protocol.items())


def find(path, name):
    """A file, or every file `name` in and below a directory, with a note of the runs that have none."""
    found = [path] if path.is_file() else sorted(path.rglob(name))
    runs = {path} if not found else {file.parent for file in path.rglob("args.json")}
    if left_out := sorted(map(str, runs - {file.parent for file in found})):
        print(f"note: no {name} in {', '.join(left_out)}, left out", file=sys.stderr)
    return found


def read_methods(arguments):
    """Paths and NAME=PATH -> {name: method}. Files and runs of one name (given, exp_name or stem) are one method: scores
    {game: [one score per seed]}, protocols {text: first path}, quoted {} (aggregates that only a paper knows)."""
    methods, origin = {}, {}
    for argument in arguments:
        given, _, pattern = ("", "", argument) if Path(argument).exists() else argument.rpartition("=")
        for path in find(Path(pattern), "result.json"):
            name, scores, seed, protocol = read_file(path)
            method = methods.setdefault(name := given or name, {"scores": {}, "protocols": {}, "quoted": {}})
            for game, values in scores.items():
                if (other := origin.setdefault((name, game, seed), path)) is not path:
                    raise Problem(f"{path}: {game} of this method and seed is in {other}, too; drop one or pass NEW={path}")
                method["scores"].setdefault(game, []).extend(values)
            method["protocols"].setdefault(protocol, str(path))
    return methods


# ---------------------------------------------------------------- output
def interval(value, low, high, digits=3, mark=""):
    text, *ends = ("-" if x is None else f"{x:z.{digits}f}".removesuffix(".000") for x in (value, low, high))
    return text + mark * (text != "-") + (f" [{', '.join(ends)}]" if low is not None else "")


def compare(a, b, seed):
    """Scores of two methods -> the cells of a - b: each game of both in raw returns, the aggregates, P(A > B)."""
    cells, both, games = {}, sorted(a.keys() & b.keys()), sorted(a.keys() & b.keys() & SCORES.keys())
    if not both:
        raise Problem("--compare: no game in common; compare two methods on the same games")
    for game in both:
        random, human = SCORES.get(game, (0, 1))[:2]
        cells[game] = interval(*(x and x * (human - random) for x in summarise(a, [game], seed, b)["mean"]), 1)
    summary = (summarise(a, games, seed, b) if games else {}) | {"P(A > B)": summarise(a, both, seed, b)["better"]}
    return cells | {key: interval(*found) for key, found in summary.items() if key != "better"}


def render(table, games):
    """{name of a column: {game or key: text}} -> lines: the games by half, then the aggregates."""
    raw = {member for cells in table.values() for member in cells} - {*SCORES, *AGGREGATES, "P(A > B)"}
    titles = HALVES | {"Raw returns": sorted(raw), f"Aggregates, {len(games)} of 26 games": [*AGGREGATES, "P(A > B)"]}
    table = {end: {game: show(SCORES[game][i]) for game in SCORES} for i, end in enumerate(("random", "human"))} | table
    rows = [["", *table]]
    for title, members in titles.items():
        shown = [member for member in members if any(member in cells for cells in [*table.values()][2:])]
        rows += [[title, *[""] * len(table)]] * bool(shown)
        rows += [[member, *(cells.get(member, "") for cells in table.values())] for member in shown]
    left, *widths = [1 + max(map(len, column)) for column in zip(*rows)]
    return [(label.ljust(left) + "".join(map(str.rjust, cells, widths))).rstrip() for label, *cells in rows]


def score(options):
    """Prints the table of the methods that are asked for, and what must be said of them, or all as JSON."""
    methods, table, remarks = read_methods(options.paths), {}, NOTES.splitlines()
    for i, (name, (paper, protocol, quoted)) in enumerate(PUBLISHED.items() if options.baselines else ()):
        scores = {game: [row[2 + i]] for game, row in SCORES.items() if len(row) > 2 + i}
        quoted = dict(zip(("iqm", "optimality_gap", "mean", "harmonic_hns"), quoted))
        methods.setdefault(name, {"scores": scores, "protocols": {protocol: paper}, "quoted": quoted})
    if not methods or set(options.compare or ()) - set(methods):
        raise Problem(f"nothing to evaluate or --compare; methods: {', '.join(methods) or 'none'}; give runs or score files")
    methods = {name: methods[name] for name in options.compare or methods}
    known = [method["scores"] for method in methods.values() if set(SCORES) & set(method["scores"])]
    games = [game for game in SCORES if known and all(game in scores for scores in known)]
    for name, method in methods.items():
        scores, quoted, cells = method["scores"], method["quoted"], table.setdefault(name, {})
        for game, seeds in scores.items():
            spread = f" ±{show(np.std(seeds, ddof=1)):<5}" if len(seeds) > 1 else ""
            hns = f" {flatten(scores, [game])[0].mean():z.2f}" if game in SCORES else ""
            cells[game] = show(np.mean(seeds)) + spread + hns
        found = method["aggregates"] = summarise(scores, games, options.seed) if games and set(games) <= set(scores) else {}
        found |= {key: [x if len(games) == 26 else None, None, None] for key, x in quoted.items()}
        cells |= {key: interval(*x, mark="†" * (key in quoted)) for key, x in found.items()}
        remarks += [f"{name}: {protocol}; {path}" for protocol, path in method["protocols"].items()]
        if 0 < len(lacks := sorted(set(SCORES) - set(scores))) < 26:
            remarks.append(f"{name}: INCOMPLETE, {len(lacks)} of 26 games missing ({', '.join(lacks[:3])}, ...)")
    if names := options.compare:
        table[" - ".join(names)] = compare(*(methods[name]["scores"] for name in names), options.seed)
    if len({protocol for method in methods.values() for protocol in method["protocols"]}) > 1:
        remarks.append("WARNING: mixed protocols (see above), compare with care")
    result = json.dumps({"methods": methods, "remarks": remarks}, indent=1)
    print(result if options.json else "\n".join(render(table, games) + remarks))


def read_curves(path):
    """metrics.jsonl -> {"return" (mean of the last 10 games), "score", "hours", "error_<h>": [n, 2] of agent steps, value}."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]  # the last may be half-written
    names = {"charts/episodic_return": "return", "eval/episodic_return": "score", "charts/hours": "hours"}
    names |= {key: key.split("/")[1] for line in lines for key in line if key.startswith("world_model/error_")}
    found = {name: [(line["global_step"], line[k]) for line in lines if line.get(k) is not None] for k, name in names.items()}
    games = np.array(found["return"])
    found["return"] = [(step, games[max(0, i - 9) : i + 1, 1].mean()) for i, (step, _) in enumerate(found["return"])]
    return {name: np.array(curve) for name, curve in found.items() if curve}


def draw_curves(files, path):
    """A column per game, over agent steps: return, imagination error, hours; the mean of each method, and its seeds."""
    from matplotlib.figure import Figure

    runs = {}  # {game: {(method, curve): [[n, 2] of a seed]}}
    for file in files:
        args = json.loads((file.parent / "args.json").read_text())
        for name, curve in read_curves(file).items():
            runs.setdefault(game_of(args["env_id"]), {}).setdefault((args["exp_name"], name), []).append(curve)
    if not runs or not path:
        raise Problem("--curves: nothing to draw, or nowhere; give run directories or a folder of them, and --plot PNG")
    figure = Figure(figsize=(7 * len(runs), 11), layout="constrained")
    for column, (game, curves) in zip(figure.subplots(3, len(runs), squeeze=False).T, runs.items()):
        for i, (y, scale) in enumerate({"return": "linear", "imagination error": "log", "hours": "linear"}.items()):
            column[i].set(xlabel="agent steps", ylabel=y, title=game, yscale=scale)
        for i, label, value in zip((1, 0, 0), ("no change", "random", "human"), (1, *SCORES.get(game, ()))):
            column[i].axhline(value, color="gray", linestyle="--" if label == "random" else "-.", label=label)
        for (method, name), seeds in curves.items():
            last, axes = [seed[-1, 1] for seed in seeds], column[2 if name == "hours" else int(name.startswith("error"))]
            label = f"{method}, {name}, seeds: {len(seeds)}, last {np.mean(last):.3g} ({min(last):.3g} to {max(last):.3g})"
            print(f"{game}, {label}")
            colour = f"C{sorted({m for m, _ in curves}).index(method)}"
            style = colour + {"score": "D", "error_1": ":", "error_5": "--"}.get(name, "-")
            grid = np.unique(np.concatenate(seeds)[:, 0])
            values = np.ma.masked_invalid([np.interp(grid, *seed.T, np.nan, np.nan) for seed in seeds])
            axes.plot(grid, values.T, style, alpha=0.3)
            axes.plot(grid, values.mean(0), style, label=label)
            axes.legend()
    figure.savefig(path, format="png", dpi=100)


# ---------------------------------------------------------------- an agent and what it imagines
class Run:
    """A run directory, its networks built by the script in it, for a fork's differ; without one by jedi.py, as it is here."""

    def __init__(self, path, device, seed):
        global torch  # scores do without it
        import torch

        if len(sources := list(Path(path).glob("*.py")) or [Path(__file__).with_name("jedi.py")]) != 1:
            raise Problem(f"{path}: holds several scripts; leave the one that trained it, or none for the jedi.py beside this")
        sys.dont_write_bytecode = True  # looking leaves no __pycache__ there
        spec = importlib.util.spec_from_file_location("source_of_run", sources[0])
        self.source = sys.modules["source_of_run"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.source)
        state = self.source.load_checkpoint(Path(path))
        name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.zeros(1, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise Problem(f"--device {name}: {str(error).splitlines()[0]}") from None
        try:
            self.args = self.source.Args(**json.loads(Path(path, "args.json").read_text()) | {"device": str(device)})
            self.env = self.source.make_env(self.args.env_id, seed, self.args.image_size)
            self.agent = self.source.Agent(self.args, int(self.env.action_space.n)).to(device).requires_grad_(False)
            self.agent.load_state_dict(state["agent"])
        except (TypeError, RuntimeError) as error:
            what = str(error).splitlines()[-1].strip()
            raise Problem(f"{path}: made by another {sources[0].name} than this ({what}); use the one in there") from None
        self.replay = self.source.ReplayBuffer(self.args, device)  # empty where there are the weights alone
        if "replay" in state:
            self.replay.load_state_dict(state["replay"])
        self.now = self.args.num_conditioning_steps - 1  # a context's last frame
        torch.manual_seed(seed)
        self.rng = torch.Generator(self.replay.obs.device).manual_seed(seed)

    def play(self, steps):
        """The sampled policy in a real game, at most `steps` steps of it: [(next frame, action, reward, mark, value)]."""
        (obs, _), state, mark, film = self.env.reset(), None, "", []
        while len(film) < steps and not mark:
            z = self.agent.encoder(torch.from_numpy(obs).to(self.rng.device)[None, None])  # [1, 1, C, h, w]
            logits, value, state = self.agent.actor_critic(z, None, state)
            act = int(torch.nn.functional.gumbel_softmax(logits[:, 0]).argmax())
            obs, rew, terminated, truncated, _ = self.env.step(act)
            mark = "END" if terminated else "TRUNCATED" * truncated
            film.append((torch.from_numpy(obs), act, float(rew), mark, float(value)))
        return film

    def roll(self, contexts, horizon, forced):
        """Imagines from contexts of the replay, under the real actions or the policy's -> what was recorded, the rollout."""
        batch = self.replay.sample(contexts, self.now, horizon, self.rng)
        obs, act, real = (x[:, : self.now + 1] for x in (batch.obs, batch.act, batch.real))
        actions = batch.act[:, self.now : -1] if forced else None
        return batch, self.source.imagine(self.agent, self.agent.encoder(obs), act, real, horizon, actions)

    def retrieve(self, z, *more):
        """z [..., C, h, w] -> the recorded frames, or of `more`, whose own latents are nearest: there is no decoder."""
        frames = torch.cat([self.replay.obs[: self.replay.size : 1 + self.replay.size // 10_000], *more])
        known = torch.cat([self.agent.encoder(part) for part in frames.split(256)]).flatten(1)  # [N, C h w]
        distance = torch.cdist(z.flatten(-3).flatten(0, -2), known, compute_mode="donot_use_mm_for_euclid_dist")  # exact
        return frames[distance.argmin(1)].unflatten(0, z.shape[:-3])  # [..., 3, S, S]

    def imagine(self, names, contexts=64):
        """Imagination under the real actions: share of its frames shown as the real one, by step [H+1]; 4 pairs of strips."""
        batch, rollout = self.roll(contexts, self.args.horizon, forced=True)
        frames, real, act, rew, end = (x[:, self.now :] for x in (batch.obs, batch.real, batch.act, batch.rew, batch.end))
        seen, rows = self.retrieve(rollout.z[:, self.now :], frames[real]), []  # [B, H+1, 3, S, S]
        same = (seen == frames).flatten(2).all(2) & real  # [B, H+1]
        for b, steps in enumerate(map(range, real[:4].sum(1).tolist())):
            acts = ["real", *(f"{names[a]} {outcome(r, e)}" for a, r, e in zip(act[b], rew[b], end[b]))]
            dreamt = ["imagined", *map(outcome, rollout.rew[b], rollout.end[b])]
            rows.append([(frames[b, t], f"{t} {acts[t]}", "gray") for t in steps])
            rows.append([(seen[b, t], f"{t} {dreamt[t]}", "lime" if same[b, t] else "red") for t in steps])
        return (same.sum(0) / real.sum(0)).tolist(), rows

    def dream(self, steps):
        """The policy alone in imagination, from one context after the other, each to its imagined end -> as `play`."""
        _, rollout = self.roll(64, steps, forced=False)
        value = self.agent.actor_critic(rollout.z, rollout.real)[1][:, self.now : -1]  # [B, H]
        alive = rollout.end.cumsum(1) - rollout.end == 0  # [B, H] up to and including the first end
        z, act, rew, end, value = (x[alive][:steps] for x in (rollout.z[:, self.now + 1 :], *rollout[2:5], value))
        return list(zip(self.retrieve(z), act.tolist(), rew.tolist(), ["END" * bool(x) for x in end], value.tolist()))


def draw(rows, size, title):
    """Rows of cells (frame uint8 [3, S, S], text below, colour of its border) -> a picture."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    wide, high, font = size + 8, size + 32, ImageFont.load_default(16)
    picture = Image.new("RGB", (wide * max(map(len, rows)), high * len(rows) + 24), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((4, 2), title, "black", font)
    for y, row in zip(range(24, picture.height, high), rows):
        for x, (frame, text, colour) in zip(range(0, picture.width, wide), row):
            image = Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()).resize((size, size), Image.Resampling.NEAREST)
            picture.paste(ImageOps.expand(image, 3, colour), (x, y))
            pen.text((x + 3, y + size + 7), text, "black", font)
    return picture


def look(options, command, path, picture=None):
    """--imagine, --dream, --video or --checkpoint of the run at `path`: prints what it found, then writes a file, if any."""
    out, total, suffix = picture or options.out, options.episodes, LOOKS[command]
    if min(options.steps, total) < 1 or out and (not out.endswith(suffix) or Path(out).name == "result.json"):
        raise Problem(f"--{command}: must end in {suffix} (only training writes result.json), --steps, --episodes at least 1")
    if command != "checkpoint":
        importlib.import_module("PIL.ImageFont")  # if it is missing, say so before the work
    run, start = Run(path, options.device, options.seed), time.time()
    if command == "checkpoint":
        result = run.source.evaluate_policy(run.agent, run.args.env_id, total, options.seed)
        steps = int(run.replay.has_step.sum()) or run.args.total_steps  # without a replay it has finished
        result |= {"global_step": steps, "wall_time_s": time.time() - start}
        print(f"{result['game']}, mean return {result['mean_return']:.2f} of {total} games", flush=True)
        if out:
            Path(out).write_text(json.dumps(result, indent=1))
        return
    if command != "video" and (options.fresh or not run.replay.size):
        print("contexts from 600 steps of fresh games" + ", for the checkpoint holds no replay" * (not run.replay.size))
        args = dataclasses.replace(run.args, seed=options.seed + 10**6, total_steps=600, compile=False)
        trainer = run.source.Trainer(args, run.agent.num_actions, run.rng.device)
        trainer.agent, run.replay = run.agent, trainer.buffer
        for _ in range(600):
            trainer.collect()
    names = getattr(run.env.unwrapped, "get_action_meanings", lambda: [f"action {i}" for i in range(run.agent.num_actions)])()
    if command == "imagine":
        share, rows = run.imagine(names)
        print(title := "identical to the real frame (green), by step: " + " ".join(f"{x:.0%}" for x in share), flush=True)
        return draw(rows, max(128 // run.args.image_size, 1) * run.args.image_size, title).save(out, "PNG")
    film, pages, score = run.dream(options.steps) if command == "dream" else run.play(options.steps), [], 0.0
    for i, (frame, act, rew, mark, value) in enumerate(film):
        score += rew
        title = f"step {i + 1}   {names[act]}   value {value:.2f}   score {score:.4g}"
        pages.append(draw([[(frame, outcome(rew, mark), "gray")]], 384, title))
    marks = [mark for *_, mark, _ in film]
    ends = f"{marks.count('END')} ends, {marks.count('TRUNCATED')} truncations"
    print(f"{len(film)} steps, {ends}, score {score:.4g}", flush=True)
    times = [*(1500 if mark else 120 for mark in marks[:-1]), 3000]  # ms; the last frame is held
    pages[0].save(out, "GIF", save_all=True, append_images=pages[1:], duration=times, loop=0)


def main(argv=None):
    """Returns the exit code: 0, 2 after a mistake of the user, told in one line, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="runs, folders of them, score files; NAME=PATH names the method")
    parser.add_argument("--baselines", action="store_true", help="add the published methods")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="names of two methods: show them and A - B")
    parser.add_argument("--json", action="store_true", help="print scores, aggregates and remarks as JSON")
    parser.add_argument("--curves", action="store_true", help="draw how the runs trained")
    for command in LOOKS:
        parser.add_argument(f"--{command}", nargs=1 + (command != "checkpoint"), metavar="PATH", help="see above")
    parser.add_argument("--out", "--plot", metavar="FILE", help="JSON of --checkpoint, PNG of --curves")
    parser.add_argument("--fresh", action="store_true", help="imagine from games that the model has not seen, not its replay")
    parser.add_argument("--steps", type=int, default=300, help="of --dream, and at most of --video")
    parser.add_argument("--episodes", type=int, default=100, help="full games of --checkpoint")
    parser.add_argument("--device", default="auto", help="where the agent runs")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap, or of games and imagination")
    options = parser.parse_args(argv)
    try:
        for command in LOOKS:
            if words := getattr(options, command):
                return look(options, command, *words)
        if options.curves:
            return draw_curves([file for path in options.paths for file in find(Path(path), "metrics.jsonl")], options.out)
        score(options)
    except KeyboardInterrupt:
        return 130
    except (Problem, OSError, ImportError, getattr(sys.modules.get("source_of_run"), "UsageError", Problem)) as error:
        name = (isinstance(error, ImportError) and error.name or "").split(".")[0].replace("PIL", "pillow")
        print(" ".join(f"error: {error}{f'; pip install {name}' * bool(name)}".split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
