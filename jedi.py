"""JEDI, Joint Embedding DIffusion: a world-model agent for Atari 100k, in one file.

    python jedi.py --env-id BreakoutNoFrameskip-v4    # preset `paper` on CUDA, `evening` without

Papers: arXiv 2505.19698 ("Performance Asymmetry in Model-Based RL"), its successor 2605.13013,
and their parent DIAMOND, 2405.12399. DIAMOND imagines the next frame by diffusion; JEDI imagines
the next latent. There is no decoder and no reconstruction loss: the encoder learns only from what
helps to predict the next latent, the reward and the end.

The loop, in `main`:

    repeat   1. COLLECT            play the real game with the policy, record every frame
             2. WORLD MODEL        recorded segments train encoder, denoiser, reward/end model
             3. ACTOR-CRITIC       imagined games, begun at recorded frames, train the policy
             4. LOG, CHECKPOINT
    at last  5. EVALUATE           full games with the last weights

The sections of this file, and where their ideas come from:

    Hyperparameters              [P] published for JEDI, [D] DIAMOND's default, [O] our own
    Environment, replay          the usual Atari protocol; DIAMOND
    Network blocks               DIAMOND
    Encoder                      JEDI; the normalisation is ours
    Latent diffusion             EDM and DIAMOND; the self-consistency loss is JEDI
    Reward and end model         JEDI
    Actor-critic                 DIAMOND, on latents
    Imagination, losses          DIAMOND, on latents
    Measurement, evaluation      ours
    Optimizers, files, main      ours; the schedule is DIAMOND's

Letters in shapes: B batch, T time, L conditioning steps, H horizon, A actions, S image size,
C h w channels and size of a latent.

Time. The action, its reward and its end belong to the arrow between two frames:

    obs[t] --act[t], rew[t], end[t]--> obs[t+1]

A segment has L + H frames around an anchor, a recorded step. Here L = 4 and H = 3, and the anchor
is the second frame o1 of its episode:

    index      0    1    2    3    4    5    6
    frame      o0   o0   o0   o1   o2   o3   o4     frames before the episode repeat its first one
    real       -    -    x    x    x    x    x      they are not real, and no loss sees them
    denoiser   [---- context ---]  next             predicts frame 4 from 0..3, 5 from 1..4, ...
    R          predicts rew[t] and end[t] from frame t and act[t], at every real t
    policy     warms up its memory on 0..2, acts at the anchor 3, then in imagined frames 4, 5, 6

A healthy run logs: `error_1` well below 1 (imagination beats "nothing changes"); `rewards_read`,
from real latents, and then `rewards_found`, from imagined ones, rising towards 1; `change_rms`, how
far the latent moves in one step, not falling towards 0.
"""

import ctypes
import json
import math
import os
import re
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor


# ---------------------------------------------------------------------------------- Hyperparameters
CUDA = torch.cuda.is_available()
DEFAULT_PRESET = "paper" if CUDA else "evening"


@dataclass
class Args:
    """JEDI on one game. The same command goes on with a run that was stopped."""

    env_id: str = "BreakoutNoFrameskip-v4"  # an Atari game, or module:Name-v0 for your own
    preset: Literal["paper", "small", "laptop", "evening"] = DEFAULT_PRESET  # see PRESETS
    seed: int = 1  # of every random number; on a CPU it determines the run bit for bit
    device: str = "cuda" if CUDA else "cpu"  # cpu, cuda, cuda:1, mps
    compile: bool = True  # torch.compile with CUDA graphs, on CUDA only
    exp_name: str = Path(__file__).stem  # name of the method
    runs_dir: str = "runs"  # a run lives in <runs-dir>/<env-id>__<exp-name>__<seed>
    checkpoint_minutes: float = 10.0  # at the end of an epoch, if the last one is so old
    track: bool = False  # log to Weights & Biases, too (pip install wandb)

    # frames, replay, encoder
    image_size: int = 64  # S, pixels; latents are S/8 x S/8 [D]
    recency_weights: tuple[float, ...] = (0.1, 0.1, 0.1, 0.7)  # of parts, oldest first [D]
    encoder_channels: tuple[int, int, int, int] = (32, 32, 32, 16)  # the last is C [P]
    latent_bound: float = 3.0  # s of C(z) = s tanh(z / s) [P]
    # latent diffusion
    num_conditioning_steps: int = 4  # L, past latents and actions that the denoiser sees [D]
    num_autoregressive_steps: int = 2  # n, next latents in a row in the loss; n >= 2 [P]
    denoiser_channels: int = 160  # width of the U-Net [P]
    cond_channels: int = 256  # width of the embedding of noise level and actions [D]
    sigma_data: float = 0.5  # std of the latents, which EDM's preconditioning assumes [D]
    num_denoising_steps: int = 3  # Euler steps for an imagined latent [D]
    # reward and end model R, actor-critic
    reward_end_channels: int = 32  # width of R's residual blocks [D]
    reward_end_blocks: int = 8  # their number [P: four stages of two]
    lstm_dim: int = 512  # units of R's LSTM and of the actor-critic's [D]
    actor_critic_channels: tuple[int, int] = (32, 64)  # of its two residual blocks [O]
    horizon: int = 15  # H, imagined steps [D]
    gamma: float = 0.985  # discount of one step [D]
    td_lambda: float = 0.95  # lambda of the lambda-returns [D]
    ent_coef: float = 0.001  # eta, weight of the policy's entropy in nats [D]
    # optimization
    batch_size: int = 32  # B; the paper takes the better of 32 and 64 for each game [P]
    actor_critic_batch_size: int = 32  # B of the actor-critic [D]
    learning_rate: float = 1e-4  # of AdamW, for all networks but the encoder [D]
    encoder_lr_scale: float = 0.3  # the encoder's rate / learning_rate [P]
    actor_critic_lr_scale: float = 1.0  # the actor-critic's rate / learning_rate [D]
    warmup_updates: int = 100  # linear warm-up of the rates [D]
    anneal_lr: bool = False  # then they fall linearly to 0 by the end of the run [D: no]
    world_model_clip: float = 1.0  # largest gradient norm of encoder and of denoiser [D]
    reward_end_clip: float = 100.0  # of R [D]
    actor_critic_clip: float = 100.0  # of the actor-critic [D]
    # schedule, in agent steps of 4 frames: 100,000 are the 400k frames of "Atari 100k"
    total_steps: int = 100_000  # in the environment [D]
    first_collect_steps: int = 5_000  # of these in the first epoch [D]
    collect_steps: int = 100  # of these in every later epoch [D]
    first_world_model_updates: int = 10_000  # of encoder, denoiser and R in the first epoch [D]
    world_model_updates: int = 400  # in every later epoch [D]
    first_actor_critic_updates: int = 5_000  # of the actor-critic in the first epoch [D]
    actor_critic_updates: int = 400  # in every later epoch [D]
    final_epochs: int = 50  # without collecting, at the end [D]
    epsilon: float = 0.01  # share of uniformly random actions; 0 in evaluation [D]
    eval_episodes: int = 100  # full games of the final score [D]


PRESETS = {
    "paper": Args(preset="paper"),  # what is known of the papers' run
    "small": Args(  # a toy in ten minutes of one core
        preset="small",
        image_size=32,
        encoder_channels=(8, 16, 32, 16),
        num_autoregressive_steps=8,
        denoiser_channels=48,
        cond_channels=128,
        reward_end_channels=16,
        reward_end_blocks=2,
        lstm_dim=128,
        actor_critic_channels=(16, 32),
        horizon=10,
        ent_coef=0.01,
        batch_size=24,
        actor_critic_batch_size=24,
        learning_rate=1.5e-3,
        anneal_lr=True,
        actor_critic_clip=1.0,
        total_steps=7_200,
        first_collect_steps=4_000,
        collect_steps=800,
        first_world_model_updates=600,
        world_model_updates=40,
        first_actor_critic_updates=60,
        actor_critic_updates=80,
        final_epochs=0,
    ),
}
PRESETS["laptop"] = replace(  # an Atari game in half an hour of one core
    PRESETS["small"],
    preset="laptop",
    num_denoising_steps=1,
    gamma=0.97,
    ent_coef=0.003,
    actor_critic_batch_size=128,
    actor_critic_lr_scale=0.2,
    total_steps=50_000,
    first_collect_steps=20_000,
    collect_steps=750,
    first_world_model_updates=1_500,
    world_model_updates=50,
    first_actor_critic_updates=150,
    actor_critic_updates=30,
)
PRESETS["evening"] = replace(  # Breakout in two hours of one core
    PRESETS["laptop"],
    preset="evening",
    recency_weights=(0.1, 0.2, 0.3, 0.4),
    horizon=20,
    gamma=0.985,
    ent_coef=0.001,
    actor_critic_lr_scale=1.0,
    total_steps=62_000,
    first_collect_steps=30_000,
    collect_steps=4_000,
    first_world_model_updates=4_500,
    world_model_updates=300,
    first_actor_critic_updates=500,
    actor_critic_updates=400,
    epsilon=0.05,
)
MAY_BE_ZERO = """seed checkpoint_minutes gamma td_lambda ent_coef encoder_lr_scale warmup_updates
    epsilon first_world_model_updates world_model_updates first_actor_critic_updates
    actor_critic_updates final_epochs""".split()


class UsageError(Exception):
    """A mistake of the user. The command line prints it in one line and exits with code 2."""


def check_args(args):
    """Raises UsageError for the first value that cannot work."""

    def require(condition, name, what):
        if not condition:
            raise UsageError(f"--{name} {getattr(args, name)}: must be {what}")

    for name, value in asdict(args).items():
        for number in np.ravel(value):
            if isinstance(number, np.number):
                require(0 <= number < math.inf, name, "at least 0 and finite")
                require(number > 0 or name in MAY_BE_ZERO, name, "positive")
    require(args.gamma <= 1, "gamma", "at most 1")
    multiple = 2 * args.num_conditioning_steps
    require(args.image_size % 16 == 0, "image_size", "a multiple of 16")
    require(args.cond_channels % multiple == 0, "cond_channels", f"a multiple of {multiple}")
    fits = args.num_autoregressive_steps <= args.horizon
    require(fits, "num_autoregressive_steps", "at most --horizon")
    fits = args.total_steps >= args.first_collect_steps
    require(fits, "total_steps", "at least --first-collect-steps")


# -------------------------------------------------------------------------------------- Environment
FRAME_SKIP = 4  # [D]
NOOP_MAX = 30  # [D]
MAX_STEPS = 27_000  # agent steps of an evaluated game; on Atari ALE's limit of 108,000 frames


class AtariGame(gym.Wrapper):
    """Begins with 1 to 30 no-ops, repeats an action for 4 raw frames and max-pools the last two."""

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        for _ in range(self.unwrapped.np_random.integers(1, NOOP_MAX + 1)):
            obs, _, _, _, info = self.env.step(0)
        return obs, info

    def step(self, action):
        total_reward = 0.0
        frames = []
        for _ in range(FRAME_SKIP):
            frame, reward, terminated, truncated, info = self.env.step(action)
            frames.append(frame)
            total_reward += reward
            if terminated or truncated:
                frames = [frame, frame]  # the last observation is the real last screen
                break
        obs = np.maximum(frames[-2], frames[-1])
        return obs, total_reward, terminated, truncated, info


def area_weights(in_size, out_size):
    """Share of each pixel in each bin [out, in], fractional at edges as in cv2.INTER_AREA."""
    edges = torch.linspace(0, in_size, out_size + 1)
    pixels = torch.arange(in_size)
    left = torch.maximum(edges[:-1, None], pixels)
    right = torch.minimum(edges[1:, None], pixels + 1)
    return (right - left).clamp(min=0) * out_size / in_size


def is_atari(spec):
    """Tells whether ale_py itself makes the environment. What others do inside is unknown."""
    return str(spec.entry_point).startswith("ale_py")


def make_env(env_id, seed, image_size=64):
    """Makes a seeded environment of frames [3, S, S], unclipped rewards, or raises UsageError."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    module, _, name = env_id.rpartition(":")
    try:
        import_module(module or "ale_py")  # registers the environment
        spec = gym.spec(name)
        env = gym.make(spec, frameskip=1) if is_atari(spec) else gym.make(spec)
    except Exception as error:
        raise UsageError(f"--env-id {env_id}: {error!r}")
    space = env.observation_space
    actions = env.action_space
    is_image = space.dtype == np.uint8 and space.shape[2:] == (3,)
    if not is_image or not isinstance(actions, gym.spaces.Discrete) or actions.start != 0:
        needs = "uint8 images [h, w, 3] and Discrete actions from 0"
        raise UsageError(f"--env-id {env_id}: has {space} and {actions}; needed are {needs}")
    if is_atari(spec):
        env = AtariGame(env)
    rows = area_weights(space.shape[0], image_size)
    cols = area_weights(space.shape[1], image_size)

    def resize(obs):
        if not space.contains(obs):
            frame = f"{np.asarray(obs).dtype} {np.shape(obs)}"
            raise UsageError(f"--env-id {env_id}: the frame {frame} is not in {space}")
        image = torch.from_numpy(np.ascontiguousarray(obs)).permute(2, 0, 1).float()
        small = rows @ image @ cols.T  # [3, S, S]
        return small.round().to(torch.uint8).numpy()

    def number(reward):
        if np.size(reward) != 1 or reward is None:
            raise UsageError(f"--env-id {env_id}: the reward {reward!r} is not a number")
        return np.float64(reward).item()

    small_space = gym.spaces.Box(0, 255, (3, image_size, image_size), np.uint8)
    env = gym.wrappers.TransformObservation(env, resize, small_space)
    env = gym.wrappers.TransformReward(env, number)
    env.reset(seed=seed)
    return env


# ------------------------------------------------------------------------------------------- Replay
class Batch(NamedTuple):
    """T consecutive frames around an anchor. What is outside its episode is padding."""

    obs: Tensor  # [B, T, 3, S, S] uint8
    act: Tensor  # [B, T] long, 0 where has_act is False
    rew: Tensor  # [B, T] sign of the reward that followed act
    end: Tensor  # [B, T] long, 1 if act ended the learning episode; a truncation is 0
    real: Tensor  # [B, T] bool, the frame belongs to the episode
    has_act: Tensor  # [B, T] bool, an action was recorded here; not so at the last frame


class ReplayBuffer:
    """One slot for each frame, on the training device. A last frame's slot has no action."""

    def __init__(self, args, device):
        capacity = 2 * args.total_steps + 1
        S = args.image_size
        self.size = 0
        with device:  # tensors are made there
            self.recency_weights = torch.tensor(args.recency_weights)
            self.data = {
                "obs": torch.zeros(capacity, 3, S, S, dtype=torch.uint8),
                "act": torch.zeros(capacity, dtype=torch.long),
                "rew": torch.zeros(capacity),  # its sign
                "end": torch.zeros(capacity, dtype=torch.bool),
                "has_act": torch.zeros(capacity, dtype=torch.bool),
                "first": torch.zeros(capacity, dtype=torch.long),  # slot where its episode begins
            }

    def start_episode(self, obs):
        """Records the first frame [3, S, S] of an episode."""
        self.data["obs"][self.size] = torch.from_numpy(obs)
        self.data["first"][self.size] = self.size
        self.size += 1

    def add(self, act, rew, end, next_obs):
        """Records the action at the newest frame, what followed, and the next frame."""
        newest = self.size - 1
        self.data["act"][newest] = act
        self.data["rew"][newest] = np.sign(rew)
        self.data["end"][newest] = end
        self.data["has_act"][newest] = True
        self.data["obs"][self.size] = torch.from_numpy(next_obs)
        self.data["first"][self.size] = self.data["first"][newest]
        self.size += 1

    def anchors(self, batch_size):
        """Draws slots with an action [B]. The recording is cut in equal parts, drawn by recency."""
        # DEVIATES: uniform over a part's steps; DIAMOND cuts by episodes, draws episode, then step
        has_act = self.data["has_act"][: self.size]
        slots = torch.arange(self.size, device=has_act.device)
        part = slots * len(self.recency_weights) // self.size
        return torch.multinomial(has_act * self.recency_weights[part], batch_size, replacement=True)

    def sample(self, anchor, before, after):
        """Indexes segments of `before` frames, the anchor [B] and `after` frames."""
        anchor = anchor[:, None]  # [B, 1]
        wanted = anchor + torch.arange(-before, after + 1, device=anchor.device)  # [B, T]
        first = self.data["first"]
        # DEVIATES: before its episode a segment repeats the first frame; DIAMOND pads with zeros
        slot = torch.maximum(wanted, first[anchor]).clamp(max=self.size - 1)
        real = (slot == wanted) & (first[slot] == first[anchor])
        has_act = real & self.data["has_act"][slot]
        return Batch(
            obs=self.data["obs"][slot],
            act=torch.where(has_act, self.data["act"][slot], 0),
            rew=self.data["rew"][slot],
            end=self.data["end"][slot].long(),
            real=real,
            has_act=has_act,
        )

    def state_dict(self):
        recorded = {}
        for name, values in self.data.items():
            recorded[name] = values[: self.size].to("cpu", copy=True)
        return recorded

    def load_state_dict(self, state):
        self.size = len(state["obs"])
        for name, values in state.items():
            self.data[name][: self.size] = values


# ----------------------------------------------------------------------------------- Network blocks
def conv3x3(in_channels, out_channels):
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def group_norm(channels, affine=True):
    """Group normalisation of 32 channels a group [D]."""
    return nn.GroupNorm(max(1, channels // 32), channels, affine=affine)


def skip_connection(in_channels, out_channels):
    same = in_channels == out_channels
    return nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)


class ConvBlock(nn.Module):
    """Residual block of one convolution, in encoder and actor-critic."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.skip = skip_connection(in_channels, out_channels)
        self.norm = group_norm(in_channels)
        self.conv = conv3x3(in_channels, out_channels)

    def forward(self, x):
        return self.skip(x) + self.conv(F.silu(self.norm(x)))


class AdaptiveGroupNorm(nn.Module):
    """Group normalisation whose scale and shift come from a condition [B, cond]."""

    def __init__(self, channels, cond_channels):
        super().__init__()
        self.norm = group_norm(channels, affine=False)
        self.linear = nn.Linear(cond_channels, 2 * channels)

    def forward(self, x, cond):
        scale, shift = self.linear(cond)[:, :, None, None].chunk(2, 1)  # [B, channels, 1, 1]
        return self.norm(x) * (1 + scale) + shift


class ResBlock(nn.Module):
    """Residual block of two convolutions with a condition, in denoiser and reward/end model."""

    def __init__(self, in_channels, out_channels, cond_channels):
        super().__init__()
        self.skip = skip_connection(in_channels, out_channels)
        self.norm1 = AdaptiveGroupNorm(in_channels, cond_channels)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = AdaptiveGroupNorm(out_channels, cond_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        nn.init.zeros_(self.conv2.weight)  # it begins as its skip connection

    def forward(self, x, cond):
        h = self.conv1(F.silu(self.norm1(x, cond)))
        h = self.conv2(F.silu(self.norm2(h, cond)))
        return self.skip(x) + h


def masked_mean(x, mask):
    """Mean of x where mask holds, 0 if nowhere. Unlike x[mask].mean() it never waits."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def sample_logits(logits):
    """Draws from categories, [..., K] -> [...]. Unlike torch.multinomial it never waits."""
    return F.gumbel_softmax(logits).argmax(-1)


def bound(z, limit):
    """C(z) = s tanh(z / s) keeps latents between -s and s [P]."""
    return limit * torch.tanh(z / limit)


# ---------------------------------------------------------------------------------------- Encoder E
class Encoder(nn.Module):
    """E: frames [..., 3, S, S] -> latents z [..., C, h, w] = C(sigma_data (x - center) / scale).

    x is the output of the network, center its mean over frames, scale the mean distance of a frame
    from center.
    """

    # DEVIATES: published is z = C(x). Then nothing keeps the moving part of x from shrinking,
    # because a latent that stands still is the easiest to predict. So x is normalised.

    def __init__(self, args):
        super().__init__()
        self.args = args
        c1, c2, c3, c4 = args.encoder_channels
        side = args.image_size // 8
        self.net = nn.Sequential(
            conv3x3(3, c1),
            ConvBlock(c1, c1),
            nn.MaxPool2d(2),
            ConvBlock(c1, c2),
            nn.MaxPool2d(2),
            ConvBlock(c2, c3),
            nn.MaxPool2d(2),
            ConvBlock(c3, c4),
        )
        self.register_buffer("center", torch.zeros(c4, side, side))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, obs, real=None):
        """Normalises by running statistics; with `real` [B, T], in training, by the batch's own."""
        frames = obs.flatten(0, -4).float() / 255
        x = self.net(frames).contiguous().unflatten(0, obs.shape[:-3])  # [..., C, h, w]
        center = self.center
        scale = self.scale
        if real is not None:
            mask = real[..., None, None, None]
            center = torch.where(mask, x, 0).sum((0, 1)) / real.sum()  # [C, h, w]
            distance = (x - center).square().mean((2, 3, 4)).sqrt()  # [B, T] of each frame
            scale = masked_mean(distance, real).detach()  # []
            self.center.lerp_(center.detach(), 0.1)
            self.scale.lerp_(scale, 0.1)
            # Forward: divide by the spread of x. Backward: as if divided by the mean of its steps.
            # Else the loss falls when what moves is made smaller, and the latent ends as a still
            step = (x[:, 1:] - x[:, :-1]).square().mean((2, 3, 4))  # [B, T-1]
            step = step.clamp(min=1e-12).sqrt()
            motion = masked_mean(step, real[:, 1:] & real[:, :-1])  # []
            scale = scale * (motion / motion.detach())  # the value of scale, the gradient of motion
        z = self.args.sigma_data * (x - center) / scale.clamp(min=1e-6)
        return bound(z, self.args.latent_bound)


# --------------------------------------------------------------------------------- Latent diffusion
def karras_sigmas(n, sigma_min=2e-3, sigma_max=5.0, rho=7.0):
    """Returns n noise levels, sigma_max to sigma_min, then 0 (Karras et al. 2022, Eq. 5). [D]"""
    high = sigma_max ** (1 / rho)
    low = sigma_min ** (1 / rho)
    levels = [(high + i / max(1, n - 1) * (low - high)) ** rho for i in range(n)]
    return levels + [0.0]


class Denoiser(nn.Module):
    """D: the next latent from its noised self, the last L latents and the last L actions."""

    def __init__(self, args, num_actions):
        super().__init__()
        self.args = args
        self.sigmas = karras_sigmas(args.num_denoising_steps)
        L = args.num_conditioning_steps
        latent = args.encoder_channels[-1]
        width = args.denoiser_channels
        cond = args.cond_channels
        # the condition: noise level and actions
        self.register_buffer("fourier", torch.randn(cond // 2))
        self.action_embedding = nn.Embedding(num_actions, cond // L)
        self.cond_mlp = nn.Sequential(nn.Linear(cond, cond), nn.SiLU(), nn.Linear(cond, cond))
        # the U-Net, of one level
        self.conv_in = conv3x3((L + 1) * latent, width)
        self.down = ResBlock(width, width, cond)
        self.mid1 = ResBlock(width, width, cond)
        self.norm_mid = group_norm(width)
        self.attention = nn.MultiheadAttention(width, width // 8, batch_first=True)
        self.mid2 = ResBlock(width, width, cond)
        self.up1 = ResBlock(2 * width, width, cond)
        self.up2 = ResBlock(2 * width, width, cond)
        self.norm_out = group_norm(width)
        self.conv_out = conv3x3(width, latent)
        nn.init.zeros_(self.attention.out_proj.weight)
        nn.init.zeros_(self.conv_out.weight)

    def precondition(self, sigma):
        """c_in, c_out, c_skip [B, 1, 1, 1], c_noise [B] at sigma [B] (Karras et al., Table 1)."""
        sigma_data = self.args.sigma_data
        s = sigma[:, None, None, None]
        root = (s**2 + sigma_data**2).sqrt()
        c_in = 1 / root
        c_out = s * sigma_data / root
        c_skip = sigma_data**2 / root**2
        c_noise = sigma.log() / 4
        return c_in, c_out, c_skip, c_noise

    def unet(self, z_in, c_noise, z_hist, act_hist):
        """F of Karras et al. at z_in = c_in z_noisy [B, C, h, w].

        The condition is c_noise [B], z_hist [B, L, C, h, w] and act_hist [B, L].
        """
        angle = 2 * math.pi * c_noise[:, None] * self.fourier  # [B, cond / 2]
        level = torch.cat([angle.cos(), angle.sin()], 1)  # [B, cond]
        actions = self.action_embedding(act_hist).flatten(1)  # [B, cond]
        cond = self.cond_mlp(level + actions)
        context = z_hist.flatten(1, 2) / self.args.sigma_data  # [B, L * C, h, w]
        h0 = self.conv_in(torch.cat([context, z_in], 1))  # [B, width, h, w]
        h1 = self.down(h0, cond)
        h = self.mid1(h1, cond)
        tokens = self.norm_mid(h).flatten(2).transpose(1, 2)  # [B, h * w, width]
        attended, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        h = h + attended.transpose(1, 2).reshape(h.shape)
        h = self.mid2(h, cond)
        h = self.up1(torch.cat([h, h1], 1), cond)  # skip connection from below the first block
        h = self.up2(torch.cat([h, h0], 1), cond)  # and from the input
        return self.conv_out(F.silu(self.norm_out(h)))

    def loss(self, z, act, real):
        """The self-consistency objective, on z [B, T, C, h, w], act and real [B, T], T >= L + n.

            sum over i < n of
            || F(c_in sg(z_noisy), context_i) - (sg(z_next) - c_skip sg(z_noisy)) / c_out ||^2

        z_next is latent L + i, context_i the L latents before it, sg the stop-gradient. The context
        is not stopped: through it alone the encoder learns. In half of the batches the latents fed
        on into later contexts are the denoiser's own, as in imagination; these are stopped, too. In
        the other half they are the encoder's.
        """
        L = self.args.num_conditioning_steps
        n = self.args.num_autoregressive_steps
        latents = list(z.unbind(1))  # [B, C, h, w] each
        feed_own = torch.rand((), device=z.device) < 0.5  # random switching [P]
        loss = 0.0
        for i in range(n):
            z_hist = torch.stack(latents[i : i + L], 1)  # [B, L, C, h, w] gradient to the encoder
            z_next = z[:, L + i].detach()  # [B, C, h, w] no gradient through the target
            log_sigma = torch.randn(len(z), device=z.device) * 1.2 - 0.4  # [B] P_std, P_mean [D]
            sigma = log_sigma.exp().clamp(2e-3, 20)
            z_noisy = z_next + sigma[:, None, None, None] * torch.randn_like(z_next)
            c_in, c_out, c_skip, c_noise = self.precondition(sigma)
            output = self.unet(c_in * z_noisy, c_noise, z_hist, act[:, i : i + L])
            target = (z_next - c_skip * z_noisy) / c_out  # Eq. 8 with lambda(sigma) = 1 / c_out^2
            error = (output - target).square().mean((1, 2, 3))  # [B]
            loss = loss + masked_mean(error, real[:, L + i]) / n
            denoised = bound(c_skip * z_noisy + c_out * output, self.args.latent_bound)
            latents[L + i] = torch.where(feed_own, denoised.detach(), latents[L + i])
        return loss

    @torch.no_grad()
    def sample(self, z_hist, act_hist, noise):
        """The next latent [B, C, h, w] from unit noise: Euler steps, no churn (Karras, Alg. 2)."""
        # DEVIATES: DIAMOND begins with unit noise. Then chance varies too little
        z = self.sigmas[0] * noise
        for sigma, sigma_next in zip(self.sigmas, self.sigmas[1:]):
            c_in, c_out, c_skip, c_noise = self.precondition(z.new_full(z.shape[:1], sigma))
            output = self.unet(c_in * z, c_noise, z_hist, act_hist)
            denoised = bound(c_skip * z + c_out * output, self.args.latent_bound)
            z = z + (sigma_next - sigma) * ((z - denoised) / sigma)
        return z


# --------------------------------------------------------------------------- Reward and end model R
class RewardEndModel(nn.Module):
    """R: latent and action -> logits of sign(reward) in {-1, 0, 1} and of end in {0, 1}.

    R reads the present latent, not the next one. So a rare event can be expected before the sampler
    has learned to draw it.
    """

    def __init__(self, args, num_actions):
        super().__init__()
        width = args.reward_end_channels
        cond = args.cond_channels // 2
        side = args.image_size // 8
        hidden = args.lstm_dim
        self.action_embedding = nn.Embedding(num_actions, cond)
        self.conv_in = conv3x3(args.encoder_channels[-1], width)
        self.blocks = nn.ModuleList()
        for _ in range(args.reward_end_blocks):
            self.blocks.append(ResBlock(width, width, cond))
        self.norm = group_norm(width)
        # DEVIATES: DIAMOND's LSTMs have biases. Without, inputs of 0, at padding, keep the state 0
        self.lstm = nn.LSTM(width * side**2, hidden, bias=False, batch_first=True)
        self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 5))

    def forward(self, z, act, real):
        """z [B, T, C, h, w], act and real [B, T] -> logits [B, T, 3] and [B, T, 2]."""
        cond = self.action_embedding(act.flatten())  # [B * T, cond]
        x = self.conv_in(z.flatten(0, 1))  # [B * T, width, h, w]
        for block in self.blocks:
            x = block(x, cond)
        x = F.silu(self.norm(x))  # without this norm the LSTM dies at the learning rate of `small`
        x = x.reshape(*act.shape, -1) * real[..., None]  # [B, T, width * h * w]
        x, _ = self.lstm(x)  # [B, T, lstm_dim]
        return self.head(x).split((3, 2), -1)


# ------------------------------------------------------------------------------------- Actor-critic
class ActorCritic(nn.Module):
    """Latents -> logits of the policy, and value. It never trains the encoder."""

    def __init__(self, args, num_actions):
        super().__init__()
        c1, c2 = args.actor_critic_channels
        side = args.image_size // 16
        self.conv = nn.Sequential(
            ConvBlock(args.encoder_channels[-1], c1),
            ConvBlock(c1, c2),
            group_norm(c2),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.lstm = nn.LSTM(c2 * side**2, args.lstm_dim, bias=False, batch_first=True)
        self.actor = nn.Linear(args.lstm_dim, num_actions)
        self.critic = nn.Linear(args.lstm_dim, 1)
        for parameter in [*self.actor.parameters(), *self.critic.parameters()]:
            nn.init.zeros_(parameter)  # it begins as the uniform policy, with value 0

    def forward(self, z, real=None, state=None):
        """z [B, T, C, h, w], real [B, T] -> logits [B, T, A], value [B, T], LSTM state."""
        x = self.conv(z.detach().flatten(0, 1))  # [B * T, features]
        x = x.unflatten(0, z.shape[:2])  # [B, T, features]
        if real is not None:
            x = x * real[..., None]
        x, state = self.lstm(x, state)  # [B, T, lstm_dim]
        return self.actor(x), self.critic(x).squeeze(-1), state


def lambda_returns(rew, end, value, gamma, lambda_):
    """Lambda-returns [B, H] of rew and end [B, H], value [B, H+1] (Sutton & Barto, 12.1; DIAMOND).

        R_t = r_t + gamma (1 - end_t) ((1 - lambda) V_{t+1} + lambda R_{t+1}),    R_H = V_H

    An end stops the return. The last imagined step bootstraps from the value.
    """
    returns = []
    following = value[:, -1]
    for t in reversed(range(rew.shape[1])):
        mixed = (1 - lambda_) * value[:, t + 1] + lambda_ * following
        following = rew[:, t] + gamma * (1 - end[:, t]) * mixed
        returns.insert(0, following)
    return torch.stack(returns, 1)


class Agent(nn.Module):
    """The four networks."""

    def __init__(self, args, num_actions):
        super().__init__()
        self.args = args
        self.encoder = Encoder(args)
        self.denoiser = Denoiser(args, num_actions)
        self.reward_end = RewardEndModel(args, num_actions)
        self.actor_critic = ActorCritic(args, num_actions)
        self.to(memory_format=torch.channels_last)  # convolutions are fastest in this layout

    @torch.no_grad()
    def act(self, obs, state=None, epsilon=0.0):
        """Plays: a real frame [3, S, S], LSTM state -> sampled action, new LSTM state."""
        frame = torch.from_numpy(obs).to(self.encoder.center.device)
        z = self.encoder(frame[None, None])  # [1, 1, C, h, w]
        logits, _, state = self.actor_critic(z, None, state)
        if torch.rand(()) < epsilon:
            logits = torch.zeros_like(logits)
        return sample_logits(logits).item(), state


# -------------------------------------------------------------------------------------- Imagination
class Rollout(NamedTuple):
    """L recorded latents, followed by H imagined ones."""

    z: Tensor  # [B, L+H, C, h, w]
    real: Tensor  # [B, L+H] bool, False at padding before an episode
    act: Tensor  # [B, H] taken at frames L-1 .. L+H-2
    rew: Tensor  # [B, H] sign of the reward
    end: Tensor  # [B, H] 0 or 1


@torch.no_grad()
def imagine_step(agent, z_hist, act_hist, given, *policy_state):
    """One step from latents z_hist [B, L, C, h, w] and the actions act_hist [B, L-1] between them.

    `policy_state` are the two tensors of its LSTM. Returns z_next [B, C, h, w], act [B] and the new
    state. If `given` [B] is not None, it is the action.
    """
    logits, _, policy_state = agent.actor_critic(z_hist[:, -1:], None, policy_state)
    act = sample_logits(logits[:, 0]) if given is None else given  # [B]
    acts = torch.cat([act_hist, act[:, None]], 1)  # [B, L]
    z_next = agent.denoiser.sample(z_hist, acts, torch.randn_like(z_hist[:, 0]))
    return z_next, act, *policy_state


@torch.no_grad()
def imagine(agent, z, act, real, horizon, actions=None, step=imagine_step):
    """Imagines from z [B, L, C, h, w], act [B, L] (the last one is not used) and real [B, L].

    If `actions` [B, H] is not None, they are taken. `step` may be a compiled imagine_step.
    """
    L = z.shape[1]
    _, _, policy_state = agent.actor_critic(z[:, :-1], real[:, :-1])  # burns in
    latents = list(z.unbind(1))
    acts = list(act[:, :-1].unbind(1))
    for t in range(horizon):
        given = None if actions is None else actions[:, t]
        z_hist = torch.stack(latents[-L:], 1)  # [B, L, C, h, w]
        act_hist = torch.stack(acts[1 - L :], 1)  # [B, L-1]
        outputs = step(agent, z_hist, act_hist, given, *policy_state)
        # a CUDA graph overwrites its outputs when it runs again, so they are copied at once
        z_next, act_t, *policy_state = [tensor.clone() for tensor in outputs]
        latents.append(z_next)
        acts.append(act_t)
    z = torch.stack(latents, 1)  # [B, L+H, C, h, w]
    act = torch.stack(acts, 1)  # [B, L+H-1]
    real = F.pad(real, (0, horizon), value=True)  # [B, L+H]
    # what R draws changes nothing that follows, so it reads all steps at once
    rew_logits, end_logits = agent.reward_end(z[:, :-1], act, real[:, :-1])
    rew = sample_logits(rew_logits[:, L - 1 :]) - 1.0  # [B, H]
    end = sample_logits(end_logits[:, L - 1 :]).float()  # [B, H]
    return Rollout(z, real, act[:, L - 1 :], rew, end)


# --------------------- Losses: tensors in, a loss and its parts out; they never wait for the device
def world_model_loss(agent, batch):
    """Loss of encoder, denoiser and R on segments of L + H frames. All parts reach the encoder."""
    # DEVIATES: one batch, encoded once, serves denoiser and R; DIAMOND draws one for each
    z = agent.encoder(batch.obs, batch.real)  # [B, T, C, h, w]
    denoising_loss = agent.denoiser.loss(z, batch.act, batch.real)
    rew_logits, end_logits = agent.reward_end(z, batch.act, batch.has_act)
    rew_class = batch.rew.long() + 1  # [B, T] 0, 1 or 2
    rew_error = F.cross_entropy(rew_logits.transpose(1, 2), rew_class, reduction="none")  # [B, T]
    end_error = F.cross_entropy(end_logits.transpose(1, 2), batch.end, reduction="none")  # [B, T]
    reward_loss = masked_mean(rew_error, batch.has_act)
    end_loss = masked_mean(end_error, batch.has_act)
    logs = {
        "losses/denoising": denoising_loss.detach(),
        "losses/reward": reward_loss.detach(),
        "losses/end": end_loss.detach(),
    }
    return denoising_loss + reward_loss + end_loss, logs


def actor_critic_loss(agent, rollout):
    """REINFORCE with lambda-returns and a value baseline. No loss after an imagined end."""
    args = agent.args
    L = args.num_conditioning_steps
    # DEVIATES: the gradient also flows through the burn-in; DIAMOND stops it at the first step
    logits, value, _ = agent.actor_critic(rollout.z, rollout.real)  # [B, L+H, A], [B, L+H]
    logits = logits[:, L - 1 : -1]  # [B, H, A] where actions were taken
    value = value[:, L - 1 :]  # [B, H+1] one more, for the bootstrap
    baseline = value[:, :-1]  # [B, H]
    returns = lambda_returns(rollout.rew, rollout.end, value.detach(), args.gamma, args.td_lambda)
    # DEVIATES: after an imagined end nothing counts; DIAMOND begins another rollout there
    ended_before = rollout.end.cumsum(1) - rollout.end
    alive = ended_before == 0  # [B, H] up to and including the first imagined end
    log_probs = logits.log_softmax(-1)  # [B, H, A]
    log_prob = log_probs.gather(-1, rollout.act[..., None]).squeeze(-1)  # [B, H]
    entropy = masked_mean(-(log_probs.exp() * log_probs).sum(-1), alive)
    advantage = (returns - baseline).detach()  # [B, H]
    policy_loss = masked_mean(-log_prob * advantage, alive)
    value_loss = masked_mean((baseline - returns).square(), alive)
    logs = {
        "losses/policy": policy_loss.detach(),
        "losses/value": value_loss.detach(),
        "losses/entropy": entropy.detach(),
        "imagination/return": (rollout.rew * alive).sum(1).mean(),
    }
    return policy_loss + value_loss - args.ent_coef * entropy, logs


def compile_losses(agent, batch, starts):
    """Compiles world_model_loss, actor_critic_loss and imagine_step, and tries them.

    `batch` are segments of L + H frames for the first, `starts` of L frames for the other two.
    It uses CUDA graphs or, where these cannot be captured, none. Raises UsageError if both fail.
    """
    print("compiling, 1 to 4 minutes", flush=True)
    H = agent.args.horizon
    torch._dynamo.config.allow_rnn = True
    for mode in ("reduce-overhead", "default"):  # the first one means CUDA graphs
        fast = partial(torch.compile, fullgraph=True, dynamic=False, mode=mode)
        wm_loss = fast(world_model_loss)
        ac_loss = fast(actor_critic_loss)
        step = fast(imagine_step)
        try:
            for _ in range(3):  # compile, record, replay
                agent.zero_grad()
                torch.compiler.cudagraph_mark_step_begin()
                wm_loss(agent, batch)[0].backward()
                z = agent.encoder(starts.obs).detach()
                rollout = imagine(agent, z, starts.act, starts.real, H, step=step)
                ac_loss(agent, rollout)[0].backward()
            gigabytes = torch.cuda.max_memory_reserved() / 1e9
            print(f"compiled, {gigabytes:.1f} GB reserved with the replay", flush=True)
            return wm_loss, ac_loss, step
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            print(f"torch.compile, mode {mode}: {error!r}")
    raise UsageError("--compile failed, see above; --no-compile is about ten times slower")


# ------------------------------------------------------------------------- Measurement, evaluation
@torch.no_grad()
def measure(agent, batch):
    """Holds imagination beside reality, under the real actions, on segments that no update saw.

    error_1, error_H: squared error of the imagined latent, over that of "nothing changes".
    rewards_read, rewards_found: what R expects where a reward came, from real and imagined latents.
    change_rms: how far the latent moves in one step.
    """
    L = agent.args.num_conditioning_steps
    H = agent.args.horizon
    z = torch.cat([agent.encoder(obs) for obs in batch.obs.split(16)])  # [B, L+H, C, h, w]
    actions = batch.act[:, L - 1 : -1]  # [B, H]
    rollout = imagine(agent, z[:, :L], batch.act[:, :L], batch.real[:, :L], H, actions)
    real = batch.real[:, L:]  # [B, H]
    error = (rollout.z[:, L:] - z[:, L:]).square().mean((2, 3, 4)) * real  # [B, H]
    no_change = (z[:, L - 1 : L] - z[:, L:]).square().mean((2, 3, 4)) * real  # [B, H]
    relative_error = error.sum(0) / no_change.sum(0)  # [H]

    def expected_reward(latents):
        logits, _ = agent.reward_end(latents, batch.act, batch.has_act)
        probs = logits[:, L - 1 : -1].softmax(-1)  # [B, H, 3]
        return probs[..., 2] - probs[..., 0]  # [B, H]

    rew = batch.rew[:, L - 1 : -1]  # [B, H]
    rewarded = batch.has_act[:, L - 1 : -1] & (rew != 0)
    metrics = {
        "world_model/error_1": relative_error[0],
        "world_model/error_H": relative_error[-1],
        "world_model/rewards_read": (expected_reward(z) * rew)[rewarded].mean(),
        "world_model/rewards_found": (expected_reward(rollout.z) * rew)[rewarded].mean(),
        "latent/change_rms": no_change[:, 0].mean().sqrt(),
    }
    return {name: value.item() for name, value in metrics.items()}


@torch.no_grad()
def evaluate_policy(agent, env_id, num_episodes, seed):
    """Plays full games with the sampled policy -> the content of result.json."""
    torch.manual_seed(seed)
    env = make_env(env_id, seed, agent.args.image_size)
    returns = []
    for game in progress(num_episodes, "game", num_episodes):
        obs, _ = env.reset(seed=seed + game)
        state = None
        game_return = 0.0
        for _ in range(MAX_STEPS):
            act, state = agent.act(obs, state)
            obs, rew, terminated, truncated, _ = env.step(act)
            game_return += rew
            if terminated or truncated:
                break
        returns.append(game_return)
    env.close()
    atari = is_atari(env.spec)
    ale = getattr(env.unwrapped, "ale", None)
    protocol = {
        "eval_seed": seed,
        "noop_max": NOOP_MAX if atari else "unknown",
        "frame_skip": FRAME_SKIP if atari else "unknown",
        "sticky_actions": ale.getFloat("repeat_action_probability") if ale else "unknown",
    }
    return asdict(agent.args) | {
        "atari": atari,
        "mean_return": np.mean(returns).item(),
        "returns": returns,
        "protocol": protocol,
    }


# -------------------------------------------------------------------- Optimizers, files, progress
def count_updates(args):
    """Epochs, world-model updates and actor-critic updates of the whole run."""
    later_epochs = math.ceil((args.total_steps - args.first_collect_steps) / args.collect_steps)
    later_epochs += args.final_epochs
    wm_updates = args.first_world_model_updates + later_epochs * args.world_model_updates
    ac_updates = args.first_actor_critic_updates + later_epochs * args.actor_critic_updates
    return 1 + later_epochs, wm_updates, ac_updates


def make_optimizers(agent, args):
    """AdamW for the world model and for the actor-critic, and their schedules."""

    def group(network, lr_scale, clip):
        return {"params": network.parameters(), "lr": args.learning_rate * lr_scale, "clip": clip}

    encoder = group(agent.encoder, args.encoder_lr_scale, args.world_model_clip)
    denoiser = group(agent.denoiser, 1.0, args.world_model_clip)
    reward_end = group(agent.reward_end, 1.0, args.reward_end_clip)
    actor_critic = group(agent.actor_critic, args.actor_critic_lr_scale, args.actor_critic_clip)
    wm_groups = [encoder, denoiser, reward_end]
    wm_optimizer = torch.optim.AdamW(wm_groups, weight_decay=0.01, fused=True)  # [D]
    ac_optimizer = torch.optim.AdamW([actor_critic], weight_decay=0.0, fused=True)  # [D]

    def schedule(optimizer, updates):
        def factor(k):
            rise = min(1.0, (k + 1) / max(1, args.warmup_updates))
            return rise * (1 - k / max(1, updates)) if args.anneal_lr else rise

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    _, wm_updates, ac_updates = count_updates(args)
    wm_scheduler = schedule(wm_optimizer, wm_updates)
    ac_scheduler = schedule(ac_optimizer, ac_updates)
    return wm_optimizer, ac_optimizer, wm_scheduler, ac_scheduler


def optimize(loss, optimizer, scheduler):
    """One update. Every group of parameters has its own largest gradient norm."""
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], group["clip"])
    optimizer.step()
    scheduler.step()
    torch.compiler.cudagraph_mark_step_begin()  # CUDA graphs may overwrite what they left


class RunDir:
    """The files of a run: script.py, args.json, metrics.jsonl, ckpt.pt, result.json.

    They lie in <runs-dir>/<env-id>__<exp-name>__<seed>.
    """

    def __init__(self, args):
        """Creates the directory, or finds its own run there. Raises UsageError for another's."""
        name = f"{args.env_id}__{args.exp_name}__{args.seed}"
        self.path = Path(args.runs_dir, re.sub(r"[^\w.-]", "-", name))
        self.path.mkdir(parents=True, exist_ok=True)
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "ckpt.pt"
        settings = asdict(args)
        for free in ("compile", "runs_dir", "checkpoint_minutes", "track"):  # may change on the way
            del settings[free]
        files = {  # these two identify the run
            "args.json": json.dumps(settings, indent=1),
            "script.py": Path(__file__).read_text(),
        }
        for name, text in files.items():
            file = self.path / name
            if file.exists() and file.read_text() != text:
                remedy = "change --exp-name or --seed, or delete the directory"
                raise UsageError(f"{self.path} holds another run, see its {name}; {remedy}")
            file.write_text(text)
        self.wandb = None
        if args.track:
            init = import_module("wandb").init
            self.wandb = init(project="jedi", id=self.path.name, resume="allow", config=settings)

    def log(self, metrics, global_step):
        """Appends a line of JSON."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps({"global_step": global_step} | metrics) + "\n")
        if self.wandb:
            self.wandb.log(metrics, step=global_step)

    def save(self, state):
        """Replaces the checkpoint atomically: a crash leaves the old one."""
        temporary = self.path / "ckpt.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.checkpoint)


def progress(count, what, updates_left, losses={}):
    """Counts to `count`. Every ten seconds it prints how far it is and when the run will end.

    Raises UsageError if one of the losses so far is not finite.
    """
    start = time.time()
    last_print = start
    for i in range(count):
        yield i
        now = time.time()
        if i + 1 == count or now - last_print > 10:
            last_print = now
            for name, loss in losses.items():
                if not math.isfinite(loss):
                    when = f"after {what} {i + 1}"
                    raise UsageError(f"{name} is {loss} {when}; lower --learning-rate")
            minutes = (now - start) / 60 * (updates_left / (i + 1) - 1)
            print(f"  {what} {i + 1:,}/{count:,}, {minutes:,.1f} min to go", flush=True)


def keep_freed_memory():
    """Tells glibc to keep freed blocks. Else training on a CPU waits for zeroed pages."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


# --------------------------------------------------------------------------------------------- Main
def main(args):
    """Trains, evaluates and returns the content of result.json. Raises UsageError."""
    check_args(args)
    keep_freed_memory()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    torch.backends.cuda.enable_cudnn_sdp(False)  # it refuses 8 channels a head on some cards
    torch.backends.cudnn.benchmark = True  # shapes are fixed: try all convolution kernels once
    env = make_env(args.env_id, args.seed, args.image_size)
    L = args.num_conditioning_steps
    H = args.horizon
    try:
        device = torch.zeros(1, device=args.device).device
        replay = ReplayBuffer(args, device)
        frames = max(args.batch_size, args.actor_critic_batch_size) * (L + H)
        values = 8 * args.encoder_channels[0] * args.image_size**2
        torch.empty(frames, values)  # an update takes more
        agent = Agent(args, int(env.action_space.n)).to(device)
        run = RunDir(args)
        state = None
        if run.checkpoint.exists():
            state = torch.load(run.checkpoint, map_location="cpu")
    except (OSError, ImportError, RuntimeError, AssertionError, ValueError) as error:
        flags = "--device, --total-steps, --batch-size, --actor-critic-batch-size, --runs-dir, "
        flags += "--track, a width or ckpt.pt: "
        raise UsageError(flags + str(error).splitlines()[0])
    result_file = run.path / "result.json"
    if result_file.exists():
        remedy = "for more steps change --exp-name, for more games see evaluate.py"
        print(f"{run.path} has finished; {remedy}")
        return json.loads(result_file.read_text())

    wm_optimizer, ac_optimizer, wm_scheduler, ac_scheduler = make_optimizers(agent, args)
    to_compile = args.compile and device.type == "cuda"
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams, graphs and random numbers are the current device's
    wm_loss = world_model_loss
    ac_loss = actor_critic_loss
    step = imagine_step
    parts = {
        "agent": agent,
        "replay": replay,
        "wm_optimizer": wm_optimizer,
        "ac_optimizer": ac_optimizer,
        "wm_scheduler": wm_scheduler,
        "ac_scheduler": ac_scheduler,
    }
    rng = torch if device.type == "cpu" else torch.get_device_module(device)
    start_time = time.time()
    epoch = 0
    global_step = 0
    if state:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        rng.set_rng_state(state["rng"])
        epoch = state["epoch"]
        global_step = state["global_step"]
        start_time -= state["seconds"]
        env.reset(seed=args.seed + global_step)  # a game of its own
        os.truncate(run.metrics, state["metrics_bytes"])  # forgets what came after the checkpoint
        print(f"{run.path}: going on after epoch {epoch}")

    num_epochs, wm_updates, ac_updates = count_updates(args)
    updates_left = wm_updates + ac_updates - wm_scheduler.last_epoch - ac_scheduler.last_epoch
    size = sum(parameter.numel() for parameter in agent.parameters())
    name = f"{run.path}: preset {args.preset} on {device}"
    print(f"{name}, {size:,} parameters, {updates_left:,} updates to go")
    last_save = time.time()
    game_over = True  # a resumed run begins a new game, for the emulator's state is not kept
    end = True  # of the learning episode
    while epoch < num_epochs:
        first_epoch = epoch == 0
        metrics = {}
        losses = defaultdict(float)

        # 1. COLLECT with the policy. A lost life ends the learning episode; the game goes on
        steps = args.first_collect_steps if first_epoch else args.collect_steps
        steps = min(steps, args.total_steps - global_step)
        for _ in progress(steps, "step", steps):
            if game_over:
                obs, info = env.reset()
                lives = info.get("lives", 0)
                game_return = 0.0
            if end:
                policy_state = None
                replay.start_episode(obs)
            act, policy_state = agent.act(obs, policy_state, args.epsilon)
            obs, rew, terminated, truncated, info = env.step(act)
            game_over = terminated or truncated
            life_lost = info.get("lives", lives) < lives
            lives = info.get("lives", lives)
            end = game_over or life_lost
            replay.add(act, rew, terminated or life_lost, obs)
            global_step += 1
            game_return += rew
            if game_over:
                metrics["charts/return"] = game_return
                run.log({"charts/episodic_return": game_return}, global_step)
        if first_epoch and replay.data["rew"][: replay.size].abs().mean() > 0.8:
            print("note: nearly every step has a reward, and only its sign is learned")
        if steps and not first_epoch:
            newest = replay.size - 1 - torch.randint(steps, (64,), device=device)
            metrics |= measure(agent, replay.sample(newest, L - 1, H))

        if to_compile:
            batch = replay.sample(replay.anchors(args.batch_size), L - 1, H)
            starts = replay.sample(replay.anchors(args.actor_critic_batch_size), L - 1, 0)
            wm_loss, ac_loss, step = compile_losses(agent, batch, starts)
            to_compile = False

        # 2. TRAIN THE WORLD MODEL: encoder, denoiser, reward and end model
        updates = args.first_world_model_updates if first_epoch else args.world_model_updates
        for _ in progress(updates, "world-model update", updates_left, losses):
            batch = replay.sample(replay.anchors(args.batch_size), L - 1, H)
            loss, logs = wm_loss(agent, batch)
            optimize(loss, wm_optimizer, wm_scheduler)
            for name, value in logs.items():
                losses[name] += value / updates
        updates_left -= updates

        # 3. TRAIN THE ACTOR-CRITIC IN IMAGINATION
        updates = args.first_actor_critic_updates if first_epoch else args.actor_critic_updates
        for _ in progress(updates, "actor-critic update", updates_left, losses):
            batch = replay.sample(replay.anchors(args.actor_critic_batch_size), L - 1, 0)
            with torch.no_grad():
                z = agent.encoder(batch.obs)  # [B, L, C, h, w]
            rollout = imagine(agent, z, batch.act, batch.real, H, step=step)
            loss, logs = ac_loss(agent, rollout)
            optimize(loss, ac_optimizer, ac_scheduler)
            for name, value in logs.items():
                losses[name] += value / updates
        updates_left -= updates

        # 4. LOG AND CHECKPOINT
        epoch += 1
        metrics |= {name: value.item() for name, value in losses.items()}
        metrics["charts/hours"] = (time.time() - start_time) / 3600
        run.log(metrics, global_step)
        shown = [f"{name.split('/')[1]} {value:.2f}" for name, value in metrics.items()]
        print(f"epoch {epoch}/{num_epochs}, step {global_step:,}: {', '.join(shown)}", flush=True)
        if epoch == num_epochs or time.time() - last_save > 60 * args.checkpoint_minutes:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {
                "rng": rng.get_rng_state(),
                "epoch": epoch,
                "global_step": global_step,
                "seconds": time.time() - start_time,
                "metrics_bytes": run.metrics.stat().st_size,
            }
            run.save(state)
            last_save = time.time()

    # 5. EVALUATE the last weights in full games
    env.close()
    result = evaluate_policy(agent, args.env_id, args.eval_episodes, args.seed + 10_000)
    result |= {"global_step": global_step, "wall_time_s": time.time() - start_time}
    run.log({"eval/episodic_return": result["mean_return"]}, global_step)
    result_file.write_text(json.dumps(result, indent=1))
    print(f"{run.path}: mean return {result['mean_return']:.2f} of {args.eval_episodes} games")
    return result


def parse_args(argv=None):
    """Command line -> Args: the preset's values, changed by the flags."""
    first, _ = tyro.cli(Args, args=argv, return_unknown_args=True, add_help=False)
    return tyro.cli(Args, args=argv, default=PRESETS[first.preset])


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # modules of your own environments
    try:
        main(parse_args())
    except UsageError as error:
        message = error
    except torch.OutOfMemoryError as error:
        message = f"lower --batch-size: {error}"
    except BaseException as error:
        error.add_note("The same command goes on from the last checkpoint.")
        raise
    else:
        sys.exit(0)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
