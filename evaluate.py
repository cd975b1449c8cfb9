"""evaluate.py: the aggregates of Atari 100k that papers quote, and pictures of imagination.

    python evaluate.py runs OURS=scores.json         # finished runs in a folder, a file of scores
    python evaluate.py --baselines                   # published methods, alone or beside yours
    python evaluate.py runs --compare mse jedi       # mse - jedi, and how probably mse is better
    python evaluate.py --checkpoint runs/RUN         # the score of an agent over full games
    python evaluate.py --imagine runs/RUN a.png      # real games, imagined under their actions
    python evaluate.py --dream runs/RUN a.gif        # the policy plays in imagination alone
    python evaluate.py --curves runs --plot a.png    # returns and imagination error in training

A file of scores is {"Alien": [one score per seed], ...} in JSON, or CSV with columns game, seed,
score. --json prints scores and aggregates as JSON. --checkpoint plays --episodes games (100) and
writes --out FILE, if given, as a result.json. --dream takes at most --steps (300). --device is that
of the training, unless given. --seed (0) is that of the bootstrap, or of games and imagination.

Looking changes no run: only the file that you name is written. Scores need numpy alone, --curves
needs matplotlib, pictures need pillow, an agent needs what jedi.py needs.

HNS is the human-normalised score. Shapes: G games, n seeds of a game, N seeds of all games,
R resamples; the other letters are those of jedi.py.
"""

import argparse
import csv
import dataclasses
import importlib
import json
import re
import runpy
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np

# Means over seeds, as printed by DIAMOND (SimPLe, TWM, IRIS, DIAMOND) and STORM (DreamerV3, STORM);
# random and human as in SPR, IRIS and DIAMOND. "agent" marks the 13 Agent-Optimal games, in which
# IRIS, TWM, DreamerV3 and STORM have the highest mean HNS; the other 13 are Human-Optimal.
TABLE = """\
game           half    random    human   SimPLe      TWM     IRIS  DreamerV3  STORM  DIAMOND
Alien          human    227.8   7127.7    616.9    674.6      420        959    984    744.1
Amidar         human      5.8   1719.5     74.3    121.8      143        139    205    225.8
Assault        agent    222.4      742    527.2    682.6   1524.4        706    801   1526.4
Asterix        human      210   8503.3   1128.3   1116.6    853.6        932   1028   3698.5
BankHeist      human     14.2    753.1     34.2    466.7     53.1        649    641     19.7
BattleZone     human     2360  37187.5   4031.2     5068    13074      12250  13540     4702
Boxing         agent      0.1     12.1      7.8     77.5     70.1         78     80     86.9
Breakout       agent      1.7     30.5     16.4       20     83.7         31     16    132.5
ChopperCommand human      811   7387.8    979.4   1697.4     1565        420   1888   1369.8
CrazyClimber   agent  10780.5  35829.4  62583.6  71820.4  59324.2      97190  66776  99167.8
DemonAttack    human    152.1     1971    208.1    350.2   2034.4        303    165    288.1
Freeway        agent        0     29.6     16.7     24.3     31.1          0     34     33.3
Frostbite      human     65.2   4334.7    236.9   1475.6    259.1        909   1316    274.1
Gopher         agent    257.6   2412.5    596.8   1674.8   2236.1       3730   8240   5897.9
Hero           human     1027  30826.4   2656.6     7254   7037.4      11161  11044   5621.8
Jamesbond      agent       29    302.8    100.5    362.4    462.7        445    509    427.4
Kangaroo       agent       52     3035     51.2     1240    838.2       4098   4208   5382.2
Krull          agent     1598   2665.5   2204.8   6349.2   6616.4       7782   8413   8610.1
KungFuMaster   agent    258.5  22736.3  14862.5  24554.6  21759.8      21420  26182  18713.6
MsPacman       human    307.3   6951.6     1480   1588.4    999.1       1327   2673   1958.2
Pong           agent    -20.7     14.6     12.8     18.8     14.6         18     11     20.4
PrivateEye     human     24.9  69571.3       35     86.6      100        882   7781    114.3
Qbert          human    163.9    13455   1288.8   3330.8    745.7       3405   4522   4499.3
RoadRunner     agent     11.5     7845   5640.6     9109   9614.6      15565  17564  20673.2
Seaquest       human     68.4  42054.7    683.3    774.4    661.3        618    525    551.2
UpNDown        agent    533.4  11693.2   3350.3  15981.7   3546.2       7600   7985   3856.3
"""
SCORES = {}  # {game: [random, human, SimPLe, ...]}
HALVES = {}  # {game: "agent" or "human"}
for row in TABLE.splitlines()[1:]:
    game, half, *numbers = row.split()
    HALVES[game] = half
    SCORES[game] = np.array(numbers, float)

# Aggregates that a paper prints or that follow from its seeds, and its evaluation. The inter-
# quartile mean (iqm) and the optimality gap do not follow from means over seeds; None: not known.
PUBLISHED = {
    "random": ({}, "as in SPR, IRIS and DIAMOND"),
    "human": ({}, "as in SPR, IRIS and DIAMOND"),
    "SimPLe": (
        {"iqm": 0.130, "optimality_gap": 0.729},
        "protocol not known; Kaiser et al. 2020, arXiv 1903.00374",
    ),
    "TWM": (
        {"iqm": 0.459, "optimality_gap": 0.513},
        "100 episodes, no no-ops, FIRE after a lost life; Robine et al. 2023, arXiv 2303.07109",
    ),
    "IRIS": (
        {"iqm": 0.501, "optimality_gap": 0.512},
        "100 episodes, temperature 0.5, 1 no-op; Micheli et al. 2023, arXiv 2209.00588",
    ),
    "DreamerV3": (
        {"iqm": None, "optimality_gap": None},
        "training episodes; Hafner et al. 2023, arXiv 2301.04104",
    ),
    "STORM": (
        {"iqm": None, "optimality_gap": None},
        "20 episodes, no no-ops, sticky actions in its code; Zhang et al. 2023, arXiv 2310.09615",
    ),
    "DIAMOND": (
        {"iqm": 0.641, "optimality_gap": 0.480},
        "100 episodes, temperature 1, 1 to 30 no-ops; Alonso et al. 2024, arXiv 2405.12399",
    ),
    "JEDI": (
        {"mean": 1.450, "iqm": 0.688, "optimality_gap": 0.460, "harmonic_hns": 0.377},
        "protocol not known, nor scores per game; arXiv 2605.13013",
    ),
}
LEGEND = """\
games: mean score over seeds, +- its standard deviation, HNS; [95 % interval]; "-": undefined
agent_optimal (AO): games marked "agent"; human_optimal (HO): marked "human"; asymmetry: AO / HO
sym_hns: Sym-HNS, 2 HO AO / (HO + AO), or the lower one if one is <= 0. This definition is OURS
published: iqm, optimality_gap and all of JEDI are quoted, the rest is that of the printed means"""
METRICS = ["charts/episodic_return", "world_model/error_1", "world_model/error_H"]  # of --curves
RESAMPLES = 10_000
CHUNK = 100  # resamples at a time: a hundred seeds per game need little memory


class Problem(Exception):
    """A mistake of the user. Its text is one line: where it is, and what to do."""


@contextmanager
def explained(kinds, text):
    """Turns exceptions of these kinds into a Problem."""
    try:
        yield
    except kinds as error:
        raise Problem(f"{text} ({error})") from error


def need(module, package):
    """Imports a module of an optional package."""
    with explained(ImportError, f"pip install {package}"):
        return importlib.import_module(module)


# ---------------------------------------------------------------- aggregates and their intervals
def normalise(game, score):
    """The HNS of a score: 0 for the random policy, 1 for the human."""
    random, human = SCORES[game][:2]
    return (score - random) / (human - random)


@np.errstate(all="ignore")
def aggregates(games, runs):
    """What papers quote. runs: scores of each game [R, n]; returns {name: [R]}."""
    hns = [normalise(game, x) for game, x in zip(games, runs)]  # [R, n] each
    means = np.stack([x.mean(1) for x in hns], 1)  # [R, G]
    pooled = np.sort(np.concatenate(hns, 1), 1)  # [R, N]
    trim = pooled.shape[1] // 4
    agent = np.array([HALVES[game] == "agent" for game in games])  # [G]
    ao = means @ agent / agent.sum()
    ho = means @ ~agent / (~agent).sum()
    positive = (ao > 0) & (ho > 0)
    defined = (means > -0.1).all(1)
    return {
        "mean": means.mean(1),
        "median": np.median(means, 1),
        "iqm": pooled[:, trim : pooled.shape[1] - trim].mean(1),
        "optimality_gap": 1 - np.minimum(pooled, 1).mean(1),
        "superhuman": (means >= 1 - 1e-9).sum(1),
        "human_optimal": ho,
        "agent_optimal": ao,
        "asymmetry": np.where(positive, ao / ho, np.nan),
        "sym_hns": np.where(positive, 2 * ao * ho / (ao + ho), np.minimum(ao, ho)),
        "harmonic_hns": np.where(defined, 1 / np.mean(1 / (means + 0.1), 1), np.nan),
    }


def difference(games, runs):
    """Method a minus method b: mean scores, P(A > B), aggregates. runs: those of a, then of b.

    P(A > B) is the probability of improvement of Agarwal et al. 2021: of two runs of a game, one
    of each method, how often that of a is better, a tie being half a win; averaged over games.
    """
    a = runs[: len(games)]
    b = runs[len(games) :]
    found = {}
    wins = []
    for game, x, y in zip(games, a, b):
        found[game] = x.mean(1) - y.mean(1)
        x = x[:, :, None]  # [R, n, 1]
        y = y[:, None, :]  # [R, 1, m]
        better = (x > y).mean((1, 2))
        wins.append((better + (x >= y).mean((1, 2))) / 2)
    found["P(A > B)"] = np.mean(wins, 0)
    if set(games) <= set(SCORES):
        second = aggregates(games, b)
        for name, first in aggregates(games, a).items():
            found[name] = first - second[name]
    return found


def bootstrap(statistic, games, runs, seed):
    """The statistic of runs, one list [n] per game, and its interval under a stratified bootstrap.

    A resample draws n runs of each game from its own n. Returns {name: [value, low, high, share]}:
    the 95 % interval of the resamples in which the statistic is defined, and the share of the
    others. A value that is undefined is None; so is the interval if some game has a single run.
    """
    rng = np.random.default_rng(seed)
    draws = []
    if min(map(len, runs)) > 1:
        for _ in range(RESAMPLES // CHUNK):
            draws.append(statistic(games, [rng.choice(x, (CHUNK, len(x))) for x in runs]))
    found = {}
    for name, point in statistic(games, [np.array([x]) for x in runs]).items():
        drawn = np.array([draw[name] for draw in draws])
        defined = drawn[np.isfinite(drawn)]
        found[name] = [None, None, None, 0.0]
        if np.isfinite(point[0]):
            found[name][0] = float(point[0])
        if defined.size:
            found[name][1:3] = np.percentile(defined, [2.5, 97.5]).tolist()
            found[name][3] = 1 - defined.size / drawn.size
    return found


# ---------------------------------------------------------------- reading
def game_of(name):
    """ms_pacman, MsPacmanNoFrameskip-v4, ALE/MsPacman-v5 -> MsPacman; others stay as they are."""
    name_only = r"(?i)^(ALE/|atari(100k)?[_/-])|(NoFrameskip|Deterministic)?-v\d+$|[\W_]"
    letters = re.sub(name_only, "", name).lower()
    for game in SCORES:
        if game.lower() == letters:
            return game
    return name


def read_file(path):
    """A file of scores -> method, protocol, [(game, seed, score)].

    The score of a run is the mean return of its episodes. Its game is one of Atari if ale_py made
    the environment; where that is not recorded, if the environment's id names no module.
    """
    expected = 'a result.json, {"Alien": [one score per seed], ...} or CSV with game, seed, score'
    with explained(Exception, f"{path}: expected {expected}; mend it or leave it out"):
        text = path.read_text(encoding="utf-8-sig")
        rows = []
        if path.suffix.lower() == ".csv":
            header, *lines = text.splitlines()
            for row in csv.DictReader([header.lower().replace(" ", ""), *lines]):
                rows.append((game_of(row["game"]), row["seed"], float(row["score"])))
            return path.stem, "protocol not recorded", rows
        content = json.loads(text)
        if "returns" in content:
            game = content["env_id"]
            if content.get("atari", ":" not in game):
                game = game_of(game.split(":")[-1])
            facts = content["protocol"] | {"episodes": len(content["returns"])}
            facts |= {"preset": content["preset"], "global_step": content["global_step"]}
            del facts["eval_seed"]
            rows.append((game, content["seed"], fmean(content["returns"])))
            return content["exp_name"], str(facts), rows
        for name, scores in content.items():
            if not isinstance(scores, list):
                raise ValueError(f"{name} holds {json.dumps(scores)}")
            for seed, score in enumerate(scores):
                rows.append((game_of(name), seed, score))
        return path.stem, "protocol not recorded", rows


def find(path, name):
    """The file itself, or the files `name` in and below a folder. Says which runs have none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        remedy = "give runs, folders of runs or files of scores"
        raise Problem(f"{path}: no such file or folder; {remedy}")
    found = sorted(path.rglob(name))
    for args in path.rglob("args.json"):
        if args.with_name(name) not in found:
            print(f"note: no {name} in {args.parent}, left out", file=sys.stderr)
    return found


def read_methods(arguments):
    """Paths and NAME=PATH -> {method: {game: [one score per seed]}}, {method: {protocol: a file}}.

    Files of one name (given, exp_name or stem) are one method.
    """
    scores = {}
    protocols = {}
    origin = {}
    for argument in arguments:
        given = None
        path = argument
        if "=" in argument and not Path(argument).exists():
            given, path = argument.split("=", 1)
        for file in find(Path(path), "result.json"):
            method, protocol, rows = read_file(file)
            method = given or method
            if not rows:
                raise Problem(f"{file}: no score in it; leave it out")
            protocols.setdefault(method, {})[protocol] = file
            for game, seed, score in rows:
                if type(score) not in (int, float) or not abs(score) < 1e15:
                    raise Problem(f"{file}: {game} holds {json.dumps(score)}, no finite number")
                run = f"{game}, seed {seed} of {method}"
                if run in origin:
                    raise Problem(f"{file}: {run} is in {origin[run]}, too; drop one or NEW={file}")
                origin[run] = file
                scores.setdefault(method, {}).setdefault(game, []).append(score)
    return scores, protocols


# ---------------------------------------------------------------- tables
def number(x):
    """A score, a difference or an aggregate as text; "-" is undefined."""
    if x is None:
        return "-"
    if abs(x) >= 100:
        return f"{x:.0f}"
    return f"{round(x, 3):zg}"


def interval(value, low, high, _):
    """A value and its interval, as "0.641 [0.578, 0.708]"."""
    if low is None:
        return number(value)
    return f"{number(value)} [{number(low)}, {number(high)}]"


def score_cell(game, seeds):
    """The mean score of some seeds, its standard deviation and HNS."""
    text = number(np.mean(seeds))
    if len(seeds) > 1:
        text += f" +-{number(np.std(seeds, ddof=1)):<6}"
    if game in SCORES:
        text += f" {normalise(game, np.mean(seeds)):z.2f}"
    return text


def render(rows, columns):
    """The lines of a table. A column is {row: text}; its title is in the row without a name."""
    left = max(map(len, rows))
    lines = []
    for row in rows:
        line = f"{row:<{left}} {HALVES.get(row, ''):<5}"
        for cells in columns:
            width = max(map(len, cells.values()))
            line += f"  {cells.get(row, ''):>{width}}"
        lines.append(line)
    return lines


def score(options):
    """Prints the table of the methods asked for, and what must be said of them, or both as JSON."""
    scores, protocols = read_methods(options.paths)
    quoted = {}
    if options.baselines:
        for i, name in enumerate(PUBLISHED):
            if name not in scores:
                scores[name] = {game: [row[i]] for game, row in SCORES.items() if i < len(row)}
                quoted[name], protocol = PUBLISHED[name]
                protocols[name] = {protocol: "as printed"}
    chosen = options.compare or list(scores)
    if not chosen or not set(chosen) <= set(scores):
        raise Problem(f"no such method in {list(scores)}; give finished runs, files or --baselines")
    games = set(SCORES)  # those that all methods with Atari games have
    names = set()
    for name in chosen:
        names |= set(scores[name])
        if set(SCORES) & set(scores[name]):
            games &= set(scores[name])
    games = sorted(games)
    rows = dict.fromkeys(["", *sorted(names)])
    columns = []
    remarks = [LEGEND]
    if len(games) < len(SCORES):
        remarks.append(f"INCOMPLETE: aggregates are over {len(games)} of 26 games")
    results = {}
    for name in chosen:
        results[name] = {}
        if games and set(games) <= set(scores[name]):
            runs = [scores[name][game] for game in games]
            results[name] = bootstrap(aggregates, games, runs, options.seed)
        for key, value in quoted.get(name, {}).items():
            if len(games) < len(SCORES):
                value = None
            results[name][key] = [value, None, None, 0.0]
        for protocol, file in protocols[name].items():
            remarks.append(f"{name}: {protocol}; {file}")
    if options.compare:
        a, b = [scores[name] for name in chosen]
        games = sorted(set(a) & set(b))
        if not games:
            raise Problem("--compare: no game in common; give two methods on the same games")
        runs = [a[game] for game in games] + [b[game] for game in games]
        results[" - ".join(chosen)] = bootstrap(difference, games, runs, options.seed)
    for title, found in results.items():
        cells = {"": title}
        for game, seeds in scores.get(title, {}).items():
            cells[game] = score_cell(game, seeds)
        for key, values in found.items():
            cells[key] = interval(*values)
            rows[key] = None
            if 0 < values[3] < 1:
                share = f"{values[3]:.1%} of resamples"
                remarks.append(f"{title}: {key} is undefined in {share}, left out")
        columns.append(cells)
    if options.json:
        print(json.dumps({"scores": scores, "aggregates": results, "remarks": remarks}, indent=1))
    else:
        print("\n".join(render(rows, columns) + remarks))


# ---------------------------------------------------------------- curves
def draw_curves(options):
    """A picture of training: a row per metric, a line per run of means of the last 10 values."""
    figures = need("matplotlib.figure", "matplotlib")
    files = []
    for path in options.paths:
        files += find(Path(path), "metrics.jsonl")
    if not files or not options.out:
        raise Problem("--curves: nothing to draw, or nowhere; give runs or folders, and --plot PNG")
    figure = figures.Figure(figsize=(12, 15), layout="constrained")
    axes = figure.subplots(len(METRICS))
    for file in files:
        for panel, metric in zip(axes, METRICS):
            steps = []
            values = []
            means = []
            for text in file.read_text().splitlines():
                if not text.endswith("}"):
                    continue  # the last line may be half-written
                line = json.loads(text)
                if line.get(metric) is not None:
                    steps.append(line["global_step"])
                    values.append(line[metric])
                    means.append(fmean(values[-10:]))
            panel.plot(steps, means, label=file.parent.name)
            panel.set(xlabel="agent steps", ylabel=metric)
            panel.legend()
    with explained(Exception, f"{options.out}: not written"):
        figure.savefig(options.out)


# ---------------------------------------------------------------- an agent and what it imagines
class Run:
    """A run directory: its agent, made by the script in it, or by the jedi.py beside this file.

    A film is [frames [T, 3, S, S], the actions that led there [T], rewards [T], ends [T]].
    """

    def __init__(self, path, device, seed):
        torch = need("torch", "torch")
        script = [*Path(path).glob("*.py"), Path(__file__).with_name("jedi.py")][0]
        self.source = SimpleNamespace(**runpy.run_path(str(script)))
        with explained(Exception, f"{path}: no run of {script}, no whole checkpoint, no device"):
            self.args = self.source.Args(**json.loads(Path(path, "args.json").read_text()))
            self.args.device = device or self.args.device
            self.device = torch.zeros(1, device=self.args.device).device
            self.state = torch.load(Path(path, "ckpt.pt"), map_location="cpu", weights_only=True)
        self.env = self.source.make_env(self.args.env_id, seed, self.args.image_size)
        self.agent = self.source.Agent(self.args, self.env.action_space.n).to(self.device)
        with explained(RuntimeError, f"{path}: the checkpoint is not of {script}"):
            self.agent.load_state_dict(self.state["agent"])
        self.agent.requires_grad_(False)
        torch.manual_seed(seed)

    def play(self, steps):
        """A replay of real games that the sampled policy plays, one after the other."""
        args = dataclasses.replace(self.args, total_steps=steps)
        replay = self.source.ReplayBuffer(args, self.device)
        over = True
        for _ in range(steps):
            if over:
                obs, _ = self.env.reset()
                replay.start_episode(obs)
                state = None
            act, state = self.agent.act(obs, state)
            obs, rew, terminated, truncated, _ = self.env.step(act)
            replay.add(act, rew, terminated, obs)
            over = terminated or truncated
        return replay

    def retrieve(self, replay, z):
        """z [N, C, h, w] -> the recorded frames with the nearest latents: there is no decoder."""
        import torch

        recorded = replay.data["obs"][: replay.size]
        known = torch.cat([self.agent.encoder(part) for part in recorded.split(256)])
        exact = "donot_use_mm_for_euclid_dist"  # a recorded latent is nearest to itself
        distance = torch.cdist(z.flatten(1), known.flatten(1), compute_mode=exact)  # [N, M]
        return recorded[distance.argmin(1)]

    def imagine(self, replay):
        """Four pairs of films: what was recorded, and imagination under the recorded actions."""
        H = self.args.horizon
        L = self.args.num_conditioning_steps
        batch = replay.sample(replay.anchors(4), L - 1, H)
        act = batch.act[:, L - 1 : -1]  # [B, H]
        recorded = [batch.obs[:, L:], act, batch.rew[:, L - 1 : -1], batch.end[:, L - 1 : -1]]
        z = self.agent.encoder(batch.obs[:, :L])
        dreamt = self.source.imagine(
            self.agent, z, batch.act[:, :L], batch.real[:, :L], H, act
        )
        frames = self.retrieve(replay, dreamt.z[:, L:].flatten(0, 1))
        frames = frames.unflatten(0, act.shape)  # [B, H, 3, S, S]
        films = []
        for b, real in enumerate(batch.real[:, L:]):  # [H], False beyond the end of a game
            films.append([x[b, real] for x in recorded])
            films.append([x[b, real] for x in (frames, act, dreamt.rew, dreamt.end)])
        return films

    def dream(self, replay, steps):
        """A film of the policy in imagination alone: dreams of at most 300 steps, in a row."""
        L = self.args.num_conditioning_steps
        batch = replay.sample(replay.anchors(64), L - 1, 0)
        z = self.agent.encoder(batch.obs)
        dreamt = self.source.imagine(self.agent, z, batch.act, batch.real, min(steps, 300))
        end = dreamt.end.long()
        alive = end.cumsum(1) - end == 0  # [B, H], up to and including the first end
        frames = self.retrieve(replay, dreamt.z[:, L:][alive][:steps])
        return frames, dreamt.act[alive], dreamt.rew[alive], end[alive]


def action_names(env):
    """The game's names of the actions, or "action 0", ... if a wrapper may change their sense."""
    from gymnasium import ActionWrapper

    unnamed = [f"action {i}" for i in range(env.action_space.n)]
    layer = env
    while not hasattr(layer, "get_action_meanings"):
        inner = getattr(layer, "env", None)
        changed = inner is None or layer.action_space is not inner.action_space
        if changed or isinstance(layer, ActionWrapper):
            return unnamed
        layer = inner
    names = layer.get_action_meanings()
    if len(names) != len(unnamed):
        return unnamed
    return names


def draw(films, names, size):
    """A picture with a film in each row; below a frame are its action, reward and end."""
    from PIL import Image, ImageDraw, ImageFont

    width = size + 8
    height = size + 28
    columns = max(len(film[0]) for film in films)
    picture = Image.new("RGB", (width * columns, height * len(films)), "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(12)
    for i, (frames, act, rew, end) in enumerate(films):
        for j, frame in enumerate(frames):
            image = Image.fromarray(frame.permute(1, 2, 0).cpu().numpy())
            large = image.resize((size, size), Image.Resampling.NEAREST)
            picture.paste(large, (width * j + 4, height * i + 4))
            text = f"{names[act[j]]} {rew[j]:+.2g}"
            if end[j]:
                text += " END"
            pen.text((width * j + 4, height * i + size + 6), text, "black", font)
    return picture


def look(options):
    """--checkpoint, --imagine, --dream: says what came of it, and writes the file asked for."""
    path, out = options.imagine or options.dream or (options.checkpoint, options.out)
    run = Run(path, options.device, options.seed)
    if options.checkpoint:
        run.env.close()  # some games allow one instance in a process
        result = run.source.evaluate_policy(
            run.agent, run.args.env_id, options.episodes, options.seed
        )
        result["global_step"] = run.state.get("global_step", run.args.total_steps)
        print(f"mean return {result['mean_return']:.2f} of {options.episodes} games")
        if out:
            with explained(OSError, f"{out}: not written"), open(out, "x") as file:
                json.dump(result, file)
        return
    need("PIL", "pillow")
    replay = run.play(1000)
    names = action_names(run.env)
    if options.imagine:
        pages = iter([draw(run.imagine(replay), names, 128)])
    else:
        film = run.dream(replay, options.steps)
        steps = range(len(film[0]))
        pages = (draw([[x[i : i + 1] for x in film]], names, 320) for i in steps)
    with explained(Exception, f"{out}: not written"):
        next(pages).save(out, save_all=True, append_images=pages, duration=120, loop=0)


def main(argv=None):
    """Returns the exit code: 0, 2 after a user's mistake, told in one line, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--baselines", action="store_true")
    parser.add_argument("--compare", nargs=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--checkpoint")
    parser.add_argument("--imagine", nargs=2)
    parser.add_argument("--dream", nargs=2)
    parser.add_argument("--out", "--plot")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        if min(options.steps, options.episodes, options.seed + 1) < 1:
            raise Problem("--steps and --episodes must be at least 1, --seed at least 0")
        if options.curves:
            draw_curves(options)
        elif options.checkpoint or options.imagine or options.dream:
            look(options)
        else:
            score(options)
    except Exception as error:
        if type(error).__name__ not in ("Problem", "UsageError"):  # the latter is a script's own
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.path.append(".")  # modules of own environments
    sys.stdout.reconfigure(errors="replace")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    sys.exit(main())
