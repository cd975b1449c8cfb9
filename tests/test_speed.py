"""Tests of what makes jedi.py fast: that it stays right, that it never waits for the device, and that sweeps go on."""

import contextlib
import dataclasses
import json
import os
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
from tests.gpu_evidence import curve_of
from tests.test_jedi import CPU, ROOT, filled_buffer, flags, make_agent, run, tiny

FORMS = [dict(), dict(latent_norm="batch", predict="change", bf16=True)]


# --------------------------------------------------------------------------------------------------------------------
# The updates
# --------------------------------------------------------------------------------------------------------------------
def update_without_content(trainer, buffer) -> None:
    """Both updates and their replay, but the optimizer's step, on tensors without content: whatever reads a value raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        trainer.world_model_gradients(trainer.segments(buffer))
        trainer.actor_critic_gradients(trainer.contexts(buffer))


@pytest.mark.parametrize("form", FORMS, ids=["published", "small, bf16"])
def test_updates_never_wait_for_the_device(form):
    args = tiny(**form)
    update_without_content(jedi.Trainer(make_agent(args), args, CPU), filled_buffer(args))


@pytest.mark.parametrize("mean", [lambda x, mask: x[mask].mean(), lambda x, mask: x.sum() / max(1, int(mask.sum()))])
def test_a_wait_for_the_device_is_found(monkeypatch, mean):
    args = tiny()
    trainer, buffer = jedi.Trainer(make_agent(args), args, CPU), filled_buffer(args)
    monkeypatch.setattr(jedi, "masked_mean", mean)
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        update_without_content(trainer, buffer)


def test_bf16_gradients_are_those_of_fp32():
    """Per network, gradients in bfloat16 point where those in float32 do; what is not a trunk's output is exactly float32."""
    gradients = []
    for bf16 in (False, True):
        args = tiny(latent_norm="batch", denoiser_channels=32, bf16=bf16)
        agent = make_agent(args)
        trainer, buffer = jedi.Trainer(agent, args, CPU), filled_buffer(args)
        logs = trainer.world_model_gradients(trainer.segments(buffer)) | trainer.actor_critic_gradients(
            trainer.contexts(buffer)
        )
        assert all(x.dtype == torch.float32 for x in [*logs.values(), *(p.grad for p in agent.parameters())])
        gradients.append(
            {name: torch.cat([p.grad.flatten() for p in net.parameters()]) for name, net in agent.named_children()}
        )
    for name, exact in gradients[0].items():
        error = (gradients[1][name] - exact).norm() / exact.norm()
        assert 0 < error < 0.05, (name, error)


def test_cuda_graph_gets_new_batches_and_numbers(monkeypatch):
    """CudaGraph's own bookkeeping, with a stand-in for CUDA whose replay calls the function: updates equal those without."""
    args = tiny(latent_norm="batch")
    agents = [make_agent(args) for _ in range(2)]
    buffer = filled_buffer(args)
    plain, graphed = (jedi.Trainer(a, dataclasses.replace(args, cuda_graphs=g), CPU) for a, g in zip(agents, (False, True)))
    owner, events = graphed.world_model_gradients, []

    class Graph:
        def register_generator_state(self, rng):
            assert rng is graphed.rng and not events  # before the capture

        def replay(self):
            events.append("replay")
            for name, value in owner.function(owner.batch).items():
                owner.logs[name].copy_(value)

    @contextlib.contextmanager
    def capture(graph):  # a capture records and computes nothing
        events.append("capture")
        state, rng = {k: v.clone() for k, v in agents[1].state_dict().items()}, graphed.rng.get_state()
        yield
        agents[1].load_state_dict(state)
        graphed.rng.set_state(rng)

    class Stream:
        def wait_stream(self, other):
            assert isinstance(other, Stream)

    fakes = dict(
        CUDAGraph=Graph, graph=capture, Stream=Stream, current_stream=Stream, stream=lambda s: contextlib.nullcontext()
    )
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    means = jedi.Means(), jedi.Means()
    for _ in range(6):
        for trainer, mean in zip((plain, graphed), means):
            mean.add(trainer.update_world_model(trainer.segments(buffer)))
    assert events == ["capture", "replay", "replay", "replay"]
    for a, b in zip(agents[0].state_dict().values(), agents[1].state_dict().values()):
        assert torch.equal(a, b)
    assert means[0].flush("") == means[1].flush("")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("mode", ["compiled", "graphs"])
def test_cuda_modes_equal_eager(mode):
    """On the same random numbers, in float32 without TF32, six updates of each kind log the same."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    device, logs = torch.device("cuda"), []
    for changes in (dict(), dict(compile=True, cuda_graphs=mode == "graphs")):
        args = tiny(latent_norm="batch", **changes)
        agent, buffer = make_agent(args).to(device), jedi.ReplayBuffer(26, args.image_size, device)
        buffer.load_state_dict(filled_buffer(args).state_dict())
        trainer = jedi.Trainer(agent, args, device)
        for _ in range(6):
            update = trainer.update_world_model(trainer.segments(buffer)) | trainer.update_actor_critic(
                trainer.contexts(buffer)
            )
            logs.append({k: float(v) for k, v in update.items()})
    for eager, other in zip(logs[:6], logs[6:]):
        assert other == pytest.approx(eager, rel=1e-2, abs=1e-3)


# --------------------------------------------------------------------------------------------------------------------
# The process
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_freed_memory_is_kept():
    """Filling 64 MiB again costs a page fault per 4 KiB, or none once set_up() has run. (Huge pages would hide the former.)"""
    script = (
        "import resource, torch, jedi\n"
        "jedi.set_up(torch.device('cpu'))\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(3):\n"
        "    torch.ones(2**24).sum()\n"
        "before = faults()\n"
        "for _ in range(10):\n"
        "    torch.ones(2**24).sum()\n"
        "print(faults() - before)\n"
    )
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(out.stdout) < 40_000, out.stdout  # 163,840 otherwise; a block in ten may have to move


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
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    report = json.loads(path.read_text())
    assert (report["device"], report["preset"], report["torch"]) == ("cpu", "small", torch.__version__)
    for phase in ("collect_step", "imagined_step"):
        assert phase in out.stdout
        m = report["phases"][phase]["eager"]
        assert 0.2 < m["profile"]["busy"] < 1.1 and len(m["profile"]["top"]) == 8
        assert 0 < m["min_s"] <= m["median_s"] <= m["max_s"] < 60 and 0.05 < m["peak_gib"] < 10
    # by hand: 3 denoising steps x batch 24 x 64 positions x 2 x the weights of the U-Net's convolutions, and a little more
    weights = sum(p.numel() for p in jedi.Agent(jedi.Args(**jedi.SMALL), 4).denoiser.parameters() if p.dim() == 4)
    by_hand = 3 * 24 * 64 * 2 * weights / 1e9
    assert by_hand < report["phases"]["imagined_step"]["eager"]["gflop"] < 1.3 * by_hand


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--phases", "sleep"], "--phases sleep"),
        (["--modes", "graphs"], "--device cuda"),
        (["--reps", "0"], "--reps 0"),
        (["--device", "tpu"], "--device tpu"),
    ],
)
def test_benchmark_bad_input(words, expected):
    command = [sys.executable, "tests/benchmark.py", "--device", "cpu", *words]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert out.returncode == 2 and expected in out.stderr and "Traceback" not in out.stderr


# --------------------------------------------------------------------------------------------------------------------
# Sweeps: the same command goes on where it stopped
# --------------------------------------------------------------------------------------------------------------------
def test_resume_auto_is_the_same_command_again_and_again(tmp_path, monkeypatch, capsys):
    command = [*flags(runs_dir=tmp_path), "--resume", "auto"]
    run(tmp_path, seed=2)  # another seed's run is not this one's
    others, original = set(tmp_path.iterdir()), jedi.Trainer.update_world_model

    def preempted(self, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(jedi, "measure_speed", lambda *_: dict(collect=0.0, world_model=0.0, actor_critic=0.0))
        patch.setattr(jedi.Trainer, "update_world_model", preempted)
        assert jedi.cli(command) == 128 + signal.SIGTERM
    (run_dir,) = set(tmp_path.iterdir()) - others
    assert jedi.load_checkpoint(run_dir)["progress"]["world_model"] == 1
    assert jedi.cli(command) == 0
    result = json.loads((run_dir / "result.json").read_text())
    assert result["global_step"] == 60 and set(tmp_path.iterdir()) == others | {run_dir}
    capsys.readouterr()
    assert jedi.cli(command) == 0 and "finished already" in capsys.readouterr().out
    assert json.loads((run_dir / "result.json").read_text()) == result


def test_readme_sweeps_start_every_run_once(tmp_path):
    """The README's shell loop and its Slurm job array, with an echo for python, both start 26 games x 5 seeds."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (loop,) = [block for block in blocks if "for seed in" in block]
    (array,) = [block for block in blocks if "#SBATCH" in block]
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    started = subprocess.run(["bash", "-euc", loop], env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(started) == len(set(started)) == 130
    (first, last) = map(int, re.search(r"--array=(\d+)-(\d+)", array).groups())
    script = f"for SLURM_ARRAY_TASK_ID in $(seq {first} {last}); do (\n{array}\n) done"
    submitted = subprocess.run(
        ["bash", "-euc", script], env=env, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert sorted(submitted) == sorted(started)
    ids = [line.split()[2] for line in started]
    assert {jedi.game_name(env_id) for env_id in ids} == set(evaluate.SCORES) and all(gym.spec(env_id) for env_id in ids)
    for line in (started[0], started[-1]):
        args = jedi.parse_args([*line.split()[1:], "--runs-dir", str(tmp_path), "--device", "cpu"])
        assert (args.preset, args.resume) == ("paper", None)


def test_evidence_reads_a_run(tmp_path):
    result, _, run_dir = run(tmp_path)
    curve = curve_of(run_dir, bin_steps=20)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    returns = [line["charts/episodic_return"] for line in lines if "charts/episodic_return" in line]
    assert curve["score"] == result["mean_return"] and curve["global_step"] == 60 and 0 < curve["hours"] < 0.1
    assert sum(mean * count for _, mean, count in curve["returns_while_collecting"]) == pytest.approx(sum(returns))
    assert [step for step, _, _ in curve["returns_while_collecting"]] == [20, 40, 60, 80][
        : len(curve["returns_while_collecting"])
    ]
