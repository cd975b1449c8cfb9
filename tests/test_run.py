"""Tests of whole runs of jedi.py: files, going on, what is refused, what is printed; tools."""

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import jedi
from tests import ablations, benchmark, chain, gpu_smoke
from tests.tiny import (
    CPU,
    ROOT,
    assert_equal,
    command_line,
    flags,
    make_agent,
    make_batch,
    make_replay,
    tiny,
)


def run(runs_dir, **changes):
    """One tiny run in this process -> result, run directory."""
    args = tiny(runs_dir=str(runs_dir), **changes)
    result = jedi.main(args)
    name = args.env_id.replace(":", "-")
    return result, runs_dir / f"{name}__{args.exp_name}__{args.seed}"


def checkpoint(run_dir):
    """What a checkpoint holds, but for what depends on the clock."""
    state = torch.load(run_dir / "ckpt.pt", weights_only=True)
    del state["seconds"]
    del state["metrics_bytes"]
    return state


def metrics(run_dir):
    """The lines of metrics.jsonl, but for what depends on the clock."""
    lines = []
    for text in (run_dir / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        line.pop("charts/hours", None)
        lines.append(line)
    return lines


def as_json(result):
    """What comes back from a file: lists in the place of tuples."""
    return json.loads(json.dumps(result))


def contents(run_dir):
    """The bytes of all files."""
    return {path.name: path.read_bytes() for path in run_dir.iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, which no test may change: result, run directory, what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        result, run_dir = run(tmp_path_factory.mktemp("finished"))
    return result, run_dir, out.getvalue()


@pytest.fixture
def finished_copy(finished, tmp_path):
    """Its run directory, copied to where it may be changed."""
    return Path(shutil.copytree(finished[1], tmp_path / finished[1].name))


# -------------------------------------------------------------------------------- What a run leaves
def test_two_runs_of_one_seed_are_bit_equal(finished, tmp_path):
    result, run_dir, _ = finished
    again, again_dir = run(tmp_path)
    assert_equal(checkpoint(again_dir), checkpoint(run_dir))
    assert metrics(again_dir) == metrics(run_dir)
    assert again["returns"] == result["returns"]
    _, other_dir = run(tmp_path, seed=2)
    weight = checkpoint(run_dir)["agent"]["actor_critic.actor.weight"]
    other = checkpoint(other_dir)["agent"]["actor_critic.actor.weight"]
    assert not torch.equal(other, weight)


def test_the_run_directory(finished):
    result, run_dir, _ = finished
    names = set(contents(run_dir))
    assert names == {"args.json", "script.py", "metrics.jsonl", "ckpt.pt", "result.json"}
    assert (run_dir / "script.py").read_bytes() == (ROOT / "jedi.py").read_bytes()
    assert json.loads((run_dir / "result.json").read_text()) == as_json(result)
    assert result["global_step"] == 60
    assert len(result["returns"]) == 3
    assert result["preset"] == "small"
    args = json.loads((run_dir / "args.json").read_text())
    assert args["lstm_dim"] == 16
    logged = {}
    for line in metrics(run_dir):
        logged |= line
    assert set(logged) >= {
        "losses/denoising",
        "losses/reward",
        "losses/end",
        "losses/policy",
        "losses/value",
        "losses/entropy",
        "imagination/return",
        "world_model/error_1",
        "world_model/rewards_found",
        "latent/change_rms",
        "charts/episodic_return",
        "eval/episodic_return",
    }
    assert logged["eval/episodic_return"] == result["mean_return"]


def test_what_is_played_is_what_is_recorded(tmp_path):
    """In Stairs a frame shows step and last action, and the reward is the action minus 1."""
    _, run_dir = run(tmp_path, env_id="tests.odd_games:Stairs-v0", epsilon=1.0)
    replay = checkpoint(run_dir)["replay"]
    shown = replay["obs"][:, 0, 0, 0].tolist()
    first = replay["first"].tolist()
    acts = replay["act"].tolist()
    assert sum(replay["has_act"].tolist()) == 60
    assert len(set(acts)) == 3
    for slot, has_act in enumerate(replay["has_act"].tolist()):
        t = slot - first[slot]
        assert shown[slot] // 10 == t
        if has_act:
            assert shown[slot + 1] == 10 * (t + 1) + acts[slot]
            assert replay["rew"][slot] == acts[slot] - 1
            assert replay["end"][slot] == (t == 7)
        else:
            assert t == 8 or slot + 1 == len(shown)
    games = [line for line in metrics(run_dir) if "charts/episodic_return" in line]
    assert games[0]["charts/episodic_return"] == sum(acts[:8]) - 8
    assert [line["global_step"] for line in games] == [8, 16, 24, 32, 40, 48, 56]


def test_a_lost_life_ends_the_learning_episode_and_the_game_goes_on(tmp_path):
    """The fourth of eight steps loses a life; the next episode begins with that frame."""
    _, run_dir = run(tmp_path, env_id="tests.odd_games:TwoLives-v0")
    replay = checkpoint(run_dir)["replay"]
    shown = replay["obs"][:, 0, 0, 0] // 10
    assert shown[:10].tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert replay["first"][:10].tolist() == [0, 0, 0, 0, 0, 5, 5, 5, 5, 5]
    assert replay["end"][:10].nonzero().flatten().tolist() == [3, 8]
    steps = [line["global_step"] for line in metrics(run_dir) if "charts/episodic_return" in line]
    assert steps == [8, 16, 24, 32, 40, 48, 56]


# -------------------------------------------------------------------------------- Going on
def stop_after_saving(patch, number):
    """Ctrl-C some updates after the number-th checkpoint."""
    save = jedi.RunDir.save
    optimize = jedi.optimize
    saved = []

    def counting(self, state):
        save(self, state)
        saved.append(1)

    def interrupted(*inputs):
        if len(saved) == number:
            saved.append(0.5)
        elif len(saved) > number:
            raise KeyboardInterrupt
        optimize(*inputs)

    patch.setattr(jedi.RunDir, "save", counting)
    patch.setattr(jedi, "optimize", interrupted)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys):
    """It equals a whole run, if nothing is collected. What was logged later is forgotten."""
    changes = {"total_steps": 40, "final_epochs": 3, "checkpoint_minutes": 0.0}
    whole, whole_dir = run(tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        stop_after_saving(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", **changes)
    parts_dir = tmp_path / "parts" / whole_dir.name
    assert checkpoint(parts_dir)["epoch"] == 2
    with open(parts_dir / "metrics.jsonl", "a") as file:
        file.write('{"global_step": 41, "charts/episodic_return": 5.0}\n{"global_st')
    capsys.readouterr()
    parts, _ = run(tmp_path / "parts", **changes)
    assert "going on after epoch 2" in capsys.readouterr().out
    assert_equal(checkpoint(parts_dir), checkpoint(whole_dir))
    assert metrics(parts_dir) == metrics(whole_dir)
    assert parts["returns"] == whole["returns"]


def test_a_stopped_run_that_collects_begins_a_new_game(tmp_path, monkeypatch):
    game = "tests.odd_games:Endless-v0"
    changes = {"env_id": game, "eval_episodes": 1, "checkpoint_minutes": 0.0}
    monkeypatch.setattr(jedi, "MAX_STEPS", 5)
    with monkeypatch.context() as patch:
        stop_after_saving(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, **changes)
    result, run_dir = run(tmp_path, **changes)
    replay = checkpoint(run_dir)["replay"]
    assert result["global_step"] == 60
    assert int(replay["has_act"].sum()) == 60
    assert replay["first"].unique().tolist() == [0, 41]  # 40 steps have 41 frames
    assert not replay["end"].any()


SAVE_FOR_EVER = """
import sys, torch, jedi
from tests.tiny import tiny
run = jedi.RunDir(tiny(runs_dir=sys.argv[1]))
i = 0
while True:
    i += 1
    run.save({"i": i, "x": torch.full((2_000_000,), float(i))})
    print(i, flush=True)
"""


def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    command = [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    written = int(process.stdout.readline())
    time.sleep(0.013)  # it is writing
    process.kill()
    rest = process.stdout.read().split()
    process.wait()
    if rest:
        written = int(rest[-1])
    (path,) = tmp_path.rglob("ckpt.pt")
    state = torch.load(path, weights_only=True)
    assert state["i"] in (written, written + 1)
    assert (state["x"] == state["i"]).all()


def test_a_save_that_fails_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    """The disk is full in the middle of the file."""
    run_dir = jedi.RunDir(tiny(runs_dir=str(tmp_path)))
    run_dir.save({"i": 1})

    def full_disk(state, path):
        Path(path).write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        run_dir.save({"i": 2})
    assert torch.load(run_dir.checkpoint, weights_only=True) == {"i": 1}


def test_half_a_checkpoint_is_refused_in_one_line(finished_copy, capsys):
    """Nothing is lost: the file stays as it is."""
    (finished_copy / "result.json").unlink()
    file = finished_copy / "ckpt.pt"
    half = file.read_bytes()[: file.stat().st_size // 2]
    file.write_bytes(half)
    code, _, err = command_line(capsys, flags(runs_dir=finished_copy.parent))
    assert code == 2
    assert re.fullmatch(r"error: .*ckpt\.pt: .+\n", err)
    assert file.read_bytes() == half


def test_a_finished_run_says_so(finished, finished_copy, capsys):
    before = contents(finished_copy)
    result, _ = run(finished_copy.parent)
    assert "has finished" in capsys.readouterr().out
    assert result == as_json(finished[0])
    assert contents(finished_copy) == before
    (finished_copy / "ckpt.pt").unlink()  # it is large, and not needed any more
    run(finished_copy.parent)


def refusal(runs_dir, **changes):
    """The message with which a run is refused."""
    with pytest.raises(jedi.UsageError) as error:
        run(runs_dir, **changes)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_directory_takes_its_own_run_only(finished_copy, monkeypatch):
    runs_dir = finished_copy.parent
    before = contents(finished_copy)
    message = refusal(runs_dir, batch_size=5)
    assert str(finished_copy) in message
    assert "args.json" in message
    assert "--exp-name" in message
    run(runs_dir, checkpoint_minutes=5.0)  # this may change
    source = (ROOT / "jedi.py").read_text()
    changed = source.replace("gamma: float = 0.985", "gamma: float = 0.9")
    longer = source + "\nprint('more')\n"
    for name, text in (("jedi.py", changed), ("jedi.py", longer), ("fork.py", changed)):
        fork = runs_dir / name
        fork.write_text(text)
        monkeypatch.setattr(jedi, "__file__", str(fork))
        message = refusal(runs_dir)
        assert str(finished_copy) in message
        assert "--exp-name" in message
    assert contents(finished_copy) == before


def test_nan_stops_with_what_and_where(tmp_path, monkeypatch):
    loss = jedi.world_model_loss
    calls = []

    def poisoned(*inputs):
        calls.append(1)
        value, logs = loss(*inputs)
        if len(calls) == 6:  # the last of the second epoch
            logs["losses/reward"] = logs["losses/reward"] * math.nan
        return value, logs

    monkeypatch.setattr(jedi, "world_model_loss", poisoned)
    message = refusal(tmp_path, checkpoint_minutes=0.0)
    assert re.search(r"losses/reward .*world.model.* 2\b", message)
    assert "--learning-rate" in message
    (path,) = tmp_path.rglob("ckpt.pt")
    assert checkpoint(path.parent)["epoch"] == 1  # from before


def test_a_diverging_run_ends_with_exit_code_2(tmp_path, capsys):
    words = flags(runs_dir=tmp_path, learning_rate=1e20, warmup_updates=0)
    code, _, err = command_line(capsys, words)
    assert code == 2
    assert re.fullmatch(r"error: losses/\w+ .*--learning-rate\n", err)


def test_the_optional_logger(tmp_path, monkeypatch):
    """A stand-in for wandb hears what metrics.jsonl holds."""
    heard = []
    begun = []

    class Logger:
        def log(self, values, step):
            heard.append({"global_step": step} | values)

    def init(**settings):
        begun.append(settings)
        return Logger()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    _, run_dir = run(tmp_path, track=True)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == heard
    assert begun[0]["config"]["lstm_dim"] == 16
    assert begun[0]["id"] == run_dir.name


def test_the_optional_logger_names_the_missing_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    code, _, err = command_line(capsys, [*flags(runs_dir=tmp_path), "--track"])
    assert code == 2
    assert "wandb" in err  # --help says how to install it
    assert err.count("\n") == 1


# -------------------------------------------------------------------------------- Schedules
def rates(args):
    """The learning rates of encoder, denoiser, R and actor-critic at every update of a run."""
    agent = jedi.Agent(args, 3)
    wm_optimizer, ac_optimizer, wm_scheduler, ac_scheduler = jedi.make_optimizers(agent, args)
    _, wm_updates, ac_updates = jedi.count_updates(args)
    history = []
    for optimizer, scheduler, updates in (
        (wm_optimizer, wm_scheduler, wm_updates),
        (ac_optimizer, ac_scheduler, ac_updates),
    ):
        values = []
        for _ in range(updates):
            values.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        history.append(np.array(values))
    return history


def test_learning_rates_warm_up_and_fall_to_zero():
    schedule = {
        "warmup_updates": 4,
        "learning_rate": 0.1,
        "encoder_lr_scale": 0.5,
        "actor_critic_lr_scale": 0.25,
        "first_world_model_updates": 10,
    }
    for anneal in (False, True):
        wm_rates, ac_rates = rates(tiny(anneal_lr=anneal, **schedule))
        assert wm_rates.shape == (14, 3)
        assert ac_rates.shape == (7, 1)
        for scale, values in ((1, wm_rates[:, 1]), (1, wm_rates[:, 2]), (0.25, ac_rates[:, 0])):
            for k, value in enumerate(values):
                fall = 1 - k / len(values) if anneal else 1
                assert value == pytest.approx(0.1 * scale * min(1, (k + 1) / 4) * fall)
        assert wm_rates[:, 0] == pytest.approx(0.5 * wm_rates[:, 1])


def test_a_run_makes_the_updates_that_its_schedule_counts(finished):
    """So that the rates end at zero; also in epochs that collect nothing."""
    state = checkpoint(finished[1])
    epochs, wm_updates, ac_updates = jedi.count_updates(tiny())
    assert epochs == state["epoch"] == 3
    assert state["wm_scheduler"]["last_epoch"] == wm_updates == 8
    assert state["ac_scheduler"]["last_epoch"] == ac_updates == 7
    assert state["wm_scheduler"]["_last_lr"] == [0.0] * 3


def test_world_model_and_actor_critic_have_batches_of_their_own_size(tmp_path, monkeypatch):
    sizes = []

    def spy(name):
        loss = getattr(jedi, name)

        def spied(agent, data):  # a batch or a rollout
            sizes.append((name, len(data.act)))
            return loss(agent, data)

        monkeypatch.setattr(jedi, name, spied)

    spy("world_model_loss")
    spy("actor_critic_loss")
    run(tmp_path, batch_size=3, actor_critic_batch_size=5)
    assert set(sizes) == {("world_model_loss", 3), ("actor_critic_loss", 5)}


def test_every_group_has_its_own_largest_gradient():
    args = tiny(world_model_clip=1e-3, reward_end_clip=1e-2)
    agent = make_agent(args)
    optimizer, _, scheduler, _ = jedi.make_optimizers(agent, args)
    loss, _ = jedi.world_model_loss(agent, make_batch(args))
    jedi.optimize(loss, optimizer, scheduler)
    for name, largest in (("encoder", 1e-3), ("denoiser", 1e-3), ("reward_end", 1e-2)):
        network = agent.get_submodule(name)
        gradients = [parameter.grad.flatten() for parameter in network.parameters()]
        assert torch.cat(gradients).norm().item() == pytest.approx(largest, rel=1e-2)


def test_an_epoch_of_one_step(tmp_path):
    result, run_dir = run(tmp_path, total_steps=41)
    assert result["global_step"] == 41
    steps = [line["global_step"] for line in metrics(run_dir) if "world_model/error_1" in line]
    assert steps == [41]


def test_a_part_that_is_not_trained(tmp_path):
    """Random play, and a world model without a policy."""
    changes = {"first_actor_critic_updates": 0, "actor_critic_updates": 0, "anneal_lr": True}
    result, run_dir = run(tmp_path, **changes)
    assert len(result["returns"]) == 3
    assert "losses/policy" not in str(metrics(run_dir))


# -------------------------------------------------------------------------------- Hyperparameters
def fields_with_comments():
    """Every field of Args, in the order of the file, with the comment on its line."""
    comments = {}
    source = (ROOT / "jedi.py").read_text()
    for name, comment in re.findall(r"^    (\w+): .+ = .+?  # (.+)$", source, re.M):
        comments[name] = comment
    return comments


def test_every_field_is_documented_and_read():
    source = (ROOT / "jedi.py").read_text()
    comments = fields_with_comments()
    read = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            read.add(node.attr)
    names = [field.name for field in dataclasses.fields(jedi.Args)]
    for name in names:
        assert len(comments[name]) >= 8, name
        assert name in read, name
    for name in names[names.index("image_size") :]:  # before it stands what to run, and where
        assert re.search(r"\[[PDO]\b", comments[name]), name


def test_flags_win_over_the_preset():
    args = jedi.parse_args(["--preset", "small", "--batch-size", "7"])
    assert args == dataclasses.replace(jedi.PRESETS["small"], batch_size=7)
    words = "--batch-size 7 --preset=paper --encoder-channels 1 2 3 4".split()
    args = jedi.parse_args(words)
    changes = {"batch_size": 7, "encoder_channels": (1, 2, 3, 4)}
    assert args == dataclasses.replace(jedi.PRESETS["paper"], **changes)


@pytest.mark.parametrize("cuda, preset", [(False, "evening"), (True, "paper")])
def test_the_preset_follows_the_machine(monkeypatch, cuda, preset):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    fresh = types.SimpleNamespace(**runpy.run_path(str(ROOT / "jedi.py")))
    assert fresh.parse_args([]).preset == preset
    assert fresh.parse_args(["--compile"]) == fresh.PRESETS[preset]
    assert fresh.parse_args(["--no-compile"]).compile is False


@pytest.mark.parametrize("preset", jedi.PRESETS)
def test_help_shows_the_values_of_the_preset(capsys, preset):
    code, out, _ = command_line(capsys, ["--preset", preset, "--help"])
    assert code == 0
    for name in ("total_steps", "lstm_dim"):
        assert f"(default: {getattr(jedi.PRESETS[preset], name)})" in out


NO_FLAGS = ["--preset smal", "--preset=smal", "--no-such-flag 1", "--seed one"]


@pytest.mark.parametrize("words", NO_FLAGS)
def test_what_is_no_flag_is_refused(capsys, words):
    code, _, err = command_line(capsys, words.split())
    assert code == 2
    assert "Traceback" not in err
    assert re.split("[ =]", words)[0] in err


BAD = {
    "--env-id BraekoutNoFrameskip-v4": "Did you mean",
    "--env-id nowhere:Game-v0": "nowhere",
    "--env-id CartPole-v1": "uint8 images",
    "--device gpu": "--device",
    "--image-size 24": "--image-size 24",
    "--horizon 0": "--horizon 0",
    "--total-steps 30": "--total-steps",
    "--num-autoregressive-steps 0": "--num-autoregressive-steps 0",
    "--num-autoregressive-steps 5": "at most --horizon",
    "--eval-episodes 0": "--eval-episodes 0",
    "--gamma 5": "--gamma 5",
    "--lstm-dim 0": "--lstm-dim 0",
    "--cond-channels 36": "multiple of 8",
    "--denoiser-channels 112": "112",  # what 32 does not divide
    "--learning-rate -1": "--learning-rate -1.0",
    "--ent-coef nan": "--ent-coef nan",
    "--seed -1": "--seed -1",
    "--encoder-channels 0 0 0 0": "--encoder-channels",
    "--recency-weights 0 0 0 0": "--recency-weights",
    "--recency-weights 1 -1": "--recency-weights",
    "--runs-dir /proc/nowhere": "/proc/nowhere",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, words):
    """Before any training, and no directory is left."""
    code, _, err = command_line(capsys, [*flags(runs_dir=tmp_path), *words.split()])
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert BAD[words] in err.replace("_", "-")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(tmp_path, capsys):
    code, _, err = command_line(capsys, flags(runs_dir=tmp_path, device="cuda"))
    assert code == 2
    assert err.startswith("error: --device")
    assert err.count("\n") == 1


TOO_LARGE = [("total_steps", 10**12), ("batch_size", 10**9), ("actor_critic_batch_size", 10**9)]


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits on memory")
@pytest.mark.parametrize("name, value", TOO_LARGE)
def test_a_budget_that_does_not_fit(tmp_path, capsys, name, value):
    """The line names the flag and has the bytes."""
    code, _, err = command_line(capsys, flags(runs_dir=tmp_path, **{name: value}))
    assert code == 2
    assert err.startswith("error: ")
    assert "--" + name.replace("_", "-") in err
    assert re.search(r"allocate \d{11,} bytes", err)
    assert err.count("\n") == 1


def test_a_device_without_memory_is_one_line(tmp_path, capsys, monkeypatch):
    """It says what to lower, and the last checkpoint stays."""
    clip = torch.nn.utils.clip_grad_norm_
    calls = []

    def full(*inputs):
        calls.append(1)
        if len(calls) == 17:  # in the second epoch; the first one has 4 x 3 + 3 x 1 calls
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return clip(*inputs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", full)
    words = flags(runs_dir=tmp_path, checkpoint_minutes=0.0)
    code, _, err = command_line(capsys, words)
    assert code == 2
    assert err == "error: lower --batch-size: CUDA out of memory.\n"
    (path,) = tmp_path.rglob("ckpt.pt")
    assert checkpoint(path.parent)["epoch"] == 1


def test_any_other_error_says_how_to_go_on(tmp_path, capsys):
    """It keeps its traceback."""
    words = flags(runs_dir=tmp_path, env_id="tests.odd_games:BreaksDown-v0")
    with pytest.raises(ZeroDivisionError) as error:
        command_line(capsys, words)
    assert error.value.__notes__ == ["The same command goes on from the last checkpoint."]


@pytest.mark.parametrize("name, said", [("RewardOfSeven-v0", True), ("Stairs-v0", False)])
def test_rewards_at_every_step_are_remarked(tmp_path, capsys, name, said):
    """Then their sign tells next to nothing."""
    words = flags(runs_dir=tmp_path, env_id=f"tests.odd_games:{name}")
    _, out, _ = command_line(capsys, words)
    assert ("nearly every step has a reward" in out) == said


MY_GAME = """
import gymnasium as gym
from tests.odd_games import Stairs
gym.register("Mine-v0", entry_point=Stairs)
"""


def test_own_modules_in_the_current_folder(tmp_path, monkeypatch, capsys):
    """The script lies elsewhere."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "my_games.py").write_text(MY_GAME)
    shutil.copy(ROOT / "jedi.py", tmp_path / "method.py")
    monkeypatch.chdir(folder)
    words = flags(env_id="my_games:Mine-v0", total_steps=40, final_epochs=0)
    code, _, err = command_line(capsys, words, script=tmp_path / "method.py")
    assert code == 0, err
    run_dir = folder / "runs" / "my_games-Mine-v0__method__1"
    assert (run_dir / "script.py").read_bytes() == (ROOT / "jedi.py").read_bytes()
    assert json.loads((run_dir / "result.json").read_text())["exp_name"] == "method"


# -------------------------------------------------------------------------------- What is printed
PROGRESS = re.compile(r"^  (.+) (\d+)/(\d+), (\d+\.\d) min to go$", re.M)


def test_what_a_run_prints(finished):
    """What it will do, then every phase, then every epoch, then the score."""
    result, run_dir, out = finished
    lines = out.splitlines()
    assert lines[0].startswith(f"{run_dir}: ")
    for word in ("small", "cpu", "15 updates to go"):
        assert word in lines[0]
    epochs = [line for line in lines if line.startswith("epoch")]
    assert [line[:9] for line in epochs] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert "error_1 " in epochs[1]
    whole = []  # the lengths of phases that have a line at their end
    for _, i, count, _ in PROGRESS.findall(out):
        if i == count:
            whole.append(int(count))
    assert whole == [40, 4, 3, 20, 2, 2, 2, 2, 3]
    assert str(run_dir) in lines[-1]
    assert f"mean return {result['mean_return']:.2f} of 3 games" in lines[-1]


class FakeTime:
    """A clock on which every optimizer's step, and every step of the game, takes three seconds."""

    def __init__(self, patch):
        self.now = 1000.0
        self.lines = []  # (when, text)
        optimize = jedi.optimize
        act = jedi.Agent.act

        def slow_optimize(*inputs):
            self.now += 3
            optimize(*inputs)

        def slow_act(*inputs):
            self.now += 3
            return act(*inputs)

        def listen(text, **_):
            self.lines.append((self.now, text))

        patch.setattr(jedi, "time", types.SimpleNamespace(time=lambda: self.now))
        patch.setattr(jedi, "optimize", slow_optimize)
        patch.setattr(jedi.Agent, "act", slow_act)
        patch.setattr(jedi, "print", listen, raising=False)


def test_a_line_every_ten_seconds(tmp_path, monkeypatch):
    """The first comes at once. Minutes to go are those of all updates that remain."""
    clock = FakeTime(monkeypatch)
    updates = {"first_world_model_updates": 20, "first_actor_critic_updates": 20}
    run(tmp_path, env_id="tests.odd_games:Stairs-v0", **updates)
    training = []
    for when, text in clock.lines:
        if text.startswith("  game"):
            break
        training.append(when)
    assert training[0] == 1000
    assert max(np.diff(training)) <= 10 + 3
    games = [when for when, text in clock.lines if text.startswith("  game")]
    assert max(np.diff(games)) == 24  # a game of eight steps
    out = "\n".join(text for _, text in clock.lines)
    left = {}
    for what, i, count, minutes in PROGRESS.findall(out):
        left[what[:5], int(i), int(count)] = float(minutes)
    assert left["world", 4, 20] == 2.2  # 44 of 48 updates remain
    assert left["actor", 4, 20] == 1.2  # 24 of 28
    assert left["actor", 2, 2] == 0.0


TOUCH_MEMORY = """
import resource, torch, jedi
jedi.keep_freed_memory()
for i in range(25):
    if i == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_freed_memory_is_kept():
    """To fill 64 MiB twenty times costs a page fault per 4 KiB each time, or few."""
    command = [sys.executable, "-c", TOUCH_MEMORY]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(out.stdout) < 20 * 16384 / 2


def test_a_run_keeps_freed_memory(tmp_path, monkeypatch):
    """From its beginning."""

    def called():
        raise MemoryError

    monkeypatch.setattr(jedi, "keep_freed_memory", called)
    with pytest.raises(MemoryError):
        run(tmp_path)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------- Tools
def test_the_report_of_a_gpu_survives_what_stops(monkeypatch):
    """A stage that fails or is stopped is told; the paragraph has the numbers that were printed."""
    script = "print('world model    12.5 ms'); print('a whole run    3.2 hours'); 1 / 0"
    failed = gpu_smoke.run_stage("compiled", ["-c", script], 30)
    assert failed["exit"] == 1
    monkeypatch.setattr(gpu_smoke, "QUIET", 0.2)
    stopped = gpu_smoke.run_stage("learning", ["-c", "import time; time.sleep(60)"], 1)
    assert stopped["exit"] == "stopped"
    assert stopped["seconds"] < 10
    report = {
        "device": "a card",
        "preset": "paper",
        "torch": "2",
        "system": "x",
        "stages": {"compiled": failed, "learning": stopped},
    }
    text = gpu_smoke.summary(report)
    assert "compiled: world-model update 12.5 ms" in text
    assert "a whole run about 3.2 hours" in text
    assert "eager: not run. NoisyCatch by `small`: None" in text
    assert "Tests: not run" in text
    assert "Not ended well: compiled, learning" in text


def test_the_benchmark_times_what_a_run_runs():
    seconds = benchmark.measure(tiny(), CPU, repetitions=2)
    assert list(seconds) == ["collect", "world model", "actor-critic"]
    for value in seconds.values():
        assert 0 < value < 10
    seconds = {"collect": 60.0, "world model": 600.0, "actor-critic": 6000.0}
    hours = benchmark.hours_of_a_run(tiny(), seconds)
    assert hours == pytest.approx((60 * 60 + 8 * 600 + 7 * 6000) / 3600)


CHAIN = {
    "first_collect_steps": 60,
    "final_epochs": 0,
    "horizon": 10,
    "first_actor_critic_updates": 0,
}


@pytest.mark.parametrize("name", ablations.VARIANTS)
def test_an_ablation_is_a_change_of_the_present_file(name):
    """It changes the loss or what the sampler draws, unless it is another learning rate."""
    outputs = []
    for source in (jedi, ablations.load_variant(name)):
        agent = make_agent(tiny(num_autoregressive_steps=3))
        changed = source.Agent(agent.args, 3)
        changed.load_state_dict(agent.state_dict())
        batch = make_batch(agent.args)
        torch.manual_seed(3)
        loss, _ = source.world_model_loss(changed, batch)
        loss.backward()
        z = changed.encoder(batch.obs)[:, :4]
        drawn = changed.denoiser.sample(z, batch.act[:, :4], torch.randn_like(z[:, 0]))
        gradient = changed.encoder.net[0].weight.grad.norm()
        outputs.append([loss.item(), gradient.item(), drawn.std().item()])
    assert np.isfinite(outputs).all()
    assert (outputs[0] == outputs[1]) == (name in ("full", "frozen"))


def test_the_chain_is_measured_and_plays_like_the_agent(tmp_path, capsys, monkeypatch):
    """The measurement goes through all links, and its pushes leave the game as it was."""
    _, run_dir = run(tmp_path, env_id="BreakoutNoFrameskip-v4", eval_episodes=1, **CHAIN)
    numbers = chain.main([str(run_dir), "--steps", "150", "--out", str(tmp_path / "chain.json")])
    out = capsys.readouterr().out
    for letter in "abcdef":
        assert f"({letter}) " in out
    assert json.loads((tmp_path / "chain.json").read_text()) == as_json(numbers)
    assert math.isfinite(numbers["push"])
    assert abs(numbers["choice of ends"][0]) <= 1
    assert numbers["latents"]["without whole frame"] > numbers["latents"]["without ball"] > 0
    source = evaluate.Run(run_dir, "cpu", 7)
    with torch.no_grad():
        uniform = functools.partial(source.agent.act, epsilon=1.0)
        pushed = chain.record(source, uniform, 150, 7).replay.data["obs"]
        source = evaluate.Run(run_dir, "cpu", 7)
        monkeypatch.setattr(chain, "PUSH_EVERY", 10**9)
        uniform = functools.partial(source.agent.act, epsilon=1.0)
        undisturbed = chain.record(source, uniform, 150, 7).replay.data["obs"]
    assert torch.equal(pushed, undisturbed)


def test_the_outcome_of_a_choice_is_what_the_game_does(tmp_path, monkeypatch):
    """Who fires all the time gets the rewards and ends that a trial of FIRE had foretold."""
    _, run_dir = run(tmp_path, env_id="BreakoutNoFrameskip-v4", eval_episodes=1, **CHAIN)
    monkeypatch.setattr(chain, "PUSH_EVERY", 3)
    fire = 1
    play = chain.record(evaluate.Run(run_dir, "cpu", 7), lambda obs, state: (fire, None), 200, 7)
    data = play.replay.data
    tried = 0
    for (slot, *pair), outcomes in zip(play.pushes.tolist(), play.outcomes.tolist()):
        if fire not in pair or slot + 10 > play.replay.size:
            continue
        rew = data["rew"][slot : slot + 10]
        end = data["end"][slot : slot + 10]
        ended_before = end.int().cumsum(0) - end.int()
        assert outcomes[pair.index(fire)] == [rew[ended_before == 0].sum().item(), end.any().item()]
        tried += 1
    assert tried > 10
    assert data["end"].any()


def test_a_blind_player_takes_every_action_as_often_as_the_policy():
    replay = make_replay(tiny())
    choose = chain.blind_player(replay)
    taken = replay.data["act"][replay.data["has_act"]]
    torch.manual_seed(0)
    drawn = torch.tensor([choose(None, None)[0] for _ in range(4000)])
    for action in range(4):
        share = (taken == action).float().mean().item()
        assert (drawn == action).float().mean().item() == pytest.approx(share, abs=0.03)


def test_the_area_under_the_roc_curve():
    """A tie counts half."""
    score = torch.tensor([0.1, 0.4, 0.4, 0.9])
    assert chain.roc_auc(score, torch.tensor([False, False, True, True])) == 0.875
    assert chain.roc_auc(score, torch.tensor([True, False, False, False])) == 0


def test_an_exported_agent_is_the_agent(finished, tmp_path):
    """In half precision, without the replay."""
    command = [sys.executable, "tests/export_agent.py", str(finished[1]), str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert set(state) == {"agent"}
    for name, value in checkpoint(finished[1])["agent"].items():
        torch.testing.assert_close(state["agent"][name].float(), value, rtol=1e-3, atol=1e-3)
    assert (tmp_path / "args.json").read_bytes() == (finished[1] / "args.json").read_bytes()
    assert (tmp_path / "ckpt.pt").stat().st_size < (finished[1] / "ckpt.pt").stat().st_size / 3


def test_the_fork_of_the_readme_works(tmp_path):
    """Its diff applies to jedi.py, and what comes out trains."""
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    fork = tmp_path / "fork.py"
    shutil.copy(ROOT / "jedi.py", fork)
    subprocess.run(["patch", str(fork)], input=diff, text=True, check=True, capture_output=True)
    assert fork.read_text() != (ROOT / "jedi.py").read_text()
    spec = importlib.util.spec_from_file_location("fork", fork)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fork"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    args = module.Args(**dataclasses.asdict(tiny(runs_dir=str(tmp_path), exp_name="fork")))
    result = module.main(args)
    assert result["global_step"] == 60
    assert np.isfinite(result["returns"]).all()


# -------------------------------------------------------------------------------- Slow: learning
@pytest.fixture
def runs_dir(tmp_path):
    """The folder $JEDI_RUNS, where runs are kept and go on; else one for this test alone."""
    return Path(os.environ.get("JEDI_RUNS", tmp_path)).resolve()


def learn(runs_dir, game, seed, *words, exp_name="jedi"):
    """Trains with the small preset, in this process -> result."""
    command = f"--env-id tests.toy:{game}-v0 --preset small --device cpu --seed {seed}".split()
    command += ["--exp-name", exp_name, "--runs-dir", str(runs_dir), *words]
    return jedi.main(jedi.parse_args(command))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_learns_the_toy_game(runs_dir, seed):
    result = learn(runs_dir, "Catch", seed)
    assert result["mean_return"] >= 8


@pytest.mark.slow
def test_does_not_learn_with_shuffled_actions(runs_dir, monkeypatch):
    """The control: the same budget, but nobody can know what the actions do."""
    loss = jedi.world_model_loss

    def shuffled(agent, batch):
        order = torch.randperm(batch.act.numel())
        act = batch.act.flatten()[order].view_as(batch.act)
        return loss(agent, batch._replace(act=act))

    monkeypatch.setattr(jedi, "world_model_loss", shuffled)
    assert learn(runs_dir, "Catch", 1, exp_name="shuffled")["mean_return"] < 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_learned_encoder_is_imagined_better_than_its_frozen_twin_in_noise(runs_dir, seed):
    """On a background that nobody can predict, what the joint embedding drops decides."""
    learned = learn(runs_dir, "NoisyCatch", seed)
    learn(runs_dir, "NoisyCatch", seed, "--encoder-lr-scale", "0", exp_name="frozen")
    errors = {}
    for name in ("jedi", "frozen"):
        for line in metrics(runs_dir / f"tests.toy-NoisyCatch-v0__{name}__{seed}"):
            if "world_model/error_1" in line:
                errors[name] = line["world_model/error_1"]  # of the last epoch
    assert learned["mean_return"] >= 8
    assert errors["jedi"] < 0.7 * errors["frozen"]
