"""JEDI: Joint Embedding DIffusion, a latent-diffusion world-model agent for Atari 100k, in one file.

Papers: arXiv 2505.19698 ("Performance Asymmetry in Model-Based RL") and its successor 2605.13013. JEDI's parent is DIAMOND
(arXiv 2405.12399), which imagines the next 64x64x3 frame by diffusion. JEDI imagines the next 16x8x8 latent instead. It has
no decoder and no reconstruction loss: the encoder learns only from what helps to predict the next latent, reward and end.

    python jedi.py --env-id BreakoutNoFrameskip-v4         # the published experiment on a GPU, a small one on a CPU
    python jedi.py --resume runs/<run>                     # continue where a run stopped
    python jedi.py --help                                  # every hyperparameter, with its symbol and where it comes from

Sections: hyperparameters, environment, replay, blocks, encoder, latent diffusion, reward/end model, actor-critic,
imagination, updates, measurements, acting, run directory, main loop.

Provenance of numbers and choices: [P] published for JEDI, [D] DIAMOND's default, [O] our own, measured (see the README).
Letters of shapes: B batch, T time, L conditioning steps, H horizon, C h w latent channels and size, S image size, A actions.
"""

import ctypes
import dataclasses
import difflib
import importlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from typing import Literal, NamedTuple

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

gym.register_envs(ale_py)

CHECKPOINT_FORMAT = 1  # raised when a checkpoint's content changes meaning


class UsageError(Exception):
    """Something that the user can mend. Its text is one line: what is wrong, and the remedy. The command line exits with 2."""


# ====================================================================================================================
# Hyperparameters. The defaults are the `paper` preset; SMALL, below, lists what `--preset small` changes.
# ====================================================================================================================
@dataclasses.dataclass
class Args:
    """Every hyperparameter, with its symbol, unit and provenance. The defaults are the paper preset."""

    env_id: str = "BreakoutNoFrameskip-v4"
    """gymnasium id: <Game>NoFrameskip-v4, or module:Name-v0 for one of image observations and Discrete actions"""
    preset: Literal["auto", "paper", "small"] = "auto"
    """paper: the published size and schedule; small: minutes on a CPU; auto: paper on CUDA, else small. Flags win over it"""
    seed: int = 1
    """seed of every random number; on a CPU it determines the run bit for bit"""
    device: str = "auto"
    """auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, mps"""
    compile: bool = False
    """torch.compile the losses and the imagined step; the command line turns it on for CUDA. Eager is the reference"""
    cuda_graphs: bool = False
    """replay each update as one CUDA graph instead of launching its kernels; the command line turns it on for CUDA"""
    bf16: bool = False
    """bfloat16 in the convolutions of all networks but the encoder; the command line turns it on for CUDA"""
    exp_name: str = "jedi"
    """name of the method in the run directory and in the result; change it in a fork"""
    runs_dir: str = "runs"
    """where run directories are made"""
    resume: str | None = None
    """run directory to continue; every other flag then comes from that run. auto: the newest of this game, name and seed"""
    checkpoint_minutes: float = 10.0
    """minutes between checkpoints; one is also written at the end and on Ctrl-C"""
    track: bool = False
    """also log to Weights & Biases (pip install wandb)"""
    tensorboard: bool = False
    """also log to TensorBoard (pip install tensorboard)"""

    # Environment and replay (spec: Machado et al. 2018)
    image_size: int = 64
    """S, pixels: frames are S x S x 3, latents S/8 x S/8 [D]"""
    allow_sticky: bool = False
    """accept an id with sticky actions or a built-in frame skip, such as ALE/Breakout-v5: not comparable with Atari 100k"""
    recency_weights: tuple[float, ...] = (0.1, 0.1, 0.1, 0.7)
    """probability of each equal part of the replayed episodes, oldest to newest [D]"""

    # Encoder E
    encoder_channels: tuple[int, int, int, int] = (32, 32, 32, 16)
    """width of each stage; the last is C, the latent's channels [P]"""
    latent_bound: float = 3.0
    """s of C(z) = s tanh(z / s) [P]"""
    latent_norm: Literal["none", "batch"] = "none"
    """normalisation before the bound: none [P], or batch, the mean of each position and one std for all [O]"""
    encoder_lr_scale: float = 0.3
    """learning rate of the encoder / learning rate of the world model [P]"""

    # Latent diffusion dynamics D
    num_conditioning_steps: int = 4
    """L, past latents and actions that the denoiser sees [D]"""
    num_autoregressive_steps: int = 2
    """n, next latents predicted in a row by the training loss; n >= 2 [P]"""
    denoiser_channels: int = 160
    """width of the U-Net [P]"""
    denoiser_depth: int = 1
    """residual blocks before and (plus one) after the U-Net's middle [O: gives the published 13.5 M parameters in all]"""
    cond_channels: int = 256
    """width of the embedding of noise level and actions [D]"""
    predict: Literal["absolute", "change"] = "absolute"
    """what is denoised: the next latent z' [P], or the change z' - z scaled to sigma_data by its running rms [O]"""
    sigma_data: float = 0.5
    """std that EDM's preconditioning assumes of the clean data [D]"""
    p_mean: float = -0.4
    """mean of ln(sigma) in training [D]"""
    p_std: float = 1.2
    """std of ln(sigma) in training [D]"""
    sigma_train_min: float = 2e-3
    """smallest sigma in training [D]"""
    sigma_train_max: float = 20.0
    """largest sigma in training [D]"""
    num_denoising_steps: int = 3
    """Euler steps per imagined latent [D]"""
    sigma_min: float = 2e-3
    """last non-zero sigma of the sampler [D]"""
    sigma_max: float = 5.0
    """first sigma of the sampler [D]"""
    rho: float = 7.0
    """exponent of Karras' schedule [D]"""
    s_churn: float = 0.0
    """stochasticity of the sampler, S_churn of Karras et al.; 1 in JEDI's stochastic-Atari experiment [P]"""
    sampler_start: Literal["unit", "sigma_max"] = "unit"
    """std of the sampler's first noise: 1 [D] or sigma_max (EDM)"""

    # Reward and end model R
    reward_end_channels: int = 32
    """width of R's residual blocks [D]"""
    lstm_dim: int = 512
    """units of R's LSTM and of the actor-critic's [D]"""

    # Actor-critic
    actor_critic_channels: tuple[int, int] = (32, 64)
    """widths of the actor-critic's two residual blocks [O, after D]"""
    horizon: int = 15
    """H, imagined steps per rollout [D]"""
    gamma: float = 0.985
    """discount per agent step [D]"""
    lambda_: float = 0.95
    """lambda of the lambda-returns [D]"""
    ent_coef: float = 0.001
    """eta, weight of the policy's entropy in nats [D]"""
    vf_coef: float = 1.0
    """weight of the value loss [D]"""

    # Optimisation
    batch_size: int = 32
    """B, replayed segments per update; the paper reports the better of 32 and 64 per game [P]"""
    learning_rate: float = 1e-4
    """AdamW's rate for denoiser and reward/end model [D]"""
    actor_critic_lr: float = 1e-4
    """AdamW's rate for the actor-critic [D]"""
    weight_decay: float = 1e-2
    """AdamW's weight decay of the world model, on every parameter; 0 for the actor-critic [D, who spares biases and norms]"""
    warmup_updates: int = 100
    """updates of linear learning-rate warm-up [D]"""
    lr_decay: float = 0.0
    """share of all updates, at the end, over which the learning rates fall linearly to 0: 0 [D]"""
    denoiser_max_grad_norm: float = 1.0
    """gradient clip of the denoiser [D], and of the encoder [O]"""
    reward_end_max_grad_norm: float = 100.0
    """gradient clip of the reward/end model [D]"""
    actor_critic_max_grad_norm: float = 100.0
    """gradient clip of the actor-critic [D]"""

    # Schedule. One agent step is 4 frames, so 100,000 steps are the 400k frames of "Atari 100k"
    total_steps: int = 100_000
    """agent steps in the environment [D]"""
    first_collect_steps: int = 5_000
    """agent steps before the first update [D]"""
    first_collect_max: int = 10_000
    """upper bound of the first collection, which goes on until first_collect_rewards were seen [D]"""
    first_collect_rewards: int = 10
    """the first collection ends once so many steps had another than the most frequent sign of reward [D]"""
    steps_per_epoch: int = 100
    """agent steps per later epoch [D]"""
    final_epochs: int = 50
    """epochs without collecting at the end [D]"""
    first_world_model_updates: int = 10_000
    """world-model updates in the first epoch [D]"""
    world_model_updates: int = 400
    """world-model updates per later epoch [D]"""
    first_actor_critic_updates: int = 5_000
    """actor-critic updates in the first epoch [D]"""
    actor_critic_updates: int = 400
    """actor-critic updates per later epoch [D]"""
    epsilon: float = 0.01
    """probability of a uniformly random action while collecting; 0 in evaluation [D]"""
    eval_episodes: int = 100
    """full games of the final score, played with the last weights [D]"""


SMALL = dict(
    encoder_channels=(8, 16, 32, 16), latent_norm="batch", encoder_lr_scale=0.01, num_autoregressive_steps=4,
    denoiser_channels=48, cond_channels=128, reward_end_channels=16, lstm_dim=128, actor_critic_channels=(16, 32),
    horizon=10, ent_coef=0.01, batch_size=24, learning_rate=5e-4, actor_critic_lr=7e-4, actor_critic_max_grad_norm=1.0,
    lr_decay=0.3, total_steps=3_000, first_collect_steps=2_000, first_collect_max=2_000, steps_per_epoch=200, final_epochs=1,
    first_world_model_updates=300, world_model_updates=30, first_actor_critic_updates=100, actor_critic_updates=40,
    eval_episodes=10,
)  # fmt: skip


# ====================================================================================================================
# Environment: the usual Atari protocol (Machado et al. 2018), or any image environment as it is
# ====================================================================================================================
FRAME_SKIP, NOOP_MAX = 4, 30  # [D]


def area_weights(size_in: int, size_out: int) -> np.ndarray:
    """[size_out, size_in]: the share of each input pixel in each output bin, fractional at the edges as in cv2.INTER_AREA."""
    edges = np.linspace(0, size_in, size_out + 1)
    lower, upper = edges[:-1, None], edges[1:, None]  # [size_out, 1]
    pixel = np.arange(size_in)[None]  # [1, size_in]
    overlap = np.clip(np.minimum(upper, pixel + 1) - np.maximum(lower, pixel), 0, None)
    return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)


class ResizeFrame(gym.ObservationWrapper):
    """uint8 screen [height, width, 3] (or grey) -> uint8 frame [3, S, S] by area averaging."""

    def __init__(self, env: gym.Env, size: int):
        super().__init__(env)
        height, width = env.observation_space.shape[:2]
        self.rows, self.cols = area_weights(height, size), area_weights(width, size)
        self.observation_space = gym.spaces.Box(0, 255, (3, size, size), np.uint8)

    def observation(self, screen: np.ndarray) -> np.ndarray:
        screen = np.broadcast_to(screen.reshape(*screen.shape[:2], -1), (*screen.shape[:2], 3))
        channels = screen.transpose(2, 0, 1).astype(np.float32)  # [3, height, width]
        return np.rint(self.rows @ channels @ self.cols.T).astype(np.uint8)  # [3, S, S]


class AtariGame(gym.Wrapper):
    """No-op starts and frame skip with a pixelwise max over the last two raw frames. No FIRE-reset."""

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        for _ in range(self.env.unwrapped.np_random.integers(1, NOOP_MAX + 1)):
            obs, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                obs, info = self.env.reset()
        return obs, info

    def step(self, action):
        total, last = 0.0, None
        for _ in range(FRAME_SKIP):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:  # the last observation is the real last screen
                return obs, total, terminated, truncated, info
            previous, last = last, obs
        return np.maximum(previous, last), total, terminated, truncated, info


class EpisodicLife(gym.Wrapper):
    """A lost life ends the learning episode; the next reset() goes on with the same game, so that later lives are seen too."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.game_over, self.obs, self.lives = True, None, 0

    def reset(self, **kwargs):
        if self.game_over or "seed" in kwargs:
            self.obs, info = self.env.reset(**kwargs)
        else:
            info = {}
        self.game_over, self.lives = False, self.env.unwrapped.ale.lives()
        return self.obs, info

    def step(self, action):
        self.obs, reward, terminated, truncated, info = self.env.step(action)
        self.game_over = terminated or truncated
        lives, self.lives = self.lives, self.env.unwrapped.ale.lives()
        return self.obs, reward, terminated or self.lives < lives, truncated, info


def is_atari(spec: gym.envs.registration.EnvSpec) -> bool:
    return str(spec.entry_point).startswith("ale_py")


def make_env(env_id: str, seed: int, training: bool, image_size: int = 64, allow_sticky: bool = False) -> gym.Env:
    """Environment with uint8 frames [3, S, S], discrete actions, unclipped rewards and, in the info of a full game's last
    step, `episode` = {"r": return, "l": length}. `training` makes a lost life an end. Seeded; reset() goes on from the seed.

    Raises UsageError for an unknown id, a non-image observation, a non-discrete action, or (unless allowed) sticky actions.
    """
    module, _, name = env_id.rpartition(":")
    try:
        importlib.import_module(module) if module else None
        spec = gym.spec(name)
    except ImportError as error:
        raise UsageError(
            f"--env-id {env_id}: {error}; the part before the colon is a Python module that registers the environment"
        ) from None
    except (gym.error.Error, ValueError):
        close = difflib.get_close_matches(name, list(gym.registry), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "an Atari id looks like BreakoutNoFrameskip-v4"
        raise UsageError(f"--env-id {env_id}: no such environment; {hint}") from None
    if atari := is_atari(spec):
        sticky, skip = spec.kwargs.get("repeat_action_probability", 0), spec.kwargs.get("frameskip", 1)
        if (sticky or skip != 1) and not allow_sticky:
            game = "".join(part.capitalize() for part in str(spec.kwargs["game"]).split("_"))
            raise UsageError(
                f"--env-id {env_id} repeats the last action with probability {sticky} (sticky actions) and skips {skip} "
                f"frames itself; Atari 100k is --env-id {game}NoFrameskip-v4. Pass --allow-sticky to keep it knowingly"
            )
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    env = gym.make(name, **(dict(frameskip=1) if atari else {}))
    space = env.observation_space
    if not (isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and len(space.shape) in (2, 3)
            and (space.shape[2:] in ((), (1,), (3,)))):  # fmt: skip
        raise UsageError(
            f"--env-id {env_id}: observations are {space}, not uint8 images [height, width, 1 or 3]; choose another env"
        )
    if not isinstance(env.action_space, gym.spaces.Discrete):
        raise UsageError(f"--env-id {env_id}: actions are {env.action_space}, not Discrete; choose another environment")
    env = AtariGame(env) if atari else env
    env = gym.wrappers.RecordEpisodeStatistics(ResizeFrame(env, image_size))
    env = EpisodicLife(env) if atari and training else env
    env.reset(seed=seed)
    return env


# ====================================================================================================================
# Replay: uint8, preallocated on the training device, so that a batch is one index
# ====================================================================================================================
class Batch(NamedTuple):
    """Segments of T consecutive frames around an anchor. Outside the anchor's episode everything is padding: real is False,
    frames before the episode repeat its first frame, and nothing of it may enter a loss."""

    obs: Tensor  # [B, T, 3, S, S] uint8
    act: Tensor  # [B, T] long, 0 where step is False
    rew: Tensor  # [B, T] float, sign of the reward that followed act
    end: Tensor  # [B, T] long, 1 if act ended the learning episode (no bootstrap); a truncation is 0
    real: Tensor  # [B, T] bool, the frame belongs to the episode
    step: Tensor  # [B, T] bool, an action was recorded at this frame (False for a final frame)


class ReplayBuffer:
    """One slot per frame. The final frame of an episode keeps its own slot, which holds no action.

    Grows if episodes are so short that their final frames do not fit into the 10 % reserve.
    """

    FIELDS = ("obs", "act", "rew", "end", "trunc", "has_step", "first", "episode")

    def __init__(self, num_steps: int, image_size: int, device: torch.device, recency_weights: tuple[float, ...] = (1.0,)):
        capacity, self.device, self.recency_weights = int(1.1 * num_steps) + 2, device, recency_weights
        self.obs = torch.zeros(capacity, 3, image_size, image_size, dtype=torch.uint8, device=device)
        self.act, self.first, self.episode = (torch.zeros(capacity, dtype=torch.long, device=device) for _ in range(3))
        self.rew = torch.zeros(capacity, device=device)
        self.end, self.trunc, self.has_step = (torch.zeros(capacity, dtype=torch.bool, device=device) for _ in range(3))
        self.slot_of_step = torch.zeros(num_steps, dtype=torch.long, device=device)
        self.size, self.num_steps = 0, 0  # slots and steps in use
        self.first_step_of_episode: list[int] = []
        self.parts = None  # cache of the recency parts

    def begin_episode(self, obs: np.ndarray) -> None:
        """obs: uint8 [3, S, S], the first frame. An episode that was still open, as after a resume, is truncated."""
        if self.size > 1 and not self.end[self.size - 2]:
            self.trunc[self.size - 2] = True
        self.first_step_of_episode.append(self.num_steps)
        self.first_slot = self.size
        self._append(obs)

    def add(self, act: int, rew: float, end: bool, trunc: bool, next_obs: np.ndarray) -> None:
        """Records the action taken at the newest frame, what followed it, and the next frame [3, S, S]."""
        slot = self.size - 1
        self.act[slot], self.rew[slot], self.end[slot], self.trunc[slot], self.has_step[slot] = act, rew, end, trunc, True
        self.slot_of_step[self.num_steps] = slot
        self.num_steps += 1
        self._append(next_obs)

    def _append(self, obs: np.ndarray) -> None:
        if self.size == len(self.obs):
            for name in self.FIELDS:
                old = getattr(self, name)
                setattr(self, name, torch.cat([old, torch.zeros_like(old[: len(old) // 2 + 1])]))
        self.obs[self.size] = torch.from_numpy(obs)
        self.first[self.size], self.episode[self.size] = self.first_slot, len(self.first_step_of_episode)
        self.size += 1
        self.parts = None

    def sample(self, batch_size: int, before: int, after: int, generator: torch.Generator, newest: int | None = None) -> Batch:
        """Segments of `before` frames, an anchor frame at which an action was recorded, and `after` frames.

        Anchors are uniform within the recency parts, or among the `newest` steps.
        """
        if newest is not None:
            step = self.num_steps - 1 - torch.randint(newest, (batch_size,), generator=generator, device=self.device)  # [B]
        else:
            if self.parts is None:
                k, episodes = len(self.recency_weights), len(self.first_step_of_episode)
                bounds = [self.first_step_of_episode[episodes * i // k] for i in range(k)] + [self.num_steps]
                weights = [w * (hi > lo) for w, lo, hi in zip(self.recency_weights, bounds, bounds[1:])]
                self.parts = torch.tensor(bounds, device=self.device), torch.tensor(weights, device=self.device)
            bounds, weights = self.parts
            part = torch.multinomial(weights, batch_size, replacement=True, generator=generator)  # [B]
            u = torch.rand(batch_size, generator=generator, device=self.device)
            # DEVIATES: uniform over the part's steps; DIAMOND draws an episode of the part, then a step of it
            step = bounds[part] + (u * (bounds[part + 1] - bounds[part])).long()  # [B]
        anchor = self.slot_of_step[step, None]  # [B, 1]
        slot = anchor + torch.arange(-before, after + 1, device=self.device)  # [B, T]
        # DEVIATES: before its episode a segment repeats the first frame; DIAMOND pads with zeros
        inside = torch.minimum(torch.maximum(slot, self.first[anchor]), torch.full_like(slot, self.size - 1))
        real = (slot == inside) & (self.episode[inside] == self.episode[anchor])
        step = real & self.has_step[inside]
        act = torch.where(step, self.act[inside], 0)
        return Batch(self.obs[inside], act, self.rew[inside].sign(), self.end[inside].long(), real, step)

    def state_dict(self) -> dict:
        state = {name: getattr(self, name)[: self.size].to("cpu", copy=True) for name in self.FIELDS}
        return state | dict(
            slot_of_step=self.slot_of_step.clone(), num_steps=self.num_steps, starts=list(self.first_step_of_episode)
        )

    def load_state_dict(self, state: dict) -> None:
        self.size, self.num_steps, self.first_step_of_episode = len(state["obs"]), state["num_steps"], list(state["starts"])
        self.parts = None
        self.slot_of_step.copy_(state["slot_of_step"])
        for name in self.FIELDS:
            field = getattr(self, name)
            if self.size > len(field):
                field = torch.zeros(self.size, *field.shape[1:], dtype=field.dtype, device=self.device)
                setattr(self, name, field)
            field[: self.size] = state[name].to(self.device)


# ====================================================================================================================
# Network blocks
# ====================================================================================================================
def trunk_precision(args: Args, x: Tensor) -> torch.autocast:
    """For --bf16: the context of the convolutional trunks of denoiser, reward/end model and actor-critic.

    All else stays float32: what sums up small numbers (parameters, optimizer, LSTM states, heads, losses), the noise levels,
    which span 1 to 10,000, and the encoder, for what moves is a small part of its output, which rounding would blur.
    """
    return torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1)


class GroupNorm(nn.Module):
    """Group normalisation, 32 channels a group [D]; with cond_channels its scale and shift come from a condition [B, K]."""

    def __init__(self, channels: int, cond_channels: int = 0):
        super().__init__()
        self.norm = nn.GroupNorm(max(1, channels // 32), channels, affine=cond_channels == 0)
        self.linear = nn.Linear(cond_channels, 2 * channels) if cond_channels else None

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        if self.linear is None:
            return x
        scale, shift = self.linear(cond)[:, :, None, None].chunk(2, 1)  # [B, channels, 1, 1]
        return x * (1 + scale) + shift


class ResBlock(nn.Module):
    """Pre-activation residual block; its last convolution starts at zero, so it starts as the identity (or projection)."""

    def __init__(self, in_channels: int, out_channels: int, cond_channels: int = 0):
        super().__init__()
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.norm1, self.conv1 = GroupNorm(in_channels, cond_channels), conv3x3(in_channels, out_channels)
        self.norm2, self.conv2 = GroupNorm(out_channels, cond_channels), conv3x3(out_channels, out_channels)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x, cond)))
        h = self.conv2(F.silu(self.norm2(h, cond)))
        return self.skip(x) + h


class SelfAttention(nn.Module):
    """Self-attention over the h * w positions, heads of 8 channels [D], residual, zero at the start."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = max(1, channels // 8)
        self.norm, self.qkv = GroupNorm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2)
        q, k, v = qkv.unbind(1)  # [B, heads, h * w, c / heads]
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(-1, -2).reshape(b, c, h, w))


class LSTM(nn.Module):
    """An LSTM over [B, T, features] that starts from zero and skips the steps at which `real` is False."""

    def __init__(self, in_features: int, hidden: int):
        super().__init__()
        self.hidden, self.cell = hidden, nn.LSTMCell(in_features, hidden)
        nn.init.xavier_uniform_(self.cell.weight_ih)
        nn.init.orthogonal_(self.cell.weight_hh)
        nn.init.zeros_(self.cell.bias_ih)
        nn.init.zeros_(self.cell.bias_hh)
        nn.init.ones_(self.cell.bias_ih.data[hidden : 2 * hidden])  # the forget gate starts open

    def forward(self, x: Tensor, real: Tensor | None, state: tuple[Tensor, Tensor] | None):
        hx, cx = state if state is not None else (x.new_zeros(len(x), self.hidden), x.new_zeros(len(x), self.hidden))
        outputs = []
        for t in range(x.shape[1]):
            new_hx, new_cx = self.cell(x[:, t], (hx, cx))  # [B, hidden]
            if real is None:
                hx, cx = new_hx, new_cx
            else:
                hx, cx = torch.where(real[:, t, None], new_hx, hx), torch.where(real[:, t, None], new_cx, cx)
            outputs.append(hx)
        return torch.stack(outputs, 1), (hx, cx)  # [B, T, hidden]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask holds (of one shape), 0 if nowhere. Unlike x[mask].mean() it has fixed shapes and never syncs."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


# ====================================================================================================================
# Encoder E: frame -> latent
# ====================================================================================================================
class Encoder(nn.Module):
    """uint8 frames [..., 3, S, S] -> latents [..., C, S/8, S/8], bounded by C(z) = s tanh(z / s) [P].

    latent_norm="batch" subtracts each position's mean and divides by one std before the bound: what never changes on the
    screen vanishes, what changes has std sigma_data, and a shrinking latent cannot lower the loss.
    """

    def __init__(self, args: Args):
        super().__init__()
        c1, c2, c3, c4 = args.encoder_channels
        self.args = args
        self.net = nn.Sequential(
            conv3x3(3, c1), ResBlock(c1, c1), conv3x3(c1, c2, stride=2),
            ResBlock(c2, c2), conv3x3(c2, c3, stride=2),
            ResBlock(c3, c3), conv3x3(c3, c3, stride=2),
            ResBlock(c3, c3), GroupNorm(c3), nn.SiLU(), conv3x3(c3, c4),
        )  # fmt: skip
        self.register_buffer("mean", torch.zeros(c4, args.image_size // 8, args.image_size // 8))
        self.register_buffer("var", torch.tensor(1.0))
        self.register_buffer("num_batches", torch.tensor(0.0))

    def forward(self, obs: Tensor, real: Tensor | None = None) -> Tensor:
        """With `real` [...], as in the world model's update, normalises by these real frames; else by the running values."""
        x = self.net(obs.flatten(0, -4).float() / 127.5 - 1)  # [N, C, h, w]
        if self.args.latent_norm == "batch":
            mean, var = self.mean, self.var
            if real is not None:
                share = (real.flatten() / real.sum())[:, None, None, None]  # [N, 1, 1, 1], of the mean
                mean = (share * x).sum(0)  # [C, h, w]
                var = (share * (x - mean).square()).sum(0).mean()
                with torch.no_grad():  # a memory of 10 batches, short because the encoder moves
                    self.num_batches += 1
                    weight = 1 / self.num_batches.clamp(max=10)
                    self.mean += weight * (mean - self.mean)
                    self.var += weight * (var - self.var)
            x = self.args.sigma_data * (x - mean) / (var + 1e-8).sqrt()
        z = self.args.latent_bound * torch.tanh(x / self.args.latent_bound)  # [N, C, h, w]
        return z.unflatten(0, obs.shape[:-3])


# ====================================================================================================================
# Latent diffusion dynamics D: EDM (Karras et al. 2022) on latents
# ====================================================================================================================
def karras_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """n noise levels from sigma_max down to sigma_min, then 0. Karras et al. 2022, Eq. 5."""
    ramp = [i / max(1, n - 1) for i in range(n)]
    lo, hi = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return [(hi + r * (lo - hi)) ** rho for r in ramp] + [0.0]


def euler_sample(denoise, noise: Tensor, sigmas: list[float], s_churn: float = 0.0, start: float | None = None) -> Tensor:
    """Algorithm 2 of Karras et al. 2022 with Euler steps only.

    denoise(x, sigma) -> E[clean | x], for a float sigma. noise: [1 or 1+N, *shape] unit noise; noise[0] starts the trajectory
    with std `start` (default sigmas[0]), and noise[1+i] is the churn of step i, needed if s_churn > 0.
    """
    steps = len(sigmas) - 1
    x = noise[0] * (sigmas[0] if start is None else start)
    for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        sigma_hat = sigma
        if s_churn > 0:
            sigma_hat = sigma * (1 + min(s_churn / steps, math.sqrt(2) - 1))
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * noise[1 + i]
        d = (x - denoise(x, sigma_hat)) / sigma_hat
        x = x + (sigma_next - sigma_hat) * d
    return x


class Denoiser(nn.Module):
    """Predicts the next latent [B, C, h, w] from L past latents z_hist [B, L, C, h, w] and actions act_hist [B, L].

    What is denoised is y = (z_next - base) / scale. Published form, predict="absolute": base = 0, scale = 1, y = z_next.
    """

    def __init__(self, args: Args, num_actions: int):
        super().__init__()
        self.args = args
        steps, latent, width, cond = (
            args.num_conditioning_steps,
            args.encoder_channels[-1],
            args.denoiser_channels,
            args.cond_channels,
        )
        self.register_buffer("fourier", torch.randn(cond // 2))
        self.action_embedding = nn.Embedding(num_actions, cond // steps)
        self.cond_mlp = nn.Sequential(nn.Linear(cond, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.conv_in = conv3x3((steps + 1) * latent, width)
        self.down = nn.ModuleList(ResBlock(width, width, cond) for _ in range(args.denoiser_depth))
        self.mid1, self.attention, self.mid2 = ResBlock(width, width, cond), SelfAttention(width), ResBlock(width, width, cond)
        self.up = nn.ModuleList(ResBlock(2 * width, width, cond) for _ in range(args.denoiser_depth + 1))
        self.norm_out, self.conv_out = GroupNorm(width), conv3x3(width, latent)
        nn.init.zeros_(self.conv_out.weight)
        self.register_buffer("change_rms", torch.tensor(0.0))  # running rms of z_next - z, for predict="change"
        self.register_buffer("num_updates", torch.tensor(0.0))
        self.sigmas = karras_sigmas(args.num_denoising_steps, args.sigma_min, args.sigma_max, args.rho)

    def precondition(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_in, c_out, c_skip [B, 1, 1, 1] and c_noise [B] for noise levels sigma [B]. Karras et al. 2022, Table 1."""
        s, d = sigma[:, None, None, None], self.args.sigma_data
        c_in = 1 / (s**2 + d**2).sqrt()
        c_out = s * d / (s**2 + d**2).sqrt()
        c_skip = d**2 / (s**2 + d**2)
        c_noise = sigma.log() / 4
        return c_in, c_out, c_skip, c_noise

    def origin(self, z_hist: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """base and scale of y. The base is stopped: it is part of the target, which the encoder must not make easy."""
        if self.args.predict == "absolute":
            return 0.0, 1.0
        return z_hist[:, -1].detach(), self.change_rms.clamp(min=1e-4) / self.args.sigma_data

    def F_z(self, y_in: Tensor, c_noise: Tensor, z_hist: Tensor, act_hist: Tensor) -> Tensor:
        """The raw U-Net. y_in: [B, C, h, w] scaled by c_in -> [B, C, h, w]."""
        angle = 2 * math.pi * c_noise[:, None] * self.fourier  # [B, cond / 2]
        actions = self.action_embedding(act_hist).flatten(1)  # [B, cond]
        if self.args.predict == "change":  # the newest latent, and the past changes in the unit of the change to come
            past = (z_hist[:, 1:] - z_hist[:, :-1]) / self.origin(z_hist)[1]
            z_hist = torch.cat([past, z_hist[:, -1:]], 1)
        with trunk_precision(self.args, y_in):
            cond = self.cond_mlp(torch.cat([angle.cos(), angle.sin()], 1) + actions)  # [B, cond]
            x = self.conv_in(torch.cat([z_hist.flatten(1, 2) / self.args.sigma_data, y_in], 1))  # [B, width, h, w]
            skips = [x]
            for block in self.down:
                x = block(x, cond)
                skips.append(x)
            x = self.mid2(self.attention(self.mid1(x, cond)), cond)
            for block in self.up:
                x = block(torch.cat([x, skips.pop()], 1), cond)
            return self.conv_out(F.silu(self.norm_out(x))).float()

    def to_latent(self, y: Tensor, z_hist: Tensor) -> Tensor:
        """y -> the latent that it stands for, inside the encoder's range."""
        base, scale = self.origin(z_hist)
        # DEVIATES: a hard clamp, not C(z) = s tanh(z / s), which is not the identity on the encoder's outputs: applied again
        # at every imagined step it would shrink them without end
        return (base + scale * y).clamp(-self.args.latent_bound, self.args.latent_bound)

    def loss(
        self, z: Tensor, act: Tensor, real: Tensor, sigma: Tensor, noise: Tensor, feed_own: Tensor
    ) -> tuple[Tensor, dict]:
        """The joint-embedding diffusion loss, or self-consistency objective (2505.19698), over n autoregressive steps.

        z [B, L+n, C, h, w] encoded frames, act [B, L+n], real [B, L+n]; sigma [n, B] noise levels and noise [n, B, C, h, w];
        feed_own: bool [], whether step i + 1 is conditioned on the denoiser's own latent (as in imagination) or the encoder's.
        """
        steps, n = self.args.num_conditioning_steps, self.args.num_autoregressive_steps
        z_next, hist = z.detach(), list(z.unbind(1))  # stop-gradient on the target; hist is not stopped: E learns through it
        change = (z_next[:, 1:] - z_next[:, :-1]).square().mean((2, 3, 4))  # [B, L+n-1]
        change_rms = masked_mean(change, real[:, 1:] & real[:, :-1]).sqrt()
        with torch.no_grad():  # the mean of the first 100 updates, then a memory of 100
            self.num_updates += 1
            self.change_rms += (change_rms - self.change_rms) / self.num_updates.clamp(max=100)
        loss_sum = 0.0
        for i in range(n):
            z_hist = torch.stack(hist[i : i + steps], 1)  # [B, L, C, h, w]
            base, scale = self.origin(z_hist)
            y = (z_next[:, steps + i] - base) / scale  # [B, C, h, w]
            y_noisy = y + sigma[i, :, None, None, None] * noise[i]
            c_in, c_out, c_skip, c_noise = self.precondition(sigma[i])
            output = self.F_z(c_in * y_noisy, c_noise, z_hist, act[:, i : i + steps])
            target = (y - c_skip * y_noisy) / c_out  # Karras et al. 2022, Eq. 8 with lambda(sigma) = 1 / c_out^2
            error = (output - target).square().mean((1, 2, 3))  # [B]
            loss_sum = loss_sum + masked_mean(error, real[:, steps + i])
            denoised = self.to_latent(c_skip * y_noisy + c_out * output, z_hist).detach()
            hist[steps + i] = torch.where(feed_own, denoised, hist[steps + i])  # random switching
        return loss_sum / n, {"losses/denoising": loss_sum.detach() / n, "latent/change_rms": change_rms}

    @torch.no_grad()
    def sample(self, z_hist: Tensor, act_hist: Tensor, noise: Tensor) -> Tensor:
        """Imagines the next latent [B, C, h, w]; noise [1 or 1+N, B, C, h, w] as in euler_sample."""

        def denoise(y: Tensor, sigma: float) -> Tensor:
            c_in, c_out, c_skip, c_noise = self.precondition(torch.full((len(y),), sigma, device=y.device))
            return c_skip * y + c_out * self.F_z(c_in * y, c_noise, z_hist, act_hist)

        start = 1.0 if self.args.sampler_start == "unit" else self.args.sigma_max
        return self.to_latent(euler_sample(denoise, noise, self.sigmas, self.args.s_churn, start), z_hist)


# ====================================================================================================================
# Reward and end model R
# ====================================================================================================================
class RewardEndModel(nn.Module):
    """(z, act, z_next) -> logits of sign(reward) in {-1, 0, 1} and of end in {0, 1}, through an LSTM."""

    def __init__(self, args: Args, num_actions: int):
        super().__init__()
        self.args = args
        width, cond, h = args.reward_end_channels, args.cond_channels // 2, args.image_size // 8
        self.action_embedding = nn.Embedding(num_actions, cond)
        self.conv_in = conv3x3(2 * args.encoder_channels[-1], width)
        self.blocks = nn.ModuleList(ResBlock(width, width, cond) for _ in range(2))
        self.lstm = LSTM(width * h * h, args.lstm_dim)
        self.head = nn.Sequential(nn.Linear(args.lstm_dim, args.lstm_dim), nn.SiLU(), nn.Linear(args.lstm_dim, 5))

    def forward(self, z: Tensor, act: Tensor, z_next: Tensor, real: Tensor | None = None, state=None):
        """z, z_next [B, T, C, h, w], act and real [B, T] -> logits [B, T, 3] and [B, T, 2], LSTM state."""
        cond = self.action_embedding(act.flatten())  # [B * T, cond]
        with trunk_precision(self.args, z):
            x = self.conv_in(torch.cat([z, z_next], 2).flatten(0, 1))  # [B * T, width, h, w]
            for block in self.blocks:
                x = block(x, cond)
        x, state = self.lstm(x.float().reshape(*act.shape, -1), real, state)  # [B, T, lstm_dim]
        logits = self.head(x)
        return logits[..., :3], logits[..., 3:], state

    def loss(self, z: Tensor, act: Tensor, rew: Tensor, end: Tensor, step: Tensor) -> tuple[Tensor, dict]:
        """Cross-entropy over the recorded steps of z [B, T+1, C, h, w]; act, rew, end, step [B, T]."""
        rew_logits, end_logits, _ = self(z[:, :-1], act, z[:, 1:], step)
        rew_loss = masked_mean(F.cross_entropy(rew_logits.transpose(1, 2), rew.long() + 1, reduction="none"), step)
        end_loss = masked_mean(F.cross_entropy(end_logits.transpose(1, 2), end, reduction="none"), step)
        return rew_loss + end_loss, {"losses/reward": rew_loss.detach(), "losses/end": end_loss.detach()}


# ====================================================================================================================
# Actor-critic
# ====================================================================================================================
class ActorCritic(nn.Module):
    """Latents -> policy logits and value. It reads detached latents: the policy never trains the encoder."""

    def __init__(self, args: Args, num_actions: int):
        super().__init__()
        self.args = args
        (c1, c2), h = args.actor_critic_channels, args.image_size // 8
        self.conv = nn.Sequential(
            ResBlock(args.encoder_channels[-1], c1), ResBlock(c1, c2), nn.MaxPool2d(2, ceil_mode=True), nn.Flatten()
        )
        self.lstm = LSTM(c2 * ((h + 1) // 2) ** 2, args.lstm_dim)
        self.actor, self.critic = nn.Linear(args.lstm_dim, num_actions), nn.Linear(args.lstm_dim, 1)
        for parameter in [*self.actor.parameters(), *self.critic.parameters()]:
            nn.init.zeros_(parameter)  # starts as the uniform policy with value 0

    def forward(self, z: Tensor, real: Tensor | None = None, state=None):
        """z [B, T, C, h, w], real [B, T] -> logits [B, T, A], value [B, T], LSTM state."""
        with trunk_precision(self.args, z):
            x = self.conv(z.detach().flatten(0, 1)).unflatten(0, z.shape[:2])  # [B, T, features]
        x, state = self.lstm(x.float(), real, state)
        return self.actor(x), self.critic(x).squeeze(-1), state


def lambda_returns(rew: Tensor, end: Tensor, value: Tensor, gamma: float, lambda_: float) -> Tensor:
    """R_t = r_t + gamma (1 - end_t) ((1 - lambda) V_{t+1} + lambda R_{t+1}), with R_H = V_H (Sutton & Barto, 12.1; DIAMOND).

    rew, end [B, H], value [B, H+1] -> [B, H]. An end stops the return; the horizon, a truncation, bootstraps from the value.
    """
    returns, following = [], value[:, -1]
    for t in reversed(range(rew.shape[1])):
        following = rew[:, t] + gamma * (1 - end[:, t]) * ((1 - lambda_) * value[:, t + 1] + lambda_ * following)
        returns.append(following)
    return torch.stack(returns[::-1], 1)


def until_end(end: Tensor) -> Tensor:
    """end [B, H], 0 or 1 -> bool [B, H]: True up to and including the first end."""
    return torch.cat([torch.ones_like(end[:, :1]), 1 - end[:, :-1]], 1).cumprod(1).bool()


# ====================================================================================================================
# Imagination
# ====================================================================================================================
class Rollout(NamedTuple):
    """L context frames followed by H imagined ones."""

    z: Tensor  # [B, L+H, C, h, w]
    real: Tensor  # [B, L+H] bool, False only for padding before an episode's start
    act: Tensor  # [B, H] taken at frames L-1 .. L+H-2
    rew: Tensor  # [B, H] sampled sign of the reward
    end: Tensor  # [B, H] sampled end, 0 or 1
    rew_logits: Tensor  # [B, H, 3]
    end_logits: Tensor  # [B, H, 2]


def gumbel(*shape: int, generator: torch.Generator) -> Tensor:
    """argmax(logits + gumbel noise) is a sample of softmax(logits): sampling without a sync, and with the noise passed in."""
    return -torch.log(-torch.log(torch.rand(*shape, generator=generator, device=generator.device).clamp(1e-20, 1 - 1e-7)))


def imagination_noise(args: Args, batch: int, num_actions: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """All randomness of a rollout: unit noise [H, 1 or 1+N, B, C, h, w] and gumbel noise [H, B, A + 3 + 2]."""
    draws, h = 1 + args.num_denoising_steps * (args.s_churn > 0), args.image_size // 8
    shape = (args.horizon, draws, batch, args.encoder_channels[-1], h, h)
    noise = torch.randn(shape, generator=generator, device=generator.device)
    return noise, gumbel(args.horizon, batch, num_actions + 5, generator=generator)


@torch.no_grad()
def imagine_step(agent: "Agent", z_hist: Tensor, act_hist: Tensor, policy_state, model_state, noise, gumbels, act=None):
    """One step of policy and world model, from the last L latents [B, L, C, h, w] and the L-1 actions between them [B, L-1].

    -> z_next [B, C, h, w], (act, rew, end [B], logits of the latter), new LSTM states. With `act` [B] the policy is not asked.
    """
    num_actions, z_now = agent.num_actions, z_hist[:, -1:]  # [B, 1, C, h, w]
    if act is None:
        logits, _, policy_state = agent.actor_critic(z_now, None, policy_state)
        act = (logits[:, 0] + gumbels[:, :num_actions]).argmax(1)  # [B]
    z_next = agent.denoiser.sample(z_hist, torch.cat([act_hist, act[:, None]], 1), noise)  # [B, C, h, w]
    rew_logits, end_logits, model_state = agent.reward_end(z_now, act[:, None], z_next[:, None], None, model_state)
    rew = (rew_logits[:, 0] + gumbels[:, num_actions : num_actions + 3]).argmax(1) - 1.0  # [B]
    end = (end_logits[:, 0] + gumbels[:, num_actions + 3 :]).argmax(1).float()  # [B]
    return z_next, (act, rew, end, rew_logits[:, 0], end_logits[:, 0]), policy_state, model_state


@torch.no_grad()
def imagine(agent: "Agent", z: Tensor, act: Tensor, real: Tensor, noise: Tensor, gumbels: Tensor, actions=None,
            step=imagine_step) -> Rollout:  # fmt: skip
    """Rolls policy and world model H steps from the contexts z [B, L, C, h, w], act [B, L] (the last one unused), real [B, L].

    noise, gumbels: see imagination_noise. With `actions` [B, H] the policy is not asked: imagination beside reality.
    `step`: imagine_step, or its compiled twin.
    """
    steps = z.shape[1]
    _, _, policy_state = agent.actor_critic(z[:, :-1], real[:, :-1])  # both LSTMs burn in on the context
    _, _, model_state = agent.reward_end(z[:, :-1], act[:, :-1], z[:, 1:], real[:, :-1])
    zs, acts, records = list(z.unbind(1)), list(act[:, :-1].unbind(1)), []
    for t in range(len(noise)):
        z_hist, act_hist = torch.stack(zs[-steps:], 1), torch.stack(acts[1 - steps :], 1)  # [B, L, C, h, w], [B, L-1]
        given = None if actions is None else actions[:, t]
        z_next, record, policy_state, model_state = step(
            agent, z_hist, act_hist, policy_state, model_state, noise[t], gumbels[t], given
        )
        zs.append(z_next)
        acts.append(record[0])
        records.append(record)
    imagined_real = torch.cat([real, torch.ones_like(real[:, :1]).expand(-1, len(noise))], 1)
    return Rollout(torch.stack(zs, 1), imagined_real, *(torch.stack(x, 1) for x in zip(*records)))


# ====================================================================================================================
# Updates: tensors in, a dict of detached tensors out. No host sync, fixed shapes
# ====================================================================================================================
class Agent(nn.Module):
    """The four networks."""

    def __init__(self, args: Args, num_actions: int):
        super().__init__()
        self.args, self.num_actions = args, num_actions
        self.encoder, self.denoiser = Encoder(args), Denoiser(args, num_actions)
        self.reward_end, self.actor_critic = RewardEndModel(args, num_actions), ActorCritic(args, num_actions)
        self.to(memory_format=torch.channels_last)  # the layout in which convolutions run fastest


def world_model_loss(agent: Agent, batch: Batch, sigma: Tensor, noise: Tensor, feed_own: Tensor) -> tuple[Tensor, dict]:
    """Diffusion loss + reward/end loss on one batch of segments with L-1 frames before the anchor and H+1 after it.

    Both losses reach the encoder. sigma, noise, feed_own: see Denoiser.loss.
    """
    # DEVIATES: one batch, encoded once, feeds both losses; DIAMOND draws one for each
    z = agent.encoder(batch.obs, batch.real)  # [B, L+H+1, C, h, w]
    k = agent.args.num_conditioning_steps + agent.args.num_autoregressive_steps
    diffusion_loss, logs = agent.denoiser.loss(z[:, :k], batch.act[:, :k], batch.real[:, :k], sigma, noise, feed_own)
    transitions = (x[:, :-1] for x in (batch.act, batch.rew, batch.end, batch.step))  # [B, L+H]
    reward_end_loss, more = agent.reward_end.loss(z, *transitions)
    return diffusion_loss + reward_end_loss, logs | more | {"latent/std": z.detach().std()}


def actor_critic_loss(agent: Agent, rollout: Rollout) -> tuple[Tensor, dict]:
    """REINFORCE with lambda-returns and a value baseline on an imagined rollout. No loss after an imagined end."""
    args, horizon = agent.args, rollout.act.shape[1]
    # DEVIATES: the gradient also flows through the LSTM's burn-in on the context; DIAMOND stops it at the rollout's start
    logits, value, _ = agent.actor_critic(rollout.z, rollout.real)  # [B, L+H, A], [B, L+H]
    logits, value = logits[:, -horizon - 1 : -1], value[:, -horizon - 1 :]  # [B, H, A], [B, H+1]
    returns = lambda_returns(rollout.rew, rollout.end, value.detach(), args.gamma, args.lambda_)  # [B, H]
    # DEVIATES: after an imagined end nothing counts; DIAMOND begins another rollout there
    alive = until_end(rollout.end)  # [B, H]
    log_probs = logits.log_softmax(-1)  # [B, H, A]
    log_prob = log_probs.gather(-1, rollout.act[..., None]).squeeze(-1)  # [B, H]
    entropy = masked_mean(-(log_probs.exp() * log_probs).sum(-1), alive)
    policy_loss = masked_mean(-log_prob * (returns - value[:, :-1]).detach(), alive)
    value_loss = masked_mean((value[:, :-1] - returns).square(), alive)
    logs = {
        "losses/policy": policy_loss, "losses/value": value_loss, "losses/entropy": entropy,
        "imagination/return": (rollout.rew * alive).sum(1).mean(), "imagination/value": masked_mean(value[:, :-1], alive),
        "imagination/end_rate": masked_mean(rollout.end, alive),
    }  # fmt: skip
    return policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy, {k: v.detach() for k, v in logs.items()}


class CudaGraph:
    """Calls function(batch) -> logs, and from its 4th call on replays its kernels in one launch instead of thousands.

    The first calls compile and tune, on a stream of their own, as capture demands. A capture keeps the addresses of what it
    read and wrote, so the batch is copied to a fixed place, and logs and gradients are valid until the next call.
    """

    def __init__(self, function, rng: torch.Generator, warmup_calls: int = 3):
        self.function, self.rng, self.warmup_calls, self.graph = function, rng, warmup_calls, None

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        if self.warmup_calls:
            self.warmup_calls -= 1
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                logs = self.function(batch)
            torch.cuda.current_stream().wait_stream(stream)
            return logs
        if self.graph is None:
            self.batch, self.graph = Batch(*(x.clone() for x in batch)), torch.cuda.CUDAGraph()
            self.graph.register_generator_state(self.rng)  # a replay then draws new numbers, and moves the generator on
            try:
                with torch.cuda.graph(self.graph):
                    self.logs = self.function(self.batch)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise UsageError(
                    f"--cuda-graphs: the capture failed ({reason}); pass --no-cuda-graphs, which is slower"
                ) from error
        for fixed, new in zip(self.batch, batch):
            fixed.copy_(new)
        self.graph.replay()
        return self.logs


class Trainer:
    """Optimizers and the two updates. Everything random is drawn here, from `rng`, and handed to the pure functions above."""

    def __init__(self, agent: Agent, args: Args, device: torch.device):
        self.agent, self.args = agent, args
        self.rng = torch.Generator(device).manual_seed(args.seed)
        fused = device.type == "cuda"
        groups = [
            dict(params=list(agent.encoder.parameters()), lr=args.learning_rate * args.encoder_lr_scale),
            dict(params=list(agent.denoiser.parameters()), lr=args.learning_rate),
            dict(params=list(agent.reward_end.parameters()), lr=args.learning_rate),
        ]
        self.world_model_optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=fused)
        policy = list(agent.actor_critic.parameters())
        self.actor_critic_optimizer = torch.optim.AdamW(policy, args.actor_critic_lr, weight_decay=0.0, fused=fused)

        epochs = math.ceil((args.total_steps - args.first_collect_steps) / args.steps_per_epoch) + args.final_epochs
        world_model_updates = args.first_world_model_updates + epochs * args.world_model_updates
        actor_critic_updates = args.first_actor_critic_updates + epochs * args.actor_critic_updates

        def schedule(total: int):
            decay = max(1, args.lr_decay * total)  # updates
            fall = lambda k: max(0, total - k) / decay if args.lr_decay else 1.0  # noqa: E731
            return lambda k: min(1.0, (k + 1) / max(1, args.warmup_updates), fall(k))

        self.optimizers = [self.world_model_optimizer, self.actor_critic_optimizer]
        schedules = schedule(world_model_updates), schedule(actor_critic_updates)
        self.schedulers = [torch.optim.lr_scheduler.LambdaLR(*pair) for pair in zip(self.optimizers, schedules)]
        functions = world_model_loss, imagine_step, actor_critic_loss
        if args.compile:  # one imagined step: unrolled over H of them, a graph would take many minutes to compile
            functions = [torch.compile(function, fullgraph=True, dynamic=False) for function in functions]
        self.world_model_loss, self.imagine_step, self.actor_critic_loss = functions
        if args.cuda_graphs:
            self.world_model_gradients = CudaGraph(self.world_model_gradients, self.rng)
            self.actor_critic_gradients = CudaGraph(self.actor_critic_gradients, self.rng)

    def segments(self, buffer: ReplayBuffer) -> Batch:
        """For the world model: L-1 frames, an anchor, H+1 frames, so that the reward/end model sees L+H transitions."""
        return buffer.sample(self.args.batch_size, self.args.num_conditioning_steps - 1, self.args.horizon + 1, self.rng)

    def contexts(self, buffer: ReplayBuffer) -> Batch:
        """For the actor-critic: the L frames from which it imagines."""
        return buffer.sample(self.args.batch_size, self.args.num_conditioning_steps - 1, 0, self.rng)

    def phases(self):
        """The two kinds of update in their order: name, update, how its batch is drawn."""
        world_model = ("world_model", self.update_world_model, self.segments)
        actor_critic = ("actor_critic", self.update_actor_critic, self.contexts)
        return world_model, actor_critic

    def world_model_gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Everything of update_world_model but the optimizer, whose learning rate is a number of the host."""
        args, device = self.args, self.rng.device
        n, h = args.num_autoregressive_steps, args.image_size // 8
        size = len(batch.obs)
        sigma = (torch.randn(n, size, generator=self.rng, device=device) * args.p_std + args.p_mean).exp()
        sigma = sigma.clamp(args.sigma_train_min, args.sigma_train_max)  # [n, B]
        noise = torch.randn(n, size, args.encoder_channels[-1], h, h, generator=self.rng, device=device)
        feed_own = torch.rand((), generator=self.rng, device=device) < 0.5  # a fair coin per batch [P]
        loss, logs = self.world_model_loss(self.agent, batch, sigma, noise, feed_own)
        self.world_model_optimizer.zero_grad()
        loss.backward()
        clips = (args.denoiser_max_grad_norm, args.denoiser_max_grad_norm, args.reward_end_max_grad_norm)
        groups = self.world_model_optimizer.param_groups
        norms = [nn.utils.clip_grad_norm_(group["params"], clip) for group, clip in zip(groups, clips)]
        return logs | dict(zip(("grad_norm/encoder", "grad_norm/denoiser", "grad_norm/reward_end"), norms))

    def actor_critic_gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Everything of update_actor_critic but the optimizer: contexts -> imagination -> loss -> clipped gradients."""
        with torch.no_grad():
            z = self.agent.encoder(batch.obs)  # [B, L, C, h, w]
        randomness = imagination_noise(self.args, len(z), self.agent.num_actions, self.rng)
        rollout = imagine(self.agent, z, batch.act, batch.real, *randomness, step=self.imagine_step)
        loss, logs = self.actor_critic_loss(self.agent, rollout)
        self.actor_critic_optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.agent.actor_critic.parameters(), self.args.actor_critic_max_grad_norm)
        return logs | {"grad_norm/actor_critic": norm}

    def update_world_model(self, batch: Batch) -> dict[str, Tensor]:
        """One step of encoder, denoiser and reward/end model on a batch from `segments`."""
        logs = self.world_model_gradients(batch)
        self.world_model_optimizer.step()
        self.schedulers[0].step()
        return logs

    def update_actor_critic(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the actor-critic in imagination, on a batch from `contexts`."""
        logs = self.actor_critic_gradients(batch)
        self.actor_critic_optimizer.step()
        self.schedulers[1].step()
        return logs


# ====================================================================================================================
# Measurements: does imagination obey the environment? On the steps just collected, before any update has seen them
# ====================================================================================================================
def effective_rank(x: Tensor) -> Tensor:
    """exp(entropy of the normalised singular values) of centred x [N, D], at most min(N - 1, D). Roy & Vetterli 2007."""
    s = torch.linalg.svdvals((x - x.mean(0)).cpu())  # once per epoch, and not every device can
    p = s / s.sum().clamp(min=1e-12)
    return torch.special.entr(p).sum().exp()


@torch.no_grad()
def measure(agent: Agent, batch: Batch, *randomness: Tensor) -> dict[str, Tensor]:
    """Imagination beside reality on real segments: under the real actions, then under the policy's own.

    error_h: squared latent error h steps ahead / that of "no change" (1: useless). accuracy_*: argmax of R in imagination,
    per real class, NaN where the class did not occur. return_imagined and return_real: sums over H steps of sign(reward).
    """
    steps, horizon = agent.args.num_conditioning_steps, agent.args.horizon
    z = agent.encoder(batch.obs)  # [B, L+H+1, C, h, w]
    context = (z[:, :steps], batch.act[:, :steps], batch.real[:, :steps])
    future = slice(steps - 1, steps - 1 + horizon)  # the frames at which the imagined actions are taken
    act, rew, end, step = batch.act[:, future], batch.rew[:, future], batch.end[:, future], batch.step[:, future]  # [B, H]
    forced = imagine(agent, *context, *randomness, actions=act)
    z_real, real = z[:, steps : steps + horizon], batch.real[:, steps : steps + horizon]  # [B, H, C, h, w], [B, H]
    error = (forced.z[:, steps:] - z_real).square().mean((2, 3, 4))  # [B, H]
    no_change = (z[:, steps - 1 : steps] - z_real).square().mean((2, 3, 4))  # [B, H]
    logs = {
        f"world_model/error_{h}": (error * real)[:, h - 1].sum() / (no_change * real)[:, h - 1].sum()
        for h in {1, 5, horizon}
        if h <= horizon
    }

    def accuracy(correct: Tensor, of_class: Tensor) -> Tensor:
        return (correct & of_class & step).sum() / (of_class & step).sum()

    rew_correct, end_correct = forced.rew_logits.argmax(-1) - 1 == rew, forced.end_logits.argmax(-1) == end
    for name, sign in (("minus", -1), ("zero", 0), ("plus", 1)):
        logs[f"world_model/reward_accuracy_{name}"] = accuracy(rew_correct, rew == sign)
    for value in (0, 1):
        logs[f"world_model/end_accuracy_{value}"] = accuracy(end_correct, end == value)

    free = imagine(agent, *context, *randomness)
    complete = step[:, -1] | (end & step).any(1)  # the recording reaches H steps or the episode's end
    logs["world_model/return_imagined"] = (free.rew * until_end(free.end)).sum(1).mean()
    logs["world_model/return_real"] = ((rew * step).sum(1) * complete).sum() / complete.sum()
    return logs | {"latent/effective_rank": effective_rank(z[:, steps - 1].flatten(1)), "latent/abs_max": z.abs().max()}


# ====================================================================================================================
# Acting in the real environment
# ====================================================================================================================
class Collector:
    """Plays one training environment and records it."""

    def __init__(self, agent: Agent, buffer: ReplayBuffer, rng: torch.Generator, seed: int):
        args = agent.args
        self.env = make_env(args.env_id, seed, True, args.image_size, args.allow_sticky)
        self.agent, self.buffer, self.rng, self.over = agent, buffer, rng, True

    @torch.no_grad()
    def step(self) -> tuple[float, dict | None]:
        """One agent step -> unclipped reward and, at the last step of a full game, {"r": unclipped return, "l": length}."""
        if self.over:
            self.obs, self.lstm_state = self.env.reset()[0], None
            self.buffer.begin_episode(self.obs)
        z = self.agent.encoder(torch.from_numpy(self.obs).to(self.rng.device)[None, None])  # [1, 1, C, h, w]
        logits, _, self.lstm_state = self.agent.actor_critic(z, None, self.lstm_state)  # [1, 1, A]
        random = torch.rand((), generator=self.rng, device=self.rng.device) < self.agent.args.epsilon
        noise = gumbel(*logits.shape, generator=self.rng)
        act = int(torch.where(random, noise, logits + noise).argmax())  # the only sync of a step
        self.obs, rew, end, trunc, info = self.env.step(act)
        self.buffer.add(act, float(rew), end, trunc, self.obs)
        self.over = end or trunc
        return float(rew), info.get("episode")


@torch.no_grad()
def evaluate_policy(agent: Agent, env_id: str, num_episodes: int, seed: int, *, temperature: float = 1.0, num_envs: int = 8,
                    progress=None, frames: list | None = None) -> dict[str, list]:  # fmt: skip
    """Plays full games with the sampled policy, epsilon 0: {"returns": unclipped, "lengths": agent steps}, one per game.

    Several environments are played at once, each with its own quota of games: no bias to short ones. progress(done, total) is
    called after every game; `frames`, when given, receives the uint8 frames [S, S, 3] of the first environment's first game.
    """
    args, device = agent.args, next(agent.parameters()).device
    num_envs = min(num_envs, num_episodes)
    envs = [make_env(env_id, seed + i, False, args.image_size, args.allow_sticky) for i in range(num_envs)]
    quota = [num_episodes // num_envs + (i < num_episodes % num_envs) for i in range(num_envs)]
    rng, games = torch.Generator(device).manual_seed(seed), [[] for _ in envs]
    obs, lstm_state = np.stack([env.reset()[0] for env in envs]), None
    while sum(map(len, games)) < num_episodes:
        if frames is not None and not games[0]:
            frames.append(obs[0].transpose(1, 2, 0).copy())
        z = agent.encoder(torch.from_numpy(obs).to(device)[:, None])  # [N, 1, C, h, w]
        logits, _, lstm_state = agent.actor_critic(z, None, lstm_state)  # [N, 1, A]
        actions = (logits / temperature + gumbel(*logits.shape, generator=rng)).argmax(-1).squeeze(1).tolist()
        for i, env in enumerate(envs):
            if len(games[i]) == quota[i]:
                continue
            obs[i], _, end, trunc, info = env.step(actions[i])
            if end or trunc:
                games[i].append((float(info["episode"]["r"]), int(info["episode"]["l"])))
                obs[i] = env.reset()[0]
                for x in lstm_state:
                    x[i] = 0
                if progress:
                    progress(sum(map(len, games)), num_episodes)
    returns, lengths = zip(*sum(games, []))
    return {"returns": list(returns), "lengths": list(lengths)}


# ====================================================================================================================
# The run directory: args, versions, source, metrics, checkpoint, result
# ====================================================================================================================
def resolve_device(name: str) -> torch.device:
    """auto -> cuda or cpu. Raises UsageError for a device that is not there."""
    available = {"cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    kind, _, index = name.partition(":")
    if int(index or 0) >= available.get(kind, 0):
        raise UsageError(
            f"--device {name}: not available here; use --device cpu, or install a torch build that sees your device"
        )
    return torch.device(name)


def game_name(env_id: str) -> str:
    """BreakoutNoFrameskip-v4, ALE/Breakout-v5 -> Breakout; tests.toy:Catch-v0 -> Catch."""
    return env_id.split(":")[-1].split("/")[-1].rsplit("-v", 1)[0].removesuffix("NoFrameskip")


def write_json(path: pathlib.Path, content: dict) -> None:
    """Atomic: the file is the old one or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)


def versions(device: torch.device) -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("torch", "gymnasium", "ale-py", "numpy")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"python": platform.python_version(), **found, "platform": platform.platform(), "device_name": name}


def make_result(args: Args, evaluation: dict, global_step: int, wall_time_s: float, **protocol) -> dict:
    """The content of result.json: scores and everything that tells with what they may be compared."""
    source = pathlib.Path(__file__).resolve().parent
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40"]
    git = subprocess.run(command, capture_output=True, text=True)
    spec, returns = gym.spec(args.env_id.rpartition(":")[2]), evaluation["returns"]
    noops, skip = (NOOP_MAX, FRAME_SKIP) if is_atari(spec) else (0, 1)
    return {
        "env_id": args.env_id, "game": game_name(args.env_id), "exp_name": args.exp_name, "seed": args.seed,
        "preset": args.preset, **evaluation, "mean_return": float(np.mean(returns)), "std_return": float(np.std(returns)),
        "protocol": {
            "episodes": len(returns), "policy": "sampled", "temperature": 1.0, "epsilon": 0.0, "noop_max": noops,
            "frame_skip": skip, "sticky_actions": spec.kwargs.get("repeat_action_probability", 0.0),
            "life_loss_ends_episode": False, "reward_clipping": False, "checkpoint": "last", **protocol,
        },
        "global_step": global_step, "git_revision": git.stdout.strip() or "unknown", "wall_time_s": wall_time_s,
        "device": args.device, "versions": versions(resolve_device(args.device)),
    }  # fmt: skip


def save_checkpoint(path: pathlib.Path, state: dict) -> None:
    """Writes beside the previous checkpoint and replaces it only when the new one is on disk, whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        kept = f"the previous one is intact: free space, then --resume {path.parent}" if path.exists() else "free space first"
        raise UsageError(f"{path}: could not write the checkpoint ({str(error).splitlines()[0]}); {kept}") from None


def load_checkpoint(run_dir: pathlib.Path) -> dict:
    """Raises UsageError if the checkpoint is missing, truncated or of another version."""
    path = run_dir / "ckpt.pt"
    if not path.exists():
        raise UsageError(f"{path}: no checkpoint there; name a directory like runs/Breakout__jedi__1__1700000000")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["format"]
    except Exception as error:
        reason = f"truncated, or not a checkpoint of jedi.py ({type(error).__name__})"
        raise UsageError(f"{path}: {reason}; restore a copy or start a new run") from None
    if found != CHECKPOINT_FORMAT or set(state["args"]) != {field.name for field in dataclasses.fields(Args)}:
        raise UsageError(f"{path}: written by another version of jedi.py; continue it with the copy of jedi.py in {run_dir}")
    return state


def load_weights(module, state: dict, run_dir: pathlib.Path) -> None:
    try:
        module.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UsageError(f"{run_dir}: of other hyperparameters or networks ({reason}); use the jedi.py copied there") from None


def load_agent(run_dir: pathlib.Path, device: str = "auto") -> tuple[Args, Agent, int]:
    """The trained agent of a run directory, its args and the agent steps it was trained for. Raises UsageError."""
    run_dir = pathlib.Path(run_dir)
    state = load_checkpoint(run_dir)
    args = Args(**state["args"])
    args.device = str(resolve_device(device))
    agent = Agent(args, state["num_actions"])
    load_weights(agent, state["agent"], run_dir)
    return args, agent.to(args.device).eval(), state["replay"]["num_steps"]


class Logger:
    """metrics.jsonl always; Weights & Biases and TensorBoard when asked for."""

    def __init__(self, args: Args, run_dir: pathlib.Path, num_lines: int):
        self.path, self.num_lines, self.wandb, self.writer = run_dir / "metrics.jsonl", num_lines, None, None
        lines = self.path.read_text().splitlines(keepends=True)[:num_lines] if self.path.exists() else []
        self.path.write_text("".join(lines))  # a resumed run forgets the lines after its checkpoint
        if args.track:
            import wandb

            config, self.wandb = dataclasses.asdict(args), wandb
            wandb.init(project="jedi", name=run_dir.name, id=run_dir.name, resume="allow", config=config, dir=run_dir)
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(run_dir)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        with open(self.path, "a") as file:
            json.dump({"global_step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()}, file)
            file.write("\n")
        self.num_lines += 1
        if self.wandb:
            self.wandb.log(metrics, step=step)
        for key, value in metrics.items() if self.writer else ():
            self.writer.add_scalar(key, value, step)


class Means:
    """Running means of the updates' logs, on the device; one sync per flush."""

    def __init__(self):
        self.sums, self.count = {}, 0

    def add(self, logs: dict[str, Tensor]) -> None:
        self.sums = {k: self.sums[k] + v if self.count else v.clone() for k, v in logs.items()}  # logs may be overwritten
        self.count += 1

    def flush(self, where: str) -> dict[str, float]:
        """Means since the start. Raises UsageError at the first NaN or inf, which a sum never forgets."""
        means = {k: float(v) / self.count for k, v in self.sums.items()}
        for key, value in means.items():
            if not math.isfinite(value):
                raise UsageError(f"{key} is {value} {where}; lower --learning-rate or --actor-critic-lr in a new run")
        return means


# ====================================================================================================================
# Main loop
# ====================================================================================================================
def check_args(args: Args) -> None:
    """Raises UsageError for budgets and sizes that cannot work."""
    for name in ("horizon", "num_denoising_steps", "batch_size", "first_collect_steps", "steps_per_epoch", "eval_episodes"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    collect, n = f"--first-collect-steps {args.first_collect_steps}", args.num_autoregressive_steps
    wrong = [
        (args.image_size < 8 or args.image_size % 8, f"--image-size {args.image_size}: must be a multiple of 8, such as 64"),
        (not 1 <= n <= args.horizon + 1, f"--num-autoregressive-steps {n}: must lie between 1 and --horizon + 1"),
        (args.num_conditioning_steps < 2, "--num-conditioning-steps: must be at least 2"),
        (
            args.cond_channels % (2 * args.num_conditioning_steps),
            "--cond-channels: must divide by 2 x --num-conditioning-steps",
        ),
        (args.denoiser_channels % 8, f"--denoiser-channels {args.denoiser_channels}: must be a multiple of 8"),
        (args.first_collect_max < args.first_collect_steps, f"--first-collect-max: must be at least {collect}"),
        (args.total_steps < args.first_collect_steps, f"--total-steps {args.total_steps}: must be at least {collect}"),
        (
            args.batch_size > args.first_collect_steps,
            f"--batch-size {args.batch_size}: must be at most {collect}, the first replay",
        ),
        (args.track and not find_spec("wandb"), "--track needs wandb: pip install wandb, or drop the flag"),
        (
            args.tensorboard and not find_spec("tensorboard"),
            "--tensorboard needs it: pip install tensorboard, or drop the flag",
        ),
    ]
    for failed, message in wrong:
        if failed:
            raise UsageError(message)


def duration(seconds: float) -> str:
    if seconds >= 172_800:
        return f"{seconds / 86_400:.1f} days"
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def memory_gib(device: torch.device) -> float:
    """Peak memory: CUDA allocations, or the process' resident set; NaN on Windows, which does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if not find_spec("resource"):
        return math.nan
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class Interrupted(Exception):
    """Nothing more to do: a signal asked the run to stop and its checkpoint is written, or it has finished before."""


class StopRequest:
    """While it is entered, the first Ctrl-C or SIGTERM asks for a stop after the current update; a second one kills."""

    def __enter__(self):
        self.signal = 0
        self.previous = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __call__(self, number, frame):
        self.signal = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        print("\nstopping after this update, with a checkpoint (once more: at once, without one)", flush=True)


def set_up(device: torch.device) -> None:
    """Settings of the process that make training faster and change nothing else."""
    torch.set_float32_matmul_precision("high")  # on CUDA, TF32 for what --bf16 leaves in float32
    torch.backends.cudnn.benchmark = True  # shapes are fixed: try all convolution kernels once, keep the fastest
    if device.type == "cpu" and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc gives every freed block over 32 MiB back to the system, which then zeroes its pages anew: keep them instead
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def measure_speed(args: Args, num_actions: int, device: torch.device) -> dict[str, float]:
    """Seconds per step of each phase, on throwaway networks and one throwaway environment, eager."""
    agent = Agent(args, num_actions).to(device)
    trainer = Trainer(agent, dataclasses.replace(args, compile=False, cuda_graphs=False), device)
    buffer = ReplayBuffer(30, args.image_size, device)
    collector, seconds, start = Collector(agent, buffer, trainer.rng, args.seed), {}, time.perf_counter()
    for _ in range(30):
        collector.step()
    seconds["collect"] = (time.perf_counter() - start) / 30
    for name, update, draw in trainer.phases():
        for _ in range(2):  # the first call also allocates
            if seconds.get(name, 0) < 10:
                start = time.perf_counter()
                float(sum(update(draw(buffer)).values()))  # waits for the device
                seconds[name] = time.perf_counter() - start
    if device.type == "cuda":  # charts/peak_gib is that of the run itself
        torch.cuda.reset_peak_memory_stats(device)
    return seconds


def main(args: Args) -> dict:
    """Trains, evaluates and returns the content of result.json. Raises UsageError, or Interrupted after a signal."""
    with StopRequest() as stop:
        return run(args, stop)


def run(args: Args, stop: StopRequest) -> dict:
    """The whole program; see main."""
    check_args(args)
    device = resolve_device(args.device)
    if args.cuda_graphs and device.type != "cuda":
        raise UsageError(f"--cuda-graphs: there are none on --device {device}; drop the flag, or use a CUDA device")
    args.device, args.preset = str(device), "paper" if args.preset == "auto" else args.preset
    print(
        f"preset {args.preset} (auto: paper with CUDA, else small), {args.env_id}, seed {args.seed}, device {device}",
        flush=True,
    )
    state = load_checkpoint(pathlib.Path(args.resume)) if args.resume else None
    if state and state["device_type"] != device.type:
        raise UsageError(
            f"--device {device}: {args.resume} ran on {state['device_type']}; its random state cannot move, go on there"
        )
    num_actions = int(make_env(args.env_id, args.seed, True, args.image_size, args.allow_sticky).action_space.n)
    set_up(device)
    seconds = measure_speed(args, num_actions, device)

    torch.manual_seed(args.seed)
    agent = Agent(args, num_actions).to(device)
    trainer = Trainer(agent, args, device)
    buffer = ReplayBuffer(args.total_steps, args.image_size, device, args.recency_weights)
    progress = dict(epoch=0, world_model=0, actor_critic=0, first_steps=0, measured_steps=0, log_lines=0, wall_time=0.0,
                    reward_counts=[0, 0, 0], returns=[])  # fmt: skip
    stateful = {"agent": agent, "replay": buffer}
    stateful |= {f"optimizer_{i}": x for i, x in enumerate(trainer.optimizers)}
    stateful |= {f"scheduler_{i}": x for i, x in enumerate(trainer.schedulers)}
    if state:
        run_dir, progress = pathlib.Path(args.resume), state["progress"]
        for name, module in stateful.items():
            load_weights(module, state[name], run_dir)
        trainer.rng.set_state(state["rng"])
    else:
        stamp, stem = int(time.time()), f"{game_name(args.env_id)}__{args.exp_name}__{args.seed}"
        while (run_dir := pathlib.Path(args.runs_dir, f"{stem}__{stamp}")).exists():
            stamp += 1
        try:
            run_dir.mkdir(parents=True)
            shutil.copy(__file__, run_dir / "jedi.py")
            write_json(run_dir / "args.json", dataclasses.asdict(args))
            write_json(run_dir / "versions.json", versions(device))
        except OSError as error:
            raise UsageError(f"--runs-dir {args.runs_dir}: cannot write ({error.strerror}); name another directory") from None
    collector = Collector(agent, buffer, trainer.rng, args.seed + buffer.num_steps)
    logger, started, saved_at = Logger(args, run_dir, progress["log_lines"]), time.time(), time.time()
    before = progress["wall_time"]

    def num_epochs() -> int:
        first_steps = progress["first_steps"] or args.first_collect_steps
        return 1 + math.ceil((args.total_steps - first_steps) / args.steps_per_epoch) + args.final_epochs

    first = {"world_model": args.first_world_model_updates, "actor_critic": args.first_actor_critic_updates}
    later = {"world_model": args.world_model_updates, "actor_critic": args.actor_critic_updates}

    def remaining_seconds() -> float:
        left = {phase: first[phase] + (num_epochs() - 1) * later[phase] - progress[phase] for phase in first}
        left["collect"] = args.total_steps - buffer.num_steps
        return sum(seconds[phase] * n for phase, n in left.items())

    def checkpoint() -> None:
        nonlocal saved_at
        progress.update(log_lines=logger.num_lines, wall_time=before + time.time() - started)
        save_checkpoint(run_dir / "ckpt.pt", {
            "format": CHECKPOINT_FORMAT, "args": dataclasses.asdict(args), "num_actions": num_actions, "progress": progress,
            "device_type": device.type, "rng": trainer.rng.get_state(), **{k: v.state_dict() for k, v in stateful.items()},
        })  # fmt: skip
        saved_at = time.time()

    def pause_point() -> None:
        """Between any two steps or updates the state is whole: here a checkpoint may be written and the run may stop."""
        if stop.signal or time.time() - saved_at > 60 * args.checkpoint_minutes:
            checkpoint()
        if stop.signal:
            raise Interrupted(f"stopped, checkpoint written; go on with: python jedi.py --resume {run_dir}", 128 + stop.signal)

    def wants_steps(epoch: int) -> bool:
        n = buffer.num_steps
        if epoch:
            return n < min(args.total_steps, progress["first_steps"] + epoch * args.steps_per_epoch)
        rare = n - max(progress["reward_counts"])  # steps whose reward is not of the most frequent sign
        most = args.first_collect_steps if rare >= args.first_collect_rewards else args.first_collect_max
        return n < min(most, args.total_steps)

    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in agent.named_children()}
    print("parameters: " + ", ".join(f"{name} {n:,}" for name, n in sizes.items()) + f", in all {sum(sizes.values()):,}")
    print(f"plan: {args.total_steps:,} steps, {num_epochs():,} epochs, then {args.eval_episodes} full games; in {run_dir}")
    speed = ", ".join(f"{name} {value * 1e3:.3g} ms" for name, value in seconds.items())
    print(f"expected: {duration(remaining_seconds())} ({speed}{', eager: compiled is faster' * args.compile})", flush=True)

    while progress["epoch"] < num_epochs():
        epoch, metrics, clock = progress["epoch"], {}, {}

        # 1 COLLECT
        start, collected = time.perf_counter(), buffer.num_steps
        while wants_steps(epoch):
            rew, game = collector.step()
            progress["reward_counts"][int(np.sign(rew)) + 1] += 1
            if game:
                progress["returns"] = progress["returns"][-99:] + [float(game["r"])]
                lines = {"charts/episodic_return": float(game["r"]), "charts/episodic_length": int(game["l"])}
                logger.log(buffer.num_steps, lines)
            pause_point()
        progress["first_steps"] = progress["first_steps"] or buffer.num_steps
        clock["collect"], collected = time.perf_counter() - start, buffer.num_steps - collected

        # 2 MEASURE imagination on the steps just collected, which no update has seen yet
        newest = min(1000, buffer.num_steps - progress["measured_steps"])
        if newest > 0:
            progress["measured_steps"], rng = buffer.num_steps, torch.Generator(device).manual_seed(epoch)
            batch = buffer.sample(64, args.num_conditioning_steps - 1, args.horizon + 1, rng, newest)
            metrics = {k: float(v) for k, v in measure(agent, batch, *imagination_noise(args, 64, num_actions, rng)).items()}

        # 3 TRAIN THE WORLD MODEL, 4 TRAIN THE ACTOR-CRITIC IN IMAGINATION
        for phase, update, draw in trainer.phases():
            start, means, target = time.perf_counter(), Means(), first[phase] + epoch * later[phase]
            while progress[phase] < target:
                means.add(update(draw(buffer)))
                progress[phase] += 1
                if progress[phase] % 100 == 0 or progress[phase] == target or stop.signal:
                    kept = f"last good checkpoint: {run_dir}" if (run_dir / "ckpt.pt").exists() else "no checkpoint yet"
                    means.flush(f"in {phase} update {progress[phase]} or up to 99 before it, epoch {epoch} ({kept})")
                    pause_point()
            clock[phase] = time.perf_counter() - start
            metrics = means.flush("") | metrics
            if means.count:
                seconds[phase] = clock[phase] / means.count

        # 5 LOG + CHECKPOINT
        progress["epoch"] += 1
        if collected:
            seconds["collect"] = clock["collect"] / collected
        hours, recent, k = (before + time.time() - started) / 3600, progress["returns"][-10:], min(5, args.horizon)
        metrics |= {"charts/epoch": epoch, "charts/buffer_size": buffer.num_steps, "charts/hours": hours}
        metrics |= {"charts/SPS": collected / sum(clock.values()), "charts/peak_gib": memory_gib(device)}
        metrics |= {"charts/learning_rate": trainer.schedulers[0].get_last_lr()[1]}
        logger.log(buffer.num_steps, metrics | {f"time/{phase}": value for phase, value in clock.items()})
        shown = {
            "denoising": "losses/denoising", "reward": "losses/reward", "end": "losses/end", "entropy": "losses/entropy",
            f"error@{k}": f"world_model/error_{k}",
            "imagined": "world_model/return_imagined", "real": "world_model/return_real",
        }  # fmt: skip
        print(
            f"epoch {progress['epoch']}/{num_epochs()} step {buffer.num_steps} return {np.mean(recent or math.nan):.2f} |",
            *(f"{name} {metrics[key]:.3f}" for name, key in shown.items() if key in metrics),
            f"| {buffer.num_steps / hours / 3600:.1f} steps/s",
            *(f"{phase} {value:.0f}s" for phase, value in clock.items()),
            f"| ETA {duration(remaining_seconds())} {memory_gib(device):.1f} GiB",
            flush=True,
        )
        pause_point()
    checkpoint()

    # 6 EVALUATE the last weights
    def report(done: int, total: int) -> None:
        print(f"\revaluating: {done}/{total} games", end="" if done < total else "\n", flush=True)
        pause_point()

    seed = args.seed + 10_000
    evaluation = evaluate_policy(agent, args.env_id, args.eval_episodes, seed, progress=report)
    result = make_result(args, evaluation, buffer.num_steps, before + time.time() - started, eval_seed=seed)
    write_json(run_dir / "result.json", result)
    mean, std, wall_time = result["mean_return"], result["std_return"], duration(result["wall_time_s"])
    logger.log(buffer.num_steps, {"eval/episodic_return": mean, "eval/episodic_return_std": std})
    print(f"score {mean:.2f} +- {std:.2f} (std over {args.eval_episodes} full games), {wall_time}; {run_dir}", flush=True)
    return result


# What --resume may change; everything else belongs to the run
RESUMABLE = {"resume", "device", "compile", "cuda_graphs", "runs_dir", "checkpoint_minutes", "track", "tensorboard"}


def newest_run(args: Args) -> str | None:
    """For --resume auto: the newest run directory of this game, exp_name and seed that has a checkpoint, or None.

    Raises Interrupted, with exit code 0, if that run has finished.
    """
    stem = f"{game_name(args.env_id)}__{args.exp_name}__{args.seed}__"
    runs = [path.parent for path in pathlib.Path(args.runs_dir).glob(f"{stem}*/ckpt.pt")]
    if not runs:
        return None
    run_dir = max(runs, key=lambda path: int(path.name.removeprefix(stem)))
    if (run_dir / "result.json").exists():
        raise Interrupted(f"{run_dir}: finished already, nothing to do", 0)
    return str(run_dir)


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args: defaults < preset (or the resumed run's args) < flags."""
    first = tyro.cli(Args, args=argv)
    run_dir = newest_run(first) if first.resume == "auto" else first.resume
    if run_dir:
        saved = Args(**load_checkpoint(pathlib.Path(run_dir))["args"])
        args = dataclasses.replace(tyro.cli(Args, args=argv, default=saved), resume=run_dir)
        for field in dataclasses.fields(Args):
            given, kept = getattr(args, field.name), getattr(saved, field.name)
            if given != kept and field.name not in RESUMABLE:
                flag = "--" + field.name.replace("_", "-")
                raise UsageError(f"{flag} {given}: {run_dir} has {kept}; drop the flag, or start a new run")
        return args
    cuda = resolve_device(first.device).type == "cuda"
    preset = first.preset if first.preset != "auto" else "paper" if cuda else "small"
    default = dataclasses.replace(Args(), compile=cuda, cuda_graphs=cuda, bf16=cuda, **(SMALL if preset == "small" else {}))
    return dataclasses.replace(tyro.cli(Args, args=argv, default=default), preset=preset, resume=None)


def cli(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        main(parse_args(argv))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk while logging, a directory taken away
        print(f"error: {error.filename}: {error.strerror}; mend that, then --resume the run", file=sys.stderr)
        return 2
    except NotImplementedError as error:  # Apple's MPS lacks some operations
        reason, remedy = str(error).splitlines()[0], "use --device cpu, or set PYTORCH_ENABLE_MPS_FALLBACK=1"
        print(f"error: this device cannot do what training needs ({reason}); {remedy}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        message, code = interrupted.args
        print(message)
        return code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli())
