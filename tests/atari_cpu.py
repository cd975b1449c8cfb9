"""Is an Atari game learned on one CPU core? Trains with a longer schedule than the small preset's, and gathers the evidence.

    python tests/atari_cpu.py train CrazyClimber --seed 1  # three quarters of an hour; again: goes on where it was
    python tests/atari_cpu.py train CrazyClimber --seed 1 --shuffled  # the control: the world model cannot know actions
    python tests/atari_cpu.py gather runs --out results/atari_cpu.json --plot results/atari_cpu.png  # plays random games, too

`train` is `python jedi.py --env-id <game> --seed <seed>` with the flags below; --shuffled permutes the actions within each
batch of the world model. `gather` reads finished runs: final full games, as many games of the uniform policy under the same
protocol, the human-normalised score, and how many standard errors of their difference the policy is above the uniform one.
"""

import argparse
import json
import pathlib
import platform
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import evaluate  # noqa: E402
import jedi  # noqa: E402

FLAGS = """--preset small --device cpu --num-autoregressive-steps 6 --total-steps 16000 --collect-steps 6000 1000
    --world-model-updates 1000 200 --actor-critic-updates 100 390 --warmup-updates 100 100 --ent-coef 0.01 --lr-decay 0.75
    --eval-episodes 30""".split()
# Krull has five times as many rewards: a shorter horizon and more entropy against drift, and a new look at the game sooner
ALSO = {
    "Krull": """--gamma 0.95 --ent-coef 0.05 --collect-steps 6000 250 --world-model-updates 1000 50
    --actor-critic-updates 50 60""".split()
}


draw = jedi.Trainer.batch


def shuffled_batch(self: jedi.Trainer, phase: str, *generator) -> jedi.Batch:
    """In the place of Trainer.batch: the world model's actions are those of other steps."""
    batch = draw(self, phase, *generator)
    if phase != "world_model":
        return batch
    return batch._replace(act=batch.act.flatten()[torch.randperm(batch.act.numel())].view_as(batch.act))


def train(game: str, seed: int, shuffled: bool, runs_dir: str) -> dict:
    if shuffled:
        jedi.Trainer.batch = shuffled_batch
    words = ["--env-id", game, "--seed", str(seed), "--runs-dir", runs_dir, "--exp-name", "shuffled" if shuffled else "atari"]
    return jedi.main(jedi.parse_args([*words, *FLAGS, *ALSO.get(game, [])]))


def gather(folder: pathlib.Path, games: int | None = None) -> list[dict]:
    """One entry for each finished run below the folder. With `games` its last weights play so many new ones."""
    runs = []
    for path in sorted(folder.rglob("result.json")):
        result = json.loads(path.read_text())
        if result["game"] not in evaluate.SCORES or result["exp_name"] not in ("atari", "shuffled"):
            continue
        trained, seed = evaluate.Run(path.parent, "cpu", 0), result["protocol"]["eval_seed"]
        args, uniform = trained.args, jedi.Agent(trained.args, trained.agent.num_actions)  # an untrained policy is uniform
        if games:
            result |= jedi.evaluate_policy(trained.agent, args.env_id, games, seed)
        random = jedi.evaluate_policy(uniform, args.env_id, len(result["returns"]), seed + 10**6)
        x, y = np.array(result["returns"]), np.array(random["returns"])
        low, human = evaluate.SCORES[result["game"]][:2]
        lines = map(json.loads, (path.parent / "metrics.jsonl").read_text().splitlines())
        curve = [[line["global_step"], line["charts/episodic_return"]] for line in lines if "charts/episodic_return" in line]
        error = float(np.sqrt(x.var(ddof=1) / len(x) + y.var(ddof=1) / len(y)))
        control = result["exp_name"] == "shuffled"
        runs.append({
            "env_id": args.env_id, "seed": args.seed, "control": control, "returns": result["returns"],
            "random_returns": random["returns"], "hns": float((x.mean() - low) / (human - low)),
            "standard_errors_above_random": float((x.mean() - y.mean()) / error), "curve": curve,
            "global_step": result["global_step"], "minutes": result["wall_time_s"] / 60,
            "command": f"python tests/atari_cpu.py train {result['game']} --seed {args.seed}" + " --shuffled" * control,
            "machine": f"one core, {platform.machine()}",
        })  # fmt: skip
        shown = f"{x.mean():.1f} in {len(x)} games, random {y.mean():.1f}, HNS {runs[-1]['hns']:.2f}"
        print(f"{path.parent.name}: {shown}, {runs[-1]['standard_errors_above_random']:.1f} standard errors above", flush=True)
    return runs


def plot(runs: list[dict], path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    games = sorted({run["env_id"] for run in runs})
    figure = Figure(figsize=(5 * len(games), 4), layout="constrained")
    for axes, game in zip(figure.subplots(1, len(games), squeeze=False)[0], games):
        for i, run in enumerate(run for run in runs if run["env_id"] == game):
            steps, returns = np.array(run["curve"]).T
            label = f"{'shuffled actions' if run['control'] else 'learned'}, seed {run['seed']}"
            axes.plot(steps, returns, ".-", color=f"C{i}", alpha=0.4, linewidth=1)
            mean, error = np.mean(run["returns"]), np.std(run["returns"]) / len(run["returns"]) ** 0.5
            axes.errorbar(run["global_step"] * 1.03, mean, error, fmt="s", color=f"C{i}", capsize=3, label=label)
            axes.axhline(np.mean(run["random_returns"]), color=f"C{i}", linestyle=":", linewidth=1)
        axes.set(title=jedi.game_name(game), xlabel="agent steps", ylabel="return of a full game")
        axes.legend(fontsize=8)
    figure.suptitle("lines: training games; squares: final games; dotted: the uniform policy")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training, gathering = commands.add_parser("train"), commands.add_parser("gather")
    training.add_argument("game")
    training.add_argument("--seed", type=int, default=1)
    training.add_argument("--shuffled", action="store_true")
    training.add_argument("--runs-dir", default="runs")
    gathering.add_argument("folder", type=pathlib.Path)
    gathering.add_argument("--out", type=pathlib.Path, required=True)
    gathering.add_argument("--plot", type=pathlib.Path)
    gathering.add_argument("--games", type=int, help="let the last weights play so many new games; without, the run's own 30")
    given = parser.parse_args()
    if given.command == "train":
        train(given.game, given.seed, given.shuffled, given.runs_dir)
        return
    runs = gather(given.folder, given.games)
    given.out.write_text(json.dumps({"runs": runs}, indent=1))
    if given.plot and runs:
        plot(runs, given.plot)


if __name__ == "__main__":
    main()
