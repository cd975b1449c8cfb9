"""What only a GPU can show, in calls of at most ten minutes, without network: CUDA tests, benchmark table, training curves.

    python tests/gpu_evidence.py --minutes 9.5      # again and again, until it says that all runs have finished
    python tests/gpu_evidence.py --minutes 9.5 --exp-name frozen -- --encoder-lr-scale 0      # more flags for jedi.py

The first call runs the tests that need CUDA and the benchmark. Every call then trains all games at once on the one card, at a
reduced replay ratio (a thirtieth of the paper's updates, for all of its 100,000 steps), from where the last call stopped, and
ends in time with a checkpoint. Curves go to <out>/<exp-name>_<game>.json; a table with random, human and DIAMOND is printed.
This is a short run, not the benchmark: one seed, and far fewer updates than published.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402

SCHEDULE = (
    "--collect-steps 5000 500 --world-model-updates 3000 60 --actor-critic-updates 1500 60 --final-epochs 0 --lr-decay 0.3 "
    "--eval-episodes 20 --checkpoint-minutes 4"
)


def curve_of(run_dir: pathlib.Path, bin_steps: int = 2500) -> dict:
    """Returns while collecting, averaged over bins of steps, the imagination's error, and the score if the run has one."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    args = json.loads((run_dir / "args.json").read_text())
    games = [(line["global_step"], line["charts/episodic_return"]) for line in lines if "charts/episodic_return" in line]
    epochs = [line for line in lines if "charts/epoch" in line]
    bins = sorted({step // bin_steps for step, _ in games})
    in_bin = {b: [value for step, value in games if step // bin_steps == b] for b in bins}
    result = json.loads((run_dir / "result.json").read_text()) if (run_dir / "result.json").exists() else {}
    return {
        "env_id": args["env_id"], "exp_name": args["exp_name"], "seed": args["seed"],
        "label": "a short run, not the benchmark",
        "returns_while_collecting": [[(b + 1) * bin_steps, sum(x) / len(x), len(x)] for b, x in in_bin.items()],
        "error_5": [[line["global_step"], line["world_model/error_5"]] for line in epochs if "world_model/error_5" in line],
        "global_step": lines[-1]["global_step"] if lines else 0, "hours": epochs[-1]["charts/hours"] if epochs else 0.0,
        "score": result.get("mean_return"), "args": args, "versions": result.get("versions"),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.5, help="of this call, all included")
    parser.add_argument("--games", default="Boxing,Breakout,Pong,BankHeist")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--exp-name", default="short")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results")
    parser.add_argument("--runs-dir", type=pathlib.Path, default=ROOT / "runs" / "evidence")
    parser.add_argument("flags", nargs="*", help="further flags for jedi.py, after --")
    given = parser.parse_args()
    deadline = time.time() + 60 * given.minutes - 40  # what is left is for the last checkpoints
    for path in (given.out, given.runs_dir):
        path.mkdir(parents=True, exist_ok=True)
    # compiled kernels are shared by the games and kept for the next call
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(given.runs_dir.resolve() / "inductor")}
    python, numbers = [sys.executable, "-u"], given.out / "benchmark.json"
    if not numbers.exists():
        subprocess.run([*python, "-m", "pytest", "tests", "-q", "-k", "cuda"], cwd=ROOT, env=env)
        benchmark = [*python, "tests/benchmark.py", "--device", given.device, "--preset", given.preset, "--json", numbers]
        with open(given.out / "benchmark.txt", "w") as file:
            subprocess.run(benchmark, cwd=ROOT, env=env, stdout=file)
        print((given.out / "benchmark.txt").read_text(), flush=True)

    running = {}
    for game in given.games.split(","):
        command = [*python, "jedi.py", "--env-id", game, "--preset", given.preset, "--device", given.device, *SCHEDULE.split()]
        command += ["--exp-name", given.exp_name, "--runs-dir", str(given.runs_dir.resolve()), *given.flags]
        with open(given.runs_dir / f"{given.exp_name}_{game}.log", "a") as log:
            running[game] = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
    while time.time() < deadline and any(process.poll() is None for process in running.values()):
        time.sleep(1)
    for process in running.values():
        process.send_signal(signal.SIGTERM)  # a checkpoint after the current update; the next call goes on there
    codes = {game: process.wait() for game, process in running.items()}

    print(f"{'game':12} {'steps':>7} {'hours':>6} {'return':>8} {'score':>8} | {'random':>8} {'human':>8} {'DIAMOND':>8}")
    for game, code in codes.items():
        last = (given.runs_dir / f"{given.exp_name}_{game}.log").read_text().splitlines()[-1]
        runs = sorted(given.runs_dir.glob(f"{game}__{given.exp_name}__*/ckpt.pt"))
        if code not in (0, 128 + signal.SIGTERM) or not runs:
            print(f"{game:12} stopped with exit code {code}: {last}")
            continue
        curve = curve_of(runs[-1].parent)
        (given.out / f"{given.exp_name}_{game}.json").write_text(json.dumps(curve, indent=1))
        random, human, *_, diamond = evaluate.SCORES[game]
        recent, score = curve["returns_while_collecting"][-1:], curve["score"]
        shown = [f"{recent[0][1]:8.1f}" if recent else f"{'-':>8}", f"{score:8.1f}" if score is not None else f"{'-':>8}"]
        print(f"{game:12} {curve['global_step']:7,} {curve['hours']:6.2f}", *shown, f"| {random:8} {human:8} {diamond:8}")
    print("all runs have finished" if set(codes.values()) == {0} else "not finished: call it again")
    return 0 if set(codes.values()) <= {0, 128 + signal.SIGTERM} else 1


if __name__ == "__main__":
    sys.exit(main())
