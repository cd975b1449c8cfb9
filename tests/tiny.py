"""Tiny hyperparameters, networks and recordings, which the tests share."""

import dataclasses
import runpy
import sys
from pathlib import Path

import numpy as np
import torch

import jedi

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = {
    "env_id": "tests.toy:Catch-v0",
    "preset": "small",
    "device": "cpu",
    "image_size": 16,
    "encoder_channels": (8, 8, 8, 4),
    "num_autoregressive_steps": 2,
    "denoiser_channels": 16,
    "cond_channels": 32,
    "reward_end_channels": 8,
    "lstm_dim": 16,
    "actor_critic_channels": (8, 8),
    "horizon": 3,
    "batch_size": 4,
    "actor_critic_batch_size": 5,
    "warmup_updates": 2,
    "total_steps": 60,
    "first_collect_steps": 40,
    "collect_steps": 20,
    "first_world_model_updates": 4,
    "world_model_updates": 2,
    "first_actor_critic_updates": 3,
    "actor_critic_updates": 2,
    "final_epochs": 1,
    "eval_episodes": 3,
}


def tiny(**changes):
    """Returns what the command line makes of flags(**changes)."""
    return dataclasses.replace(jedi.PRESETS["small"], **(TINY | changes))


def flags(**changes):
    """Returns the words of a command line."""
    words = []
    for name, value in (TINY | changes).items():
        words.append("--" + name.replace("_", "-"))
        values = value if isinstance(value, tuple) else [value]
        words += [str(number) for number in values]
    return words


def make_agent(args, num_actions=3):
    """Makes an agent without zero-initialised layers, so that every path carries a gradient."""
    torch.manual_seed(0)
    agent = jedi.Agent(args, num_actions)
    for parameter in agent.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return agent


def make_replay(args, episodes=((5, True), (9, False), (12, True)), show=None):
    """Records episodes (length, ended or truncated) of random frames, actions and rewards.

    `show` turns the number of a frame, counted from 0, into what it shows, instead of noise.
    """
    rng = np.random.default_rng(0)
    shape = (3, args.image_size, args.image_size)
    steps = sum(length for length, _ in episodes)
    replay = jedi.ReplayBuffer(dataclasses.replace(args, total_steps=steps), CPU)

    def frame():
        if show:
            return np.full(shape, show(replay.size), np.uint8)
        return rng.integers(0, 256, shape, dtype=np.uint8)

    for length, ended in episodes:
        replay.start_episode(frame())
        for t in range(length):
            act = int(rng.integers(3))
            rew = float(rng.integers(-2, 3))
            end = ended and t == length - 1
            replay.add(act, rew, end, frame())
    return replay


def make_batch(args, batch_size=64, **recording):
    """Draws segments as long as those of the world model's loss."""
    replay = make_replay(args, **recording)
    torch.manual_seed(0)
    anchor = replay.anchors(batch_size)
    return replay.sample(anchor, args.num_conditioning_steps - 1, args.horizon)


def seeded(function, *inputs, seed=0):
    """Calls the function with the random numbers of the seed."""
    torch.manual_seed(seed)
    return function(*inputs)


def assert_equal(a, b, path=""):
    """Bit equality of nested dictionaries and lists of tensors and values."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, value in enumerate(a):
            assert_equal(value, b[i], f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def command_line(capsys, words, script=ROOT / "jedi.py"):
    """Runs the script in this process, as `python jedi.py` does -> exit code, stdout, stderr."""
    capsys.readouterr()
    arguments = sys.argv
    path = list(sys.path)
    sys.argv = [str(script), *words]
    code = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as exit_:
        code = exit_.code
    finally:
        sys.argv = arguments
        sys.path[:] = path
    out, err = capsys.readouterr()
    return code, out, err
