"""Times every phase of training, eager beside compiled (on CUDA: and captured), and projects the hours of a whole run.

    python tests/benchmark.py                                       # on CUDA both modes, on a CPU eager only
    python tests/benchmark.py --preset paper --device cpu --reps 3  # a minute or two on two cores
    python tests/benchmark.py --modes eager,compiled --phases imagined_step,actor_critic_update --json out.json

Phases: collect_step, one environment step with the policy; world_model_update, the diffusion loss alone; reward_end_update,
the reward/end loss alone; joint_update, both on one batch, which is what a run does; imagined_step, policy + sampler +
reward/end model for a batch; actor_critic_update, contexts + H imagined steps + loss. Each is timed after warm-up, on random
frames, one call at a time, the device synchronised after each call. Updates include replay, clipping and the optimizer.

Peak memory is CUDA's allocations, or the resident set of a fresh process (which holds Python and torch, 0.4 GiB). FLOPs are
counted by torch.utils.flop_counter on an eager call, and their rate is compared with that of a large matrix product.
"""

import argparse
import dataclasses
import json
import multiprocessing
import pathlib
import platform
import re
import resource
import statistics
import sys
import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import jedi  # noqa: E402

PHASES = ("collect_step", "world_model_update", "reward_end_update", "joint_update", "imagined_step", "actor_critic_update")
MODES = ("eager", "compiled")


def diffusion_loss(agent, batch):
    k = agent.args.num_conditioning_steps + agent.args.num_autoregressive_steps
    z = agent.encoder(batch.obs[:, :k], batch.real[:, :k])  # [B, L+n, C, h, w]
    return agent.denoiser.loss(z, batch.act[:, :k], batch.real[:, :k]), {}


def reward_end_loss(agent, batch):
    z = agent.encoder(batch.obs, batch.real)  # [B, T, C, h, w]
    rew_logits, end_logits, _ = agent.reward_end(z[:, :-1], batch.act[:, :-1], z[:, 1:], batch.step[:, :-1])
    return rew_logits.logsumexp(-1).mean() + end_logits.logsumexp(-1).mean(), {}  # as dear as the cross-entropies


def prepare(phase: str, args: jedi.Args, device: torch.device):
    """The phase as a function without arguments, on new networks and 500 random frames."""
    rng, num_actions = np.random.default_rng(0), int(jedi.make_env(args.env_id, 0, args.image_size).action_space.n)
    trainer = jedi.Trainer(args, num_actions, device)
    frames = rng.integers(0, 256, (501, 3, args.image_size, args.image_size), dtype=np.uint8)
    trainer.buffer = jedi.ReplayBuffer(dataclasses.replace(args, total_steps=len(frames)), device)
    trainer.buffer.add(frames[0])
    for frame in frames[1:]:
        trainer.buffer.add(frame, int(rng.integers(num_actions)), float(rng.integers(-1, 2)))
    if phase == "collect_step":
        return lambda: trainer.advance("collect")
    if phase == "actor_critic_update":
        return lambda: trainer.advance("actor_critic")
    if phase == "imagined_step":
        batch, agent = trainer.batch("actor_critic"), trainer.agent
        states = [(torch.zeros(args.batch_size, args.lstm_dim, device=device),) * 2 for _ in range(2)]
        inputs = agent.encoder(batch.obs).detach(), batch.act[:, :-1], *states
        return lambda: trainer.imagine_step(agent, *inputs)
    if loss := {"world_model_update": diffusion_loss, "reward_end_update": reward_end_loss}.get(phase):
        trainer.world_model_loss = torch.compile(loss, fullgraph=True, dynamic=False) if args.compile else loss
    return lambda: trainer.advance("world_model")


def profile(call, wait, cuda: bool) -> dict:
    """One call under PyTorch's profiler: the share of the wall clock in which kernels ran, and the eight that ran longest."""
    with torch.profiler.profile() as profiler:
        start = time.perf_counter()
        call()
        wait()
        wall = time.perf_counter() - start
    kernels = [e for e in profiler.key_averages() if (e.device_type == torch.autograd.DeviceType.CUDA) == cuda]
    seconds = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e6 for e in kernels}
    top = sorted(kernels, key=lambda e: seconds[e.key], reverse=True)[:8]
    return {"busy": sum(seconds.values()) / wall, "top": [[e.key, e.count, seconds[e.key] / wall] for e in top]}


def measure(phase: str, mode: str, args: jedi.Args, reps: int, profiled: bool) -> dict[str, float]:
    """Seconds (median, min, max), peak memory and, in eager mode, FLOPs of one call of a phase; on request its profile."""
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    args = dataclasses.replace(args, compile=mode == "compiled")
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    call = prepare(phase, args, device)
    for _ in range({"eager": 1, "compiled": 5}[mode]):  # on CUDA: compile, warm up, capture, replay
        call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(reps):
        wait()
        start = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - start)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident
    result = dict(median_s=statistics.median(seconds), min_s=min(seconds), max_s=max(seconds), peak_gib=peak / 2**30)
    if profiled:
        result["profile"] = profile(call, wait, device.type == "cuda")
    if mode == "eager":  # counted on a batch of 2, which is quick, and scaled: the work is linear in the batch
        call, scale = prepare(phase, dataclasses.replace(args, batch_size=2), device), args.batch_size / 2
        with FlopCounterMode(display=False) as flops:
            call()
        result["gflop"] = flops.get_total_flops() / 1e9 * (1 if phase == "collect_step" else scale)
    return result


def matmul_gflops(args: jedi.Args) -> float:
    """The rate of a large matrix product in the trunks' type: the best of 5."""
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    wait, n = (torch.cuda.synchronize, 8192) if device.type == "cuda" else (lambda: None, 2048)
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    seconds = []
    for _ in range(7):  # the first two warm up
        wait()
        start = time.perf_counter()
        a @ a
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds[2:]) / 1e9


def in_fresh_process(function, *arguments):
    """On a CPU every measurement has a process of its own, whose peak memory is that of the phase."""
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"  # forked, it need not import torch again
    with multiprocessing.get_context(method).Pool(1) as pool:
        return pool.apply(function, arguments)


def projection(args: jedi.Args, phases: dict, mode: str) -> tuple[float, float]:
    """Seconds of one later epoch and hours of a whole run at the preset's schedule, without measurements and final games."""
    modes = {"collect_step": "eager", "joint_update": mode, "actor_critic_update": mode}  # acting is always eager
    cost = {name: phases[name][mode]["median_s"] for name, mode in modes.items()}
    plan = {"joint_update": args.world_model_updates, "actor_critic_update": args.actor_critic_updates}  # first epoch, later
    epochs = -(-(args.total_steps - args.collect_steps[0]) // args.collect_steps[1]) + args.final_epochs
    updates = {name: first + epochs * later for name, (first, later) in plan.items()} | {"collect_step": args.total_steps}
    epoch = {name: later for name, (_, later) in plan.items()} | {"collect_step": args.collect_steps[1]}
    return sum(cost[k] * n for k, n in epoch.items()), sum(cost[k] * n for k, n in updates.items()) / 3600


def show(report: dict, args: jedi.Args) -> str:
    """The report as a table."""
    rate, phases = report["matmul_gflops"], report["phases"]
    lines = [
        f"{report['device_name']}, {report['device']}, {report['threads']} threads, preset {report['preset']}, "
        f"batch {args.batch_size}, "
        f"{'bf16 trunks' if args.bf16 else 'fp32'}, torch {report['torch']}, {report['date']}; "
        f"matrix product {rate / 1000:.3g} TFLOP/s, {report['reps']} repetitions",
        f"{'phase':20} {'mode':9} {'median':>10} {'min':>10} {'max':>10} {'x eager':>8} {'GiB':>6} {'GFLOP':>7} of matmul",
    ]
    for phase, modes in phases.items():
        gflop = modes.get("eager", {}).get("gflop")
        for mode, m in modes.items():
            times = " ".join(f"{m[key] * 1e3:7.1f} ms" for key in ("median_s", "min_s", "max_s"))
            speedup = f"{modes['eager']['median_s'] / m['median_s']:.2f}" if "eager" in modes else "-"
            work = f"{gflop:7.1f} {gflop / m['median_s'] / rate:9.1%}" if gflop else f"{'-':>7} {'-':>9}"
            lines.append(f"{phase:20} {mode:9} {times} {speedup:>8} {m['peak_gib']:6.2f} {work}")
    for phase, mode, m in [(phase, mode, m) for phase, modes in phases.items() for mode, m in modes.items() if "profile" in m]:
        top = ", ".join(f"{share:.0%} {name[:50]} ({count})" for name, count, share in m["profile"]["top"])
        lines.append(f"{phase} {mode}: kernels busy {m['profile']['busy']:.0%} of the time; by kernel (calls): {top}")
    for mode, x in report["projection"].items():
        lines.append(f"{mode}: {x['epoch_s']:.1f} s an epoch, {x['run_hours']:.2f} hours a run (projected)")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=jedi.Args.device, help="cuda or cpu")
    parser.add_argument("--preset", choices=("paper", "small"), help="default: paper on CUDA, else small")
    parser.add_argument("--env-id", default="Breakout")
    parser.add_argument("--phases", default=",".join(PHASES), help="some of " + ", ".join(PHASES))
    parser.add_argument("--modes", help="some of " + ", ".join(MODES))
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="default: on for CUDA")
    parser.add_argument("--profile", action="store_true", help="also say what the time is spent on")
    parser.add_argument("--reps", type=int, help="timed calls (default: 50 on CUDA, else 5)")
    parser.add_argument("--json", type=pathlib.Path, help="also write the numbers here")
    given = parser.parse_args()
    try:
        preset = ["--preset", given.preset] if given.preset else []
        args = jedi.parse_args(["--device", given.device, "--env-id", given.env_id, *preset])
        device = torch.zeros(1, device=given.device).device
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {given.device}: {error}")
    cuda = device.type == "cuda"
    args = dataclasses.replace(args, device=str(device), bf16=cuda if given.bf16 is None else given.bf16)
    phases = given.phases.split(",")
    modes, reps = (given.modes or ("eager,compiled" if cuda else "eager")).split(","), given.reps
    reps = (50 if cuda else 5) if reps is None else reps
    for name, known, flag in [(p, PHASES, "--phases") for p in phases] + [(m, MODES, "--modes") for m in modes]:
        if name not in known:
            parser.error(f"{flag} {name}: unknown; choose from {', '.join(known)}")
    if reps < 1:
        parser.error(f"--reps {reps}: must be at least 1")

    call = (lambda function, *arguments: function(*arguments)) if cuda else in_fresh_process
    name, cpu_names = platform.machine(), pathlib.Path("/proc/cpuinfo")
    if cuda:
        name = torch.cuda.get_device_name(device)
    elif cpu_names.exists():
        name = (re.findall("model name\\s*: (.*)", cpu_names.read_text()) or [name])[0]
    report = dict(
        device=str(device), device_name=name, preset=args.preset, torch=torch.__version__, bf16=args.bf16, reps=reps,
        date=time.strftime("%Y-%m-%d"), threads=torch.get_num_threads(), matmul_gflops=call(matmul_gflops, args),
        phases={p: {} for p in phases}, projection={},
    )  # fmt: skip
    for phase in phases:
        for mode in modes if phase != "collect_step" else ["eager"]:  # acting is always eager
            if sys.stderr.isatty():
                print(f"\r{phase} {mode} ...".ljust(60), end="\r", file=sys.stderr, flush=True)
            report["phases"][phase][mode] = call(measure, phase, mode, args, reps, given.profile)
    if {"collect_step", "joint_update", "actor_critic_update"} <= set(phases):
        for mode in modes:
            epoch, hours = projection(args, report["phases"], mode)
            report["projection"][mode] = dict(epoch_s=epoch, run_hours=hours)
    print(show(report, args))
    if given.json:
        given.json.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
