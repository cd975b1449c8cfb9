"""For the first person with a CUDA card: does it run, how fast is it, does it learn?

Ten minutes, one command:

    python tests/gpu_smoke.py                       # ends with a paragraph to paste into a report
    python tests/gpu_smoke.py --minutes 20 --device cuda:1

The stages: the benchmark of the preset `paper`, compiled; a game of NoisyCatch learned by `small`,
compiled; the tests; the benchmark without compilation. What is known is in gpu_smoke.json after
every stage, so that it may be stopped at any time. A stage that finds no time is left out, and one
that does not end in time is stopped.
"""

import argparse
import json
import platform
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
QUIET = 5  # seconds without a line, after which the time is printed


def run_stage(name, words, seconds):
    """Runs python with these words and shows what it prints.

    Returns {"seconds", "exit": code or "stopped", "lines"}.
    """
    print(f"== {name}, at most {seconds:.0f} s: python {' '.join(words)}", flush=True)
    start = time.monotonic()
    command = [sys.executable, "-u", *words]
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    arrived = queue.Queue()

    def listen():
        for line in child.stdout:
            arrived.put(line.rstrip())
        arrived.put(None)

    threading.Thread(target=listen, daemon=True).start()
    lines = []
    exit_code = "stopped"
    try:
        while time.monotonic() - start < seconds:
            try:
                line = arrived.get(timeout=QUIET)
            except queue.Empty:
                print(f"   {time.monotonic() - start:.0f} s", flush=True)
                continue
            if line is None:
                exit_code = child.wait()
                break
            lines.append(line)
            print("   " + line, flush=True)
    finally:
        child.kill()
    return {"seconds": round(time.monotonic() - start, 1), "exit": exit_code, "lines": lines[-40:]}


def find(stage, pattern):
    """Returns the first number that the stage printed in such a line, or None."""
    for line in stage.get("lines", []):
        match = re.search(pattern, line)
        if match:
            return float(match[1].replace(",", ""))
    return None


def summary(report):
    """Returns the paragraph to paste."""
    sentences = [f"jedi.py on {report['device']}, torch {report['torch']}, {report['system']}."]
    for name in ("compiled", "eager"):
        if name not in report["stages"]:
            sentences.append(f"Preset {report['preset']}, {name}: not run.")
            continue
        stage = report["stages"][name]
        world_model = find(stage, r"^world model +([\d.,]+) ms")
        actor_critic = find(stage, r"^actor-critic +([\d.,]+) ms")
        hours = find(stage, r"^a whole run +([\d.,]+) hours")
        memory = find(stage, r"^peak memory +([\d.,]+) GiB")
        sentences.append(
            f"Preset {report['preset']}, {name}: world-model update {world_model} ms,"
            f" actor-critic update {actor_critic} ms,"
            f" a whole run about {hours} hours, peak {memory} GiB."
        )
    if "learning" in report["stages"]:
        stage = report["stages"]["learning"]
        score = find(stage, r"mean return (-?[\d.]+)")
        sentences.append(
            f"NoisyCatch by `small`: {score} (learned: 8; random: -0.4) in {stage['seconds']} s."
        )
    tests = report["stages"].get("tests", {})
    last = tests["lines"][-1] if tests.get("lines") else "not run"
    sentences.append(f"Tests: {last.strip('= ')}.")
    stopped = [name for name, stage in report["stages"].items() if stage["exit"] != 0]
    if stopped:
        sentences.append(f"Not ended well: {', '.join(stopped)}; see gpu_smoke.json.")
    return " ".join(sentences)


def main(argv=None):
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="paper", help="of the benchmarks")
    parser.add_argument("--out", type=Path, default=Path("gpu_smoke.json"))
    given = parser.parse_args(argv)
    try:
        device = torch.zeros(1, device=given.device).device
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"error: --device {given.device}: {str(error).splitlines()[0]}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    report = {
        "device": name,
        "preset": given.preset,
        "torch": torch.__version__,
        "system": f"{platform.system()}, Python {platform.python_version()}",
        "stages": {},
    }
    runs = tempfile.mkdtemp()
    benchmark = ["tests/benchmark.py", "--preset", given.preset, "--device", given.device]
    game = ["jedi.py", "--env-id", "tests.toy:NoisyCatch-v0", "--preset", "small"]
    stages = {
        "compiled": [*benchmark, "--compile"],
        "learning": [*game, "--device", given.device, "--runs-dir", runs],
        "tests": ["-m", "pytest", "tests", "-q"],
        "eager": [*benchmark, "--no-compile"],
    }
    end = time.monotonic() + 60 * given.minutes
    for stage, words in stages.items():
        left = end - time.monotonic()
        if left > QUIET:
            report["stages"][stage] = run_stage(stage, words, left)
            report["summary"] = summary(report)
            given.out.write_text(json.dumps(report, indent=1))
    print(f"\n{report['summary']}\n\nThe whole report is in {given.out}.")


if __name__ == "__main__":
    main()
