"""Tests of what makes jedi.py fast: that it stays right, that it never waits for the device, and that sweeps go on."""

import json
import re
import signal
import subprocess
import sys

import gymnasium as gym
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

import evaluate
import jedi
from tests import atari_cpu, benchmark
from tests.gpu_evidence import curve_of
from tests.test_jedi import ROOT, finished, flags, make_trainer, signal_at, tiny, update, with_echo_for_python  # noqa: F401

PHASES = ("world_model", "actor_critic")


# --------------------------------------------------------------------------------------------------------------------
# The updates
# --------------------------------------------------------------------------------------------------------------------
def update_without_content(trainer: jedi.Trainer) -> None:
    """Both updates and their replay, but the optimizer's step, on tensors without content: whatever reads a value raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for phase in PHASES:
            trainer.compute_gradients(phase)


@pytest.mark.parametrize("bf16", [False, True])
def test_updates_never_wait_for_the_device(bf16):
    update_without_content(make_trainer(tiny(bf16=bf16)))


@pytest.mark.parametrize("mean", [lambda x, mask: x[mask].mean(), lambda x, mask: x.sum() / max(1, int(mask.sum()))])
def test_a_wait_for_the_device_is_found(monkeypatch, mean):
    trainer = make_trainer(tiny())
    monkeypatch.setattr(jedi, "masked_mean", mean)
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        update_without_content(trainer)


def test_bf16_gradients_are_those_of_fp32():
    """Per network, gradients in bfloat16 point where those in float32 do; what is not a trunk's output is exactly float32."""
    gradients = []
    for bf16 in (False, True):
        trainer = make_trainer(tiny(denoiser_channels=32, bf16=bf16))
        logs = [trainer.compute_gradients(phase) for phase in PHASES]
        parameters = {name: list(network.parameters()) for name, network in trainer.agent.named_children()}
        results = [x for log in logs for x in log.values()] + [p.grad for group in parameters.values() for p in group]
        assert all(x.dtype == torch.float32 for x in results)
        gradients.append({name: torch.cat([p.grad.flatten() for p in group]) for name, group in parameters.items()})
    for name, exact in gradients[0].items():
        error = (gradients[1][name] - exact).norm() / exact.norm()
        assert 0 < error < 0.05, (name, error)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graphs_equal_eager():
    """On the same random numbers, in float32 without TF32, six updates of each kind log the same."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    logs = []
    for compile_ in (False, True):
        trainer = make_trainer(tiny(compile=compile_, world_model_updates=(1000, 2)), torch.device("cuda"))
        for phase in [*PHASES] * 6:
            logs.append({key: float(value) for key, value in update(trainer, phase).items()})
    for eager, other in zip(logs[:12], logs[12:]):
        assert other == pytest.approx(eager, rel=1e-2, abs=1e-3)


# --------------------------------------------------------------------------------------------------------------------
# The process
# --------------------------------------------------------------------------------------------------------------------
def test_freed_memory_is_kept(tmp_path):
    """Filling 64 MiB again costs a page fault per 4 KiB, or none once a run has begun. (Huge pages would hide the former.)"""
    script = (
        "import resource, sys, torch, jedi\n"
        "jedi.main(jedi.parse_args(sys.argv[1:]))\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(3):\n"
        "    torch.ones(2**24).sum()\n"
        "before = faults()\n"
        "for _ in range(10):\n"
        "    torch.ones(2**24).sum()\n"
        "print(faults() - before)\n"
    )
    command = [sys.executable, "-c", script, *flags(runs_dir=tmp_path, total_steps=40, final_epochs=0, eval_episodes=1)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(out.stdout.split()[-1]) < 40_000, out.stdout  # 163,840 otherwise; a block in ten may have to move


@pytest.mark.parametrize("phase", benchmark.PHASES)
def test_benchmark_runs_every_phase(phase):
    benchmark.prepare(phase, tiny(), torch.device("cpu"))()


def test_benchmark_writes_its_numbers(tmp_path):
    path = tmp_path / "out.json"
    command = [
        sys.executable,
        "tests/benchmark.py",
        "--preset",
        "small",
        "--device",
        "cpu",
        "--reps",
        "2",
        "--json",
        str(path),
    ]
    command += ["--phases", "collect_step,imagined_step", "--profile"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr
    report = json.loads(path.read_text())
    assert (report["device"], report["preset"], report["torch"]) == ("cpu", "small", torch.__version__)
    for phase in ("collect_step", "imagined_step"):
        assert phase in out.stdout
        m = report["phases"][phase]["eager"]
        assert 0.2 < m["profile"]["busy"] < 1.1 and len(m["profile"]["top"]) == 8
        assert 0 < m["min_s"] <= m["median_s"] <= m["max_s"] < 60 and 0.05 < m["peak_gib"] < 10
    # by hand: 3 denoising steps x batch x h x w positions x 2 x the weights of the U-Net's convolutions, and a little more
    args = jedi.Args(**jedi.SMALL)
    weights = sum(p.numel() for p in jedi.Agent(args, 4).denoiser.parameters() if p.dim() == 4)
    by_hand = 3 * args.batch_size * (args.image_size // 8) ** 2 * 2 * weights / 1e9
    assert by_hand < report["phases"]["imagined_step"]["eager"]["gflop"] < 1.3 * by_hand


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--phases", "sleep"], "--phases sleep"),
        (["--modes", "graphs"], "--modes graphs"),
        (["--reps", "0"], "--reps 0"),
        (["--device", "tpu"], "--device tpu"),
    ],
)
def test_benchmark_bad_input(words, expected):
    command = [sys.executable, "tests/benchmark.py", "--device", "cpu", *words]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert out.returncode == 2 and expected in out.stderr and "Traceback" not in out.stderr


# --------------------------------------------------------------------------------------------------------------------
# Sweeps: the same command goes on where it stopped
# --------------------------------------------------------------------------------------------------------------------
def test_the_same_command_again_and_again(tmp_path, monkeypatch, capsys):
    command, other = flags(runs_dir=tmp_path), flags(runs_dir=tmp_path, seed=2)
    assert jedi.cli(other) == 0  # another seed's run is not this one's
    with monkeypatch.context() as patch:
        signal_at(patch, "world_model", 1, signal.SIGTERM)  # pre-empted
        assert jedi.cli(command) == 128 + signal.SIGTERM
    run_dir = tmp_path / "Catch__jedi__1"
    assert jedi.load_checkpoint(run_dir)["done"]["world_model"] == 1
    assert jedi.cli(command) == 0
    result = json.loads((run_dir / "result.json").read_text())
    assert result["global_step"] == 60 and {path.name for path in tmp_path.iterdir()} == {"Catch__jedi__1", "Catch__jedi__2"}
    capsys.readouterr()
    assert jedi.cli(command) == 0 and "has finished" in capsys.readouterr().out
    assert json.loads((run_dir / "result.json").read_text()) == result


def test_readme_sweeps_start_every_run_once(tmp_path):
    """The README's sweep, with an echo for python, as a loop and as a Slurm job array: 26 games x 5 seeds."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (sweep,) = [block for block in blocks if "#SBATCH" in block]
    started = with_echo_for_python(tmp_path, sweep).splitlines()
    assert len(started) == len(set(started)) == 130
    (first, last) = map(int, re.search(r"--array=(\d+)-(\d+)", sweep).groups())
    script = f"for SLURM_ARRAY_TASK_ID in $(seq {first} {last}); do (\n{sweep}\n) done"
    assert sorted(with_echo_for_python(tmp_path, script).splitlines()) == sorted(started)
    runs = [jedi.parse_args([*line.split()[1:], "--device", "cpu"]) for line in (started[0], started[-1])]
    assert [(args.preset, args.seed) for args in runs] == [("paper", 1), ("paper", 5)]
    ids = [line.split()[line.split().index("--env-id") + 1] for line in started]
    assert {jedi.game_name(env_id) for env_id in ids} == set(evaluate.SCORES)
    assert all(gym.spec(jedi.Args(env_id).env_id) for env_id in set(ids))


def test_evidence_reads_a_run(finished):  # noqa: F811
    result, _, run_dir, _ = finished
    curve = curve_of(run_dir, bin_steps=20)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    returns = [line["charts/episodic_return"] for line in lines if "charts/episodic_return" in line]
    assert curve["score"] == result["mean_return"] and curve["global_step"] == 60 and 0 < curve["hours"] < 0.1
    assert sum(mean * count for _, mean, count in curve["returns_while_collecting"]) == pytest.approx(sum(returns))
    steps = [step for step, _, _ in curve["returns_while_collecting"]]
    assert steps == [20, 40, 60, 80][: len(steps)] and curve["versions"] == result["versions"]


def test_atari_evidence(tmp_path, monkeypatch):
    """A run and its control, seconds each, gathered: the games, the uniform policy's own, and what tells them apart."""
    monkeypatch.setattr(atari_cpu, "FLAGS", flags(eval_episodes=2, total_steps=40, final_epochs=0)[2:])  # but --env-id
    monkeypatch.setattr(jedi.Trainer, "batch", jedi.Trainer.batch)  # to be restored
    for shuffled in (False, True):
        atari_cpu.train("Breakout", 1, shuffled, str(tmp_path))
    trainer, generator = make_trainer(tiny()), torch.Generator()
    plain, batch = (draw(trainer, "world_model", generator.manual_seed(0)) for draw in (atari_cpu.draw, jedi.Trainer.batch))
    assert not torch.equal(batch.act, plain.act) and torch.equal(*(x.act.flatten().sort().values for x in (batch, plain)))
    assert torch.equal(batch.obs, plain.obs)
    runs = atari_cpu.gather(tmp_path)
    assert [run["control"] for run in runs] == [False, True]
    for run in runs:
        assert len(run["returns"]) == len(run["random_returns"]) == 2 and run["global_step"] == 40
        assert run["hns"] == pytest.approx((sum(run["returns"]) / 2 - 1.7) / (30.5 - 1.7))
    assert [(len(run["returns"]), len(run["random_returns"])) for run in atari_cpu.gather(tmp_path, games=1)] == [(1, 1)] * 2
