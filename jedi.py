"""JEDI: Joint Embedding DIffusion, a latent-diffusion world-model agent for Atari 100k, in one file.

Papers: arXiv 2505.19698 ("Performance Asymmetry in Model-Based RL") and its successor 2605.13013. JEDI's parent is DIAMOND
(arXiv 2405.12399), which imagines the next 64x64x3 frame by diffusion. JEDI imagines the next 16x8x8 latent instead. It has
no decoder and no reconstruction loss: the encoder learns only from what helps to predict the next latent, reward and end.

    python jedi.py --env-id Breakout    # the published experiment on a GPU, a small one on a CPU; again: goes on from there
    python jedi.py --help               # every hyperparameter, with its symbol and where it comes from

Shapes: B batch, T time, L conditioning steps, H horizon, C h w latent channels and size, S image size, A actions.
z latent, act action, rew sign of the reward, end of a life; real: the frame is no padding.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import hashlib
import importlib
import json
import math
import os
import pathlib
import platform
import shlex
import shutil
import signal
import sys
import time
from typing import Literal, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # else its threads, which spin while they wait, fight with torch's
os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # torch's: long enough not to sleep between two operations

import ale_py  # noqa: E402
import gymnasium as gym  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import tyro  # noqa: E402
from torch import Tensor, nn  # noqa: E402

SCRIPT = pathlib.Path(__file__).resolve()  # a fork names itself in its runs and in its messages


class UsageError(Exception):
    """What the user can mend, in one line: what is wrong, and the remedy. The command line prints it and exits with 2."""


# ------------------------------------------------------------------------------------------------------ Hyperparameters
@dataclasses.dataclass
class Args:
    """JEDI on one game. [P] published for JEDI, [D] DIAMOND's default, [O] our own. The same command continues a run."""

    env_id: str = "Breakout"  # an Atari game, or module:Name-v0 for any environment of images and Discrete actions
    preset: Literal["paper", "small"] = "paper"  # the published experiment, or one for a CPU; without: by device
    seed: int = 1  # of every random number; on a CPU it determines the run bit for bit
    device: str = "auto"  # auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, mps
    compile: bool | None = None  # torch.compile, and on CUDA one graph per update; None: on CUDA, unless it fails there
    bf16: bool | None = None  # bfloat16 in the convolutions of all networks but the encoder; None: on CUDA
    exp_name: str = "jedi"  # name of the method in the run directory and in the result; change it in a fork
    runs_dir: str = "runs"  # a run lives in <runs-dir>/<game>__<exp-name>__<seed>
    checkpoint_minutes: float = 10.0  # between checkpoints; one is also written at the end and on Ctrl-C
    track: bool = False  # also log to Weights & Biases (pip install wandb)
    # Frames, replay, encoder E
    image_size: int = 64  # S, pixels: frames are S x S x 3, latents S/8 x S/8 [D]
    recency_weights: tuple[float, ...] = (0.1, 0.1, 0.1, 0.7)  # of equal parts of the episodes, oldest to newest [D]
    encoder_channels: tuple[int, int, int, int] = (32, 32, 32, 16)  # width of each stage; the last is C [P]
    encoder_lr_scale: float = 0.3  # learning rate of the encoder / learning rate of the world model [P]
    latent_bound: float = 3.0  # s of C(z) = s tanh(z / s) [P]
    # Latent diffusion dynamics D
    num_conditioning_steps: int = 4  # L, past latents and actions that the denoiser sees [D]
    num_autoregressive_steps: int = 2  # n, next latents predicted in a row by the training loss, n >= 2 [P]
    denoiser_channels: int = 160  # width of the U-Net [P]
    cond_channels: int = 256  # width of the embedding of noise level and actions [D]
    sigma_data: float = 0.5  # std of the latents, and what EDM's preconditioning assumes of it [D]
    p_mean: float = -0.4  # mean of ln(sigma) in training [D]
    p_std: float = 1.2  # std of ln(sigma) in training [D]
    sigma_train: tuple[float, float] = (2e-3, 20.0)  # bounds of sigma in training [D]
    num_denoising_steps: int = 3  # Euler steps per imagined latent [D]
    sigma_sample: tuple[float, float] = (2e-3, 5.0)  # last non-zero and first sigma of the sampler [D]
    rho: float = 7.0  # exponent of Karras' schedule [D]
    # Reward and end model R, actor-critic
    reward_end_channels: int = 32  # width of R's residual blocks [D]
    reward_end_noise: float = 0.5  # std of the noise on the latents from which R learns / sigma_data [O]
    lstm_dim: int = 512  # units of R's LSTM and of the actor-critic's [D]
    actor_critic_channels: tuple[int, int] = (32, 64)  # widths of the actor-critic's two residual blocks [O, after D]
    horizon: int = 15  # H, imagined steps per rollout [D]
    gamma: float = 0.985  # discount per agent step [D]
    td_lambda: float = 0.95  # lambda of the lambda-returns [D]
    ent_coef: float = 0.001  # eta, weight of the policy's entropy in nats [D]
    # Optimisation
    batch_size: int = 32  # B, replayed segments per update; the paper reports the better of 32 and 64 per game [P]
    learning_rate: float = 1e-4  # AdamW's rate for denoiser and reward/end model [D]
    actor_critic_lr: float = 1e-4  # AdamW's rate for the actor-critic [D]
    weight_decay: float = 1e-2  # AdamW's weight decay of the world model; 0 for the actor-critic [D]
    warmup_updates: int = 100  # updates of linear learning-rate warm-up [D]
    encoder_warmup_updates: int = 100  # the encoder's: late, it finds a denoiser that knows what the actions do [O]
    lr_decay: float = 0.0  # share of all updates, at the end, over which rates fall to 0, ent_coef as their square [D]
    denoiser_max_grad_norm: float = 1.0  # gradient clip of the denoiser [D], and of the encoder [O]
    reward_end_max_grad_norm: float = 100.0  # gradient clip of the reward/end model [D]
    actor_critic_max_grad_norm: float = 100.0  # gradient clip of the actor-critic [D]
    # Schedule, in agent steps of 4 frames: 100,000 of them are the 400k frames of "Atari 100k". Pairs: first epoch, later ones
    total_steps: int = 100_000  # agent steps in the environment [D]
    collect_steps: tuple[int, int] = (5_000, 100)  # agent steps per epoch [D]
    first_collect_max: int = 10_000  # bound of the first collection, which goes on until first_collect_rewards [D]
    first_collect_rewards: int = 10  # steps seen whose reward has another than the most frequent sign [D]
    world_model_updates: tuple[int, int] = (10_000, 400)  # updates of encoder, denoiser, reward/end model per epoch [D]
    actor_critic_updates: tuple[int, int] = (5_000, 400)  # updates of the actor-critic per epoch [D]
    final_epochs: int = 50  # epochs without collecting at the end [D]
    epsilon: float = 0.01  # probability of a uniformly random action while collecting; 0 in evaluation [D]
    eval_episodes: int = 100  # full games of the final score, played with the last weights [D]

    def __post_init__(self):
        self.env_id += "" if "-v" in self.env_id else "NoFrameskip-v4"  # Breakout -> BreakoutNoFrameskip-v4


# What --preset small changes: widths, rates and budgets, never what is computed
SMALL = dict(
    image_size=32, encoder_channels=(8, 16, 32, 16), encoder_lr_scale=0.1, num_autoregressive_steps=4, denoiser_channels=48,
    cond_channels=128, reward_end_channels=16, lstm_dim=128, actor_critic_channels=(16, 32), horizon=10, ent_coef=0.05,
    batch_size=24, learning_rate=7e-4, actor_critic_lr=7e-4, actor_critic_max_grad_norm=1.0, encoder_warmup_updates=300,
    lr_decay=1.0, total_steps=12_800, collect_steps=(4_000, 800), first_collect_max=4_000, world_model_updates=(600, 40),
    actor_critic_updates=(60, 120), final_epochs=0, eval_episodes=50,
)  # fmt: skip
MAY_BE_ZERO = """seed checkpoint_minutes recency_weights encoder_lr_scale reward_end_noise gamma td_lambda ent_coef weight_decay
    warmup_updates encoder_warmup_updates lr_decay first_collect_rewards world_model_updates actor_critic_updates final_epochs
    epsilon""".split()


def check_args(args: Args) -> None:
    """Raises UsageError for the first value that cannot work."""
    low = dict.fromkeys(MAY_BE_ZERO, 0) | {"p_mean": -100, "num_conditioning_steps": 2}
    low |= dict.fromkeys(("total_steps", "first_collect_max"), args.collect_steps[0])
    high = dict.fromkeys(("gamma", "td_lambda", "lr_decay", "epsilon"), 1) | {"num_autoregressive_steps": args.horizon + 1}
    multiple = {"image_size": 8, "denoiser_channels": 8, "cond_channels": 2 * args.num_conditioning_steps}
    for name, value in ({"horizon": args.horizon} | vars(args)).items():  # the bound of another comes first
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) in (int, float):
                lo, hi = low.get(name, 1 if type(number) is int else 1e-9), high.get(name, 10**9)
                if not lo <= number <= hi or number % multiple.get(name, number or 1):
                    text = f"must be from {lo} to {hi}" + (f", a multiple of {multiple[name]}" if name in multiple else "")
                    raise UsageError(f"--{name.replace('_', '-')} {value}: {text}")
    if not any(args.recency_weights):
        raise UsageError(f"--recency-weights {args.recency_weights}: must not all be 0")


# ----------------------- Environment: the usual Atari protocol (Machado et al. 2018), or any image environment as it is
FRAME_SKIP, NOOP_MAX = 4, 30  # [D]


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


def area_weights(size_in: int, size_out: int) -> np.ndarray:
    """[size_out, size_in]: the share of each input pixel in each output bin, fractional at the edges as in cv2.INTER_AREA."""
    edges, pixel = np.linspace(0, size_in, size_out + 1), np.arange(size_in)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)  # [size_out, size_in]
    return (overlap.clip(0) * size_out / size_in).astype(np.float32)


def game_name(env_id: str) -> str:
    """BreakoutNoFrameskip-v4, ALE/Breakout-v5 -> Breakout; tests.toy:Catch-v0 -> Catch."""
    return env_id.split(":")[-1].split("/")[-1].rsplit("-v", 1)[0].removesuffix("NoFrameskip")


def make_env(env_id: str, seed: int, image_size: int = 64) -> gym.Env:
    """Environment with uint8 frames [3, S, S], discrete actions, unclipped rewards and, in the info of a game's last step,
    `episode` = {"r": return, "l": length}. On Atari, info["lives"] tells of lost lives. Seeded; reset() goes on from the seed.
    Raises UsageError for an unknown id, an observation that is no image, or an action that is not Discrete."""
    module, _, name = env_id.rpartition(":")
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    try:
        importlib.import_module(module or "ale_py")  # registers the environment
        atari = str(gym.spec(name).entry_point).startswith("ale_py")
        env = gym.make(name, **(dict(frameskip=1) if atari else {}))
    except (ImportError, gym.error.Error, ValueError) as error:
        raise UsageError(f"--env-id {env_id}: {error}") from None
    space, actions = env.observation_space, env.action_space
    image = space.dtype == np.uint8 and len(space.shape) > 1 and space.shape[2:] in ((), (1,), (3,))
    if not (image and isinstance(actions, gym.spaces.Discrete)):
        needs = "observations must be uint8 images [height, width, 1 or 3], actions Discrete"
        raise UsageError(f"--env-id {env_id}: {needs}, not {space} and {actions}")
    rows, cols = (area_weights(n, image_size) for n in space.shape[:2])

    def resize(screen: np.ndarray) -> np.ndarray:
        screen = np.broadcast_to(screen.reshape(*screen.shape[:2], -1), (*screen.shape[:2], 3))  # grey becomes RGB
        return np.rint(rows @ screen.transpose(2, 0, 1).astype(np.float32) @ cols.T).astype(np.uint8)  # [3, S, S]

    env, frames = AtariGame(env) if atari else env, gym.spaces.Box(0, 255, (3, image_size, image_size), np.uint8)
    env = gym.wrappers.TransformAction(env, lambda act: act + actions.start, gym.spaces.Discrete(actions.n))
    env = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.TransformObservation(env, resize, frames))
    env.reset(seed=seed)
    return env


# ------------------------------------- Replay: uint8, preallocated on the training device, so that a batch is one index
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
    """One slot per frame; the final frame of an episode has its own, without an action. Grows when it is full."""

    # has_step: an action was recorded there; rew: unclipped; first: the slot of the episode's first frame
    FIELDS = dict(obs=torch.uint8, act=torch.long, rew=torch.float, end=torch.bool, has_step=torch.bool, first=torch.long)

    def __init__(self, num_steps: int, image_size: int, device: torch.device, recency_weights: tuple[float, ...] = (1.0,)):
        self.device, self.recency_weights, self.size, self.num_steps, self.weights = device, recency_weights, 0, 0, None
        for name, dtype in self.FIELDS.items():
            shape = (3, image_size, image_size) if name == "obs" else ()
            setattr(self, name, torch.zeros(int(1.1 * num_steps) + 2, *shape, dtype=dtype, device=device))

    def add(self, obs: np.ndarray, act: int | None = None, rew: float = 0.0, end: bool = False) -> None:
        """The frame [3, S, S] to which `act` at the newest one led; without `act` the first frame of an episode. An episode
        that is still open then, as after a resume, stays truncated."""
        for name in self.FIELDS if self.size == len(self.obs) else ():
            full = getattr(self, name)
            setattr(self, name, torch.cat([full, full.new_zeros(self.size // 2 + 1, *full.shape[1:])]))
        slot, self.first[self.size] = self.size - 1, self.size
        if act is not None:
            self.act[slot], self.rew[slot], self.end[slot], self.has_step[slot] = act, rew, end, True
            self.first[self.size], self.num_steps = self.first[slot], self.num_steps + 1
        self.obs[self.size], self.size, self.weights = torch.from_numpy(obs), self.size + 1, None

    def anchor_weights(self) -> Tensor:
        """[slots]: the episodes are cut into equal parts, oldest to newest; a part is drawn by recency, then a step of it."""
        # DEVIATES: uniform over the part's steps; DIAMOND draws an episode of the part, then a step of it
        step, first = self.has_step[: self.size], self.first[: self.size]  # [slots]
        episode = (first == torch.arange(self.size, device=self.device)).cumsum(0) - 1  # [slots]
        newer = episode[-1] - episode  # [slots] the newest episode is in the last part, however few there are
        part = len(self.recency_weights) - 1 - newer * len(self.recency_weights) // (episode[-1] + 1)  # [slots]
        recency = torch.tensor(self.recency_weights, device=self.device)  # [parts]
        return recency[part] * step / torch.zeros_like(recency).index_add_(0, part, step.float()).clamp(min=1)[part]

    def sample(self, batch_size: int, before: int, after: int, generator=None, newest: int | None = None) -> Batch:
        """Segments of `before` frames, an anchor frame at which an action was recorded, and `after` frames. Anchors are drawn
        by recency, or uniformly among the `newest` frames."""
        self.weights = self.anchor_weights() if self.weights is None else self.weights
        weights = self.weights if newest is None else self.has_step[self.size - newest : self.size].float()
        drawn = torch.multinomial(weights, batch_size, replacement=True, generator=generator)  # [B]
        anchor = self.size - len(weights) + drawn[:, None]  # [B, 1]
        slot = anchor + torch.arange(-before, after + 1, device=self.device)  # [B, T]
        # DEVIATES: before its episode a segment repeats the first frame; DIAMOND pads with zeros
        inside = torch.maximum(slot, self.first[anchor]).clamp(max=self.size - 1)
        real = (slot == inside) & (self.first[inside] == self.first[anchor])
        step = real & self.has_step[inside]
        act = torch.where(step, self.act[inside], 0)
        return Batch(self.obs[inside], act, self.rew[inside].sign(), self.end[inside].long(), real, step)

    def state_dict(self) -> dict:
        return {name: getattr(self, name)[: self.size].clone() for name in self.FIELDS} | {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict) -> None:
        self.size, self.num_steps, self.weights = len(state["obs"]), state["num_steps"], None
        for name in self.FIELDS:
            setattr(self, name, state[name].to(self.device))


# ------------------------------------------------------------------------------------------------------- Network blocks
conv3x3 = functools.partial(nn.Conv2d, kernel_size=3, padding=1)


class GroupNorm(nn.Module):
    """Group normalisation, 32 channels a group [D]; with cond_channels its scale and shift come from a condition [B, K]."""

    def __init__(self, channels: int, cond_channels: int = 0):
        super().__init__()
        groups = next(n for n in range(max(1, channels // 32), 0, -1) if channels % n == 0)
        self.norm = nn.GroupNorm(groups, channels, affine=not cond_channels)
        self.linear = nn.Linear(cond_channels, 2 * channels) if cond_channels else None

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        if self.linear is None:
            return self.norm(x)
        scale, shift = self.linear(cond)[:, :, None, None].chunk(2, 1)  # [B, channels, 1, 1]
        return self.norm(x) * (1 + scale) + shift


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
        return self.skip(x) + self.conv2(F.silu(self.norm2(h, cond)))


class SelfAttention(nn.Module):
    """Self-attention over the h * w positions, heads of 8 channels [D], residual, zero at the start."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.qkv = GroupNorm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, 3, c // 8, 8, h * w).transpose(-1, -2).unbind(1)  # [B, heads, h * w, 8]
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(-1, -2).reshape(b, c, h, w))


class LSTM(nn.Module):
    """An LSTM over x [B, T, features]; padding (real [B, T] False) leaves no trace in its state."""

    def __init__(self, in_features: int, hidden: int):
        super().__init__()
        self.cell = nn.LSTMCell(in_features, hidden)
        nn.init.orthogonal_(self.cell.weight_hh)
        nn.init.ones_(self.cell.bias_ih.data[hidden : 2 * hidden])  # the forget gate starts open

    def forward(self, x: Tensor, real: Tensor | None = None, state: tuple[Tensor, Tensor] | None = None):
        outputs = []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)  # 2 x [B, hidden]
            if real is not None:
                state = tuple(s * real[:, t, None] for s in state)
            outputs.append(state[0])
        return torch.stack(outputs, 1), state  # [B, T, hidden]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask holds (of one shape), 0 if nowhere. Unlike x[mask].mean() it has fixed shapes and never syncs."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


# ------------------------------------------------------------------------------------------- Encoder E: frame -> latent
class Encoder(nn.Module):
    """uint8 frames [..., 3, S, S] -> latents z [..., C, S/8, S/8] = C(sigma_data (x - center) / scale), C(z) = s tanh(z / s) [P].
    x is the network's output, center its median over frames, scale the median over frames of their rms distance from it."""

    # DEVIATES: published is z = C(x). Nothing then keeps the part of x that moves from shrinking, for a latent that stands
    # still is the easiest to predict. So x is normalised, and the gradient sees it measured in units of its own motion. By
    # medians: on Assault the 3 % of the frames that flash would else have 99 % of the variance

    def __init__(self, args: Args):
        super().__init__()
        (c1, c2, c3, c4), self.args = args.encoder_channels, args
        self.net = nn.Sequential(
            conv3x3(3, c1), ResBlock(c1, c1), conv3x3(c1, c2, stride=2),
            ResBlock(c2, c2), conv3x3(c2, c3, stride=2),
            ResBlock(c3, c3), conv3x3(c3, c3, stride=2),
            ResBlock(c3, c3), GroupNorm(c3), nn.SiLU(), conv3x3(c3, c4),
        )  # fmt: skip
        self.register_buffer("center", torch.zeros(c4, args.image_size // 8, args.image_size // 8))
        self.register_buffer("scale", torch.tensor(1.0))

    def features(self, obs: Tensor) -> Tensor:
        return self.net(obs.flatten(0, -4).float() / 255).contiguous().unflatten(0, obs.shape[:-3])  # x [..., C, h, w]

    def forward(self, obs: Tensor, real: Tensor | None = None) -> Tensor:
        """With `real` [B, T], as in the world model's loss, by the batch's statistics; else by those of the last refresh."""
        x = self.features(obs)
        center, scale, motion = self.center, self.scale, 1.0
        if real is not None:
            center, scale = self.statistics(x, real)
            both = (real[:, 1:] & real[:, :-1])[..., None, None, None].expand_as(x[:, 1:])
            motion = masked_mean((x[:, 1:] - x[:, :-1]).square(), both).clamp(min=1e-12).sqrt()
            motion = motion / motion.detach()  # 1, but its gradient takes away what scaling the motion would gain
        z = self.args.sigma_data * (x - center) / (scale * motion)
        return self.args.latent_bound * torch.tanh(z / self.args.latent_bound)

    def statistics(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Over the real frames of x [B, T, C, h, w]: center [C, h, w] and, without a gradient, scale []."""
        frames = torch.where(real[..., None, None, None], x, torch.nan).flatten(0, 1)  # [B * T, C, h, w]
        center = frames.nanmedian(0).values
        square = torch.where(real, (x - center).square().mean((2, 3, 4)), torch.nan).detach()  # [B, T]
        return center, square.flatten().nanmedian(0).values.clamp(min=1e-12).sqrt()


# ----------------------------------------------------- Latent diffusion dynamics D: EDM (Karras et al. 2022) on latents
def karras_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """n noise levels from sigma_max down to sigma_min, then 0. Karras et al. 2022, Eq. 5."""
    lo, hi = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return [(hi + i / max(1, n - 1) * (lo - hi)) ** rho for i in range(n)] + [0.0]


class Denoiser(nn.Module):
    """D: the next latent [B, C, h, w] from its noised self, latents z_hist [B, L, C, h, w] and actions act_hist [B, L]."""

    def __init__(self, args: Args, num_actions: int):
        super().__init__()
        self.args, steps, latent = args, args.num_conditioning_steps, args.encoder_channels[-1]
        width, cond = args.denoiser_channels, args.cond_channels
        self.register_buffer("fourier", torch.randn(cond // 2))
        self.action_embedding = nn.Embedding(num_actions, cond // steps)
        self.cond_mlp = nn.Sequential(nn.Linear(cond, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.conv_in = conv3x3((steps + 1) * latent, width)
        self.down, self.mid1, self.mid2 = (ResBlock(width, width, cond) for _ in range(3))
        self.attention = SelfAttention(width)
        self.up1, self.up2 = (ResBlock(2 * width, width, cond) for _ in range(2))
        self.norm_out, self.conv_out = GroupNorm(width), conv3x3(width, latent)
        nn.init.zeros_(self.conv_out.weight)
        self.sigmas = karras_sigmas(args.num_denoising_steps, *args.sigma_sample, args.rho)

    def precondition(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_in, c_out, c_skip [B, 1, 1, 1] and c_noise [B] for noise levels sigma [B]. Karras et al. 2022, Table 1."""
        s, d = sigma[:, None, None, None], self.args.sigma_data
        c_in = 1 / (s**2 + d**2).sqrt()
        c_out = s * d / (s**2 + d**2).sqrt()
        c_skip = d**2 / (s**2 + d**2)
        c_noise = sigma.log() / 4
        return c_in, c_out, c_skip, c_noise

    def unet(self, z_in: Tensor, c_noise: Tensor, z_hist: Tensor, act_hist: Tensor) -> Tensor:
        """F of Karras et al. z_in: [B, C, h, w] noised latent scaled by c_in -> [B, C, h, w]."""
        angle = 2 * math.pi * c_noise[:, None] * self.fourier  # [B, cond / 2]
        actions = self.action_embedding(act_hist).flatten(1)  # [B, cond]
        with torch.autocast(z_in.device.type, torch.bfloat16, enabled=bool(self.args.bf16)):
            cond = self.cond_mlp(torch.cat([angle.cos(), angle.sin()], 1) + actions)  # [B, cond]
            x = self.conv_in(torch.cat([z_hist.flatten(1, 2) / self.args.sigma_data, z_in], 1))  # [B, width, h, w]
            y = self.down(x, cond)
            h = self.mid2(self.attention(self.mid1(y, cond)), cond)
            h = self.up2(torch.cat([self.up1(torch.cat([h, y], 1), cond), x], 1), cond)
            return self.conv_out(F.silu(self.norm_out(h))).float()

    def bound(self, z: Tensor) -> Tensor:
        # DEVIATES: a clamp, not C(z) = s tanh(z / s), which applied again at every imagined step would shrink z without end
        return z.clamp(-self.args.latent_bound, self.args.latent_bound)

    def loss(self, z: Tensor, act: Tensor, real: Tensor, sigma: Tensor, noise: Tensor, feed_own: Tensor) -> Tensor:
        """The joint-embedding diffusion loss, or self-consistency objective (2505.19698), over n autoregressive steps.
        z [B, L+n, C, h, w] encoded frames, act [B, L+n], real [B, L+n]; sigma [n, B] noise levels and noise [n, B, C, h, w];
        feed_own: bool [], whether step i+1 is conditioned on the denoiser's own latent (as in imagination) or the encoder's."""
        steps, loss = self.args.num_conditioning_steps, 0.0
        hist = list(z.unbind(1))  # not stopped: the encoder learns through the condition alone
        for i in range(len(sigma)):
            z_hist = torch.stack(hist[i : i + steps], 1)  # [B, L, C, h, w]
            z_next = z[:, steps + i].detach()  # [B, C, h, w] stop-gradient on the target
            z_noisy = z_next + sigma[i, :, None, None, None] * noise[i]
            c_in, c_out, c_skip, c_noise = self.precondition(sigma[i])
            output = self.unet(c_in * z_noisy, c_noise, z_hist, act[:, i : i + steps])
            target = (z_next - c_skip * z_noisy) / c_out  # Karras et al. 2022, Eq. 8 with lambda(sigma) = 1 / c_out^2
            error = (output - target).square().mean((1, 2, 3))  # [B]
            loss = loss + masked_mean(error, real[:, steps + i]) / len(sigma)
            denoised = self.bound(c_skip * z_noisy + c_out * output).detach()
            hist[steps + i] = torch.where(feed_own, denoised, hist[steps + i])  # random switching
        return loss

    @torch.no_grad()
    def sample(self, z_hist: Tensor, act_hist: Tensor, z: Tensor) -> Tensor:
        """Imagines the next latent [B, C, h, w] from noise z: Karras et al. 2022, Algorithm 2, Euler steps without churn. EDM
        starts from noise of std sigmas[0]; DIAMOND, and so this file, from unit noise."""
        for sigma, sigma_next in zip(self.sigmas, self.sigmas[1:]):
            c_in, c_out, c_skip, c_noise = self.precondition(torch.full((len(z),), sigma, device=z.device))
            denoised = c_skip * z + c_out * self.unet(c_in * z, c_noise, z_hist, act_hist)
            z = z + (sigma_next - sigma) * ((z - denoised) / sigma)
        return self.bound(z).contiguous()


# ----------------------------------------------------------------------------------------------- Reward and end model R
class RewardEndModel(nn.Module):
    """(z, act, z_next) -> logits of sign(reward) in {-1, 0, 1} and of end in {0, 1}, through an LSTM."""

    def __init__(self, args: Args, num_actions: int):
        super().__init__()
        self.args, width, cond = args, args.reward_end_channels, args.cond_channels // 2
        self.action_embedding = nn.Embedding(num_actions, cond)
        self.conv_in = conv3x3(2 * args.encoder_channels[-1], width)
        self.block1, self.block2 = (ResBlock(width, width, cond) for _ in range(2))
        self.lstm = LSTM(width * (args.image_size // 8) ** 2, args.lstm_dim)
        self.head = nn.Sequential(nn.Linear(args.lstm_dim, args.lstm_dim), nn.SiLU(), nn.Linear(args.lstm_dim, 5))

    def forward(self, z: Tensor, act: Tensor, z_next: Tensor, real: Tensor | None = None, state=None):
        """z, z_next [B, T, C, h, w], act and real [B, T] -> logits [B, T, 3] and [B, T, 2], LSTM state."""
        cond = self.action_embedding(act.flatten())  # [B * T, cond]
        with torch.autocast(z.device.type, torch.bfloat16, enabled=bool(self.args.bf16)):
            x = self.conv_in(torch.cat([z, z_next], 2).flatten(0, 1))  # [B * T, width, h, w]
            x = self.block2(self.block1(x, cond), cond)
        x, state = self.lstm(x.float().reshape(*act.shape, -1), real, state)  # [B, T, lstm_dim]
        rew_logits, end_logits = self.head(x).split((3, 2), -1)
        return rew_logits, end_logits, state

    def loss(self, z: Tensor, batch: Batch, blur: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropies of reward and end over the recorded steps; z [B, T, C, h, w]: the latents of the batch's frames,
        blur: unit noise of that shape."""
        # DEVIATES: R learns from noised latents. Else it reads, and teaches the encoder to write, traits too faint for the
        # denoiser to imagine: on Catch it knew every near miss from real latents and took 84 % of the imagined ones for catches
        z = z + self.args.reward_end_noise * self.args.sigma_data * blur
        act, rew, end, step = (x[:, :-1] for x in (batch.act, batch.rew, batch.end, batch.step))  # [B, T-1]
        rew_logits, end_logits, _ = self(z[:, :-1], act, z[:, 1:], step)
        rew_loss = F.cross_entropy(rew_logits.transpose(1, 2), rew.long() + 1, reduction="none")  # [B, T-1]
        end_loss = F.cross_entropy(end_logits.transpose(1, 2), end, reduction="none")  # [B, T-1]
        return masked_mean(rew_loss, step), masked_mean(end_loss, step)


# --------------------------------------------------------------------------------------------------------- Actor-critic
class ActorCritic(nn.Module):
    """Latents -> policy logits and value. It reads detached latents: the policy never trains the encoder."""

    def __init__(self, args: Args, num_actions: int):
        super().__init__()
        (c1, c2), side, self.args = args.actor_critic_channels, math.ceil(args.image_size / 16), args
        pool = nn.MaxPool2d(2, ceil_mode=True)
        self.conv = nn.Sequential(ResBlock(args.encoder_channels[-1], c1), ResBlock(c1, c2), pool, nn.Flatten())
        self.lstm = LSTM(c2 * side**2, args.lstm_dim)
        self.actor, self.critic = nn.Linear(args.lstm_dim, num_actions), nn.Linear(args.lstm_dim, 1)
        for parameter in [*self.actor.parameters(), *self.critic.parameters()]:
            nn.init.zeros_(parameter)  # starts as the uniform policy with value 0

    def forward(self, z: Tensor, real: Tensor | None = None, state=None):
        """z [B, T, C, h, w], real [B, T] -> logits [B, T, A], value [B, T], LSTM state."""
        with torch.autocast(z.device.type, torch.bfloat16, enabled=bool(self.args.bf16)):
            x = self.conv(z.detach().flatten(0, 1)).unflatten(0, z.shape[:2])  # [B, T, features]
        x, state = self.lstm(x.float(), real, state)
        return self.actor(x), self.critic(x).squeeze(-1), state


def lambda_returns(rew: Tensor, end: Tensor, value: Tensor, gamma: float, lambda_: float) -> Tensor:
    """R_t = r_t + gamma (1 - end_t) ((1 - lambda) V_{t+1} + lambda R_{t+1}), with R_H = V_H (Sutton & Barto, 12.1; DIAMOND).
    rew, end [B, H], value [B, H+1] -> [B, H]. An end stops the return; the horizon, a truncation, bootstraps from the value."""
    returns, following = [], value[:, -1]
    for t in reversed(range(rew.shape[1])):
        following = rew[:, t] + gamma * (1 - end[:, t]) * ((1 - lambda_) * value[:, t + 1] + lambda_ * following)
        returns.append(following)
    return torch.stack(returns[::-1], 1)


# ---------------------------------------------------------------------------------------------------------- Imagination
class Agent(nn.Module):
    """The four networks."""

    def __init__(self, args: Args, num_actions: int):
        super().__init__()
        self.args, self.num_actions = args, num_actions
        self.encoder, self.denoiser = Encoder(args), Denoiser(args, num_actions)
        self.reward_end, self.actor_critic = RewardEndModel(args, num_actions), ActorCritic(args, num_actions)
        self.register_buffer("ent_coef", torch.tensor(args.ent_coef), persistent=False)  # it falls with the learning rates
        self.to(memory_format=torch.channels_last)  # the layout in which convolutions run fastest


class Rollout(NamedTuple):
    """L context frames followed by H imagined ones."""

    z: Tensor  # [B, L+H, C, h, w]
    real: Tensor  # [B, L+H] bool, False only for padding before an episode's start
    act: Tensor  # [B, H] taken at frames L-1 .. L+H-2
    rew: Tensor  # [B, H] sampled sign of the reward
    end: Tensor  # [B, H] sampled end, 0 or 1

    def alive(self) -> Tensor:
        """bool [B, H]: True up to and including the first end."""
        return torch.cat([torch.ones_like(self.end[:, :1]), 1 - self.end[:, :-1]], 1).cumprod(1).bool()


def gumbel(*shape: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """argmax(logits + gumbel noise) is a sample of softmax(logits): sampling without a sync, and with the noise passed in."""
    return -torch.log(-torch.log(torch.rand(*shape, generator=generator, device=device).clamp(1e-20, 1 - 1e-7)))


def imagination_noise(args: Args, batch: int, num_actions: int, device: torch.device, generator=None) -> tuple[Tensor, Tensor]:
    """All randomness of a rollout: unit noise [H, B, C, h, w] and gumbel noise [H, B, A + 3 + 2]."""
    shape = (args.horizon, batch, args.encoder_channels[-1], args.image_size // 8, args.image_size // 8)
    noise = torch.randn(shape, generator=generator, device=device)
    return noise, gumbel(args.horizon, batch, num_actions + 5, device=device, generator=generator)


@torch.no_grad()
def imagine_step(agent: Agent, z_hist: Tensor, act_hist: Tensor, policy_state, model_state, noise, gumbels, act=None):
    """One step of policy and world model, from the last L latents [B, L, C, h, w] and the L-1 actions between them [B, L-1].
    -> z_next [B, C, h, w], (act, rew, end [B]), new LSTM states. With `act` [B] the policy is not asked."""
    num_actions, z_now = agent.num_actions, z_hist[:, -1:]  # [B, 1, C, h, w]
    if act is None:
        logits, _, policy_state = agent.actor_critic(z_now, None, policy_state)
        act = (logits[:, 0] + gumbels[:, :num_actions]).argmax(1)  # [B]
    z_next = agent.denoiser.sample(z_hist, torch.cat([act_hist, act[:, None]], 1), noise)  # [B, C, h, w]
    rew_logits, end_logits, model_state = agent.reward_end(z_now, act[:, None], z_next[:, None], None, model_state)
    rew = (rew_logits[:, 0] + gumbels[:, num_actions : num_actions + 3]).argmax(1) - 1.0  # [B]
    end = (end_logits[:, 0] + gumbels[:, num_actions + 3 :]).argmax(1).float()  # [B]
    return z_next, (act, rew, end), policy_state, model_state


@torch.no_grad()
def imagine(agent: Agent, z: Tensor, act: Tensor, real: Tensor, noise: Tensor, gumbels: Tensor, actions=None,
            step=imagine_step) -> Rollout:  # fmt: skip
    """Rolls policy and world model H steps from the contexts z [B, L, C, h, w], act [B, L] (the last one unused), real [B, L],
    with imagination_noise. With `actions` [B, H] the policy is not asked: imagination beside reality. `step` may be compiled."""
    steps, zs, acts, records = z.shape[1], list(z.unbind(1)), list(act[:, :-1].unbind(1)), []
    _, _, policy_state = agent.actor_critic(z[:, :-1], real[:, :-1])  # both LSTMs burn in on the context
    _, _, model_state = agent.reward_end(z[:, :-1], act[:, :-1], z[:, 1:], real[:, :-1])
    for t in range(len(noise)):
        z_hist, act_hist = torch.stack(zs[-steps:], 1), torch.stack(acts[1 - steps :], 1)  # [B, L, C, h, w], [B, L-1]
        given, states = None if actions is None else actions[:, t], (policy_state, model_state)
        z_next, record, policy_state, model_state = step(agent, z_hist, act_hist, *states, noise[t], gumbels[t], given)
        zs, acts, records = [*zs, z_next], [*acts, record[0]], [*records, record]
    imagined_real = torch.cat([real, torch.ones_like(real[:, :1]).expand(-1, len(noise))], 1)
    return Rollout(torch.stack(zs, 1), imagined_real, *(torch.stack(x, 1) for x in zip(*records)))


# ---------------------------- Losses: tensors in, a loss and a dict of detached tensors out. No host sync, fixed shapes
def world_model_loss(agent: Agent, batch: Batch, sigma: Tensor, noise: Tensor, feed_own: Tensor,
                     blur: Tensor) -> tuple[Tensor, dict]:  # fmt: skip
    """Diffusion loss + reward/end loss on one batch of segments with L-1 frames before the anchor and H+1 after it. Both reach
    the encoder. sigma, noise, feed_own: see Denoiser.loss; blur: see RewardEndModel.loss."""
    # DEVIATES: one batch, encoded once, feeds both losses; DIAMOND draws one for each
    z = agent.encoder(batch.obs, batch.real)  # [B, T, C, h, w]
    k = agent.args.num_conditioning_steps + agent.args.num_autoregressive_steps
    diffusion_loss = agent.denoiser.loss(z[:, :k], batch.act[:, :k], batch.real[:, :k], sigma, noise, feed_own)
    reward_loss, end_loss = agent.reward_end.loss(z, batch, blur)
    logs = {"losses/denoising": diffusion_loss, "losses/reward": reward_loss, "losses/end": end_loss}
    return diffusion_loss + reward_loss + end_loss, {k: v.detach() for k, v in logs.items()}


def actor_critic_loss(agent: Agent, rollout: Rollout) -> tuple[Tensor, dict]:
    """REINFORCE with lambda-returns and a value baseline on an imagined rollout. No loss after an imagined end."""
    args, horizon = agent.args, rollout.act.shape[1]
    # DEVIATES: the gradient also flows through the LSTM's burn-in on the context; DIAMOND stops it at the rollout's start
    logits, value, _ = agent.actor_critic(rollout.z, rollout.real)  # [B, L+H, A], [B, L+H]
    logits, value = logits[:, -horizon - 1 : -1], value[:, -horizon - 1 :]  # [B, H, A], [B, H+1]
    returns = lambda_returns(rollout.rew, rollout.end, value.detach(), args.gamma, args.td_lambda)  # [B, H]
    # DEVIATES: after an imagined end nothing counts; DIAMOND begins another rollout there
    alive = rollout.alive()  # [B, H]
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
    return policy_loss + value_loss - agent.ent_coef * entropy, {k: v.detach() for k, v in logs.items()}


# ---- Measurements: does imagination obey the environment? On the steps just collected, before any update has seen them
@torch.no_grad()
def measure(agent: Agent, batch: Batch, *randomness: Tensor) -> dict[str, float]:
    """Imagination beside reality on real segments: under the real actions, then under the policy's own.
    error_h: squared latent error h steps ahead / that of "no change" (1: useless). rewards_found, no_reward_found, ends_found:
    share of the real ones that imagination has at the same step, NaN without any. return_imagined, return_real: sums over H
    steps of sign(reward). moving_std, change_rms: of the latent without its mean picture, and of its change in a step.
    effective_rank: exp(entropy of the normalised singular values) of the centred latents (Roy & Vetterli 2007)."""
    steps, horizon = agent.args.num_conditioning_steps, agent.args.horizon
    z = agent.encoder(batch.obs)  # [B, L+H+1, C, h, w]
    context = (z[:, :steps], batch.act[:, :steps], batch.real[:, :steps])
    act, rew, end, step = (x[:, steps - 1 : steps - 1 + horizon] for x in (batch.act, batch.rew, batch.end, batch.step))
    forced, free = imagine(agent, *context, *randomness, actions=act), imagine(agent, *context, *randomness)  # act ... [B, H]
    z_real, real = z[:, steps : steps + horizon], batch.real[:, steps : steps + horizon]  # [B, H, C, h, w], [B, H]
    error = (forced.z[:, steps:] - z_real).square().mean((2, 3, 4)) * real  # [B, H]
    no_change = (z[:, steps - 1 : steps] - z_real).square().mean((2, 3, 4)) * real  # [B, H]
    logs = {f"world_model/error_{h}": error[:, h - 1].sum() / no_change[:, h - 1].sum() for h in (1, min(5, horizon), horizon)}
    right, ended = forced.rew == rew, forced.end == end  # [B, H]
    classes = {"rewards_found": (right, rew != 0), "no_reward_found": (right, rew == 0), "ends_found": (ended, end == 1)}
    for name, (found, real_class) in classes.items():
        logs[f"world_model/{name}"] = (found & real_class & step).sum() / (real_class & step).sum()
    complete = step[:, -1] | (end & step).any(1)  # [B] the recording reaches H steps or the episode's end
    for name, returns in (("imagined", (free.rew * free.alive()).sum(1)), ("real", (rew * step).sum(1))):
        logs[f"world_model/return_{name}"] = (returns * complete).sum() / complete.sum()
    moving, both = (z - z.mean((0, 1)))[batch.real], batch.real[:, 1:] & batch.real[:, :-1]
    s = torch.linalg.svdvals(moving[:1000].flatten(1).cpu())  # not every device can
    logs["latent/effective_rank"] = torch.special.entr(s / s.sum()).sum().exp()
    logs["latent/moving_std"], logs["latent/change_rms"] = moving.std(), (z[:, 1:] - z[:, :-1])[both].square().mean().sqrt()
    return {name: float(value) for name, value in logs.items()}


# -------------------------------------------------------------------------------------- Trainer: what a checkpoint holds
class CudaGraph:
    """Calls function(batch) -> logs, and from the 4th call on replays its kernels in one launch instead of thousands. The first
    calls compile and tune, on a stream of their own, as capture demands. A capture keeps the addresses of what it read and
    wrote, so the batch is copied to a fixed place, and logs and gradients are valid until the next call."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls <= 3:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                logs = self.function(batch)
            torch.cuda.current_stream().wait_stream(stream)
            return logs
        if self.calls == 4:
            self.batch, self.graph = Batch(*(x.clone() for x in batch)), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # the default generator takes part: every replay draws new numbers
                self.logs = self.function(self.batch)
        for fixed, new in zip(self.batch, batch):
            fixed.copy_(new)
        self.graph.replay()
        return self.logs


PHASES = ("collect", "world_model", "actor_critic")  # of an epoch, in their order


class Trainer:
    """Networks, optimizers, replay, counters, random state. `advance` is one agent step or one update."""

    COUNTERS = "epoch first_steps signs done seconds sums measured initial_change log_size returns".split()

    def __init__(self, args: Args, num_actions: int, device: torch.device):
        torch.manual_seed(args.seed)  # the one source of randomness besides the emulator's
        self.args, self.device, self.env = args, device, None
        self.agent = Agent(args, num_actions).to(device)
        self.buffer = ReplayBuffer(args.total_steps, args.image_size, device, args.recency_weights)
        rate, clip = args.learning_rate, args.denoiser_max_grad_norm
        rates = (rate * args.encoder_lr_scale, rate, rate, args.actor_critic_lr)
        clips = (clip, clip, args.reward_end_max_grad_norm, args.actor_critic_max_grad_norm)
        common, groups = dict(warmup=args.warmup_updates, power=1), []
        for (name, network), rate, clip in zip(self.agent.named_children(), rates, clips):
            groups.append(dict(name=name, params=list(network.parameters()), rate=rate, clip=clip, **common))
        groups[0] |= dict(warmup=args.encoder_warmup_updates, power=2)  # it comes to rest before those that read it
        adamw = functools.partial(torch.optim.AdamW, fused=device.type in ("cpu", "cuda"))
        self.optimizers = {"world_model": adamw(groups[:3], weight_decay=args.weight_decay)}
        self.optimizers["actor_critic"] = adamw(groups[3:], weight_decay=0.0)
        self.random = torch if device.type == "cpu" else torch.get_device_module(device)  # has get_rng_state, set_rng_state
        self.plan = {"collect": args.collect_steps, "world_model": args.world_model_updates}  # first epoch, later ones
        self.plan["actor_critic"] = args.actor_critic_updates
        self.done, self.seconds = dict.fromkeys(PHASES, 0), dict.fromkeys(PHASES, 0.0)  # agent steps or updates, their time
        self.epoch, self.first_steps, self.signs = 0, 0, [0, 0, 0]  # length of the first collection; rewards of sign 0, 1, -1
        self.sums, self.measured = {phase: {} for phase in PHASES}, {}  # of this epoch: its updates' logs, its measurements
        self.initial_change, self.log_size, self.returns = 0.0, 0, []  # the latter: of the newest 10 training games
        self.accelerate(device.type == "cuda" if args.compile is None else args.compile)

    def accelerate(self, fast: bool) -> None:
        """Compiled functions and, on CUDA, one graph per update; or eager, the reference."""
        functions, self.fast = (world_model_loss, imagine_step, actor_critic_loss), fast
        if fast:  # one imagined step: unrolled over H of them, a graph would take many minutes to compile
            functions = (torch.compile(function, fullgraph=True, dynamic=False) for function in functions)
        self.world_model_loss, self.imagine_step, self.actor_critic_loss = functions
        capture = CudaGraph if fast and self.device.type == "cuda" else lambda function: function
        self.gradients = {phase: capture(functools.partial(self.compute_gradients, phase)) for phase in PHASES[1:]}

    def num_epochs(self) -> int:
        first, later = self.plan["collect"]
        return 1 + math.ceil((self.args.total_steps - (self.first_steps or first)) / later) + self.args.final_epochs

    def amount(self, phase: str, epoch: int) -> int:
        """Agent steps or updates of a phase that are done by the end of an epoch (0, 1, ...; -1: before the first)."""
        (first, later), limit = self.plan[phase], math.inf
        if phase == "collect":  # the first time until rewards have been seen
            enough, limit = sum(self.signs) - max(self.signs) >= self.args.first_collect_rewards, self.args.total_steps
            first = self.first_steps or (first if enough else self.args.first_collect_max)
        return min(limit, first + epoch * later) if epoch >= 0 else 0

    def advance(self, phase: str) -> dict | None:
        """One agent step, which returns {"r": unclipped return, "l": length} at a game's end; or one update."""
        game = self.collect() if phase == "collect" else self.update(phase)
        self.done[phase] += 1
        return game

    @torch.no_grad()
    def collect(self) -> dict | None:
        """One step in the training environment. A lost life ends the learning episode; the game goes on in the next."""
        if self.env is None:  # also after a resume, which begins a new game
            self.env = make_env(self.args.env_id, self.args.seed + self.buffer.num_steps, self.args.image_size)
            self.game_over = self.end = True
        if self.game_over:
            self.obs, info = self.env.reset()
            self.lives = info.get("lives", 0)
        if self.end:
            self.lstm_state = None
            self.buffer.add(self.obs)
        z = self.agent.encoder(torch.from_numpy(self.obs).to(self.device)[None, None])  # [1, 1, C, h, w]
        logits, _, self.lstm_state = self.agent.actor_critic(z, None, self.lstm_state)  # [1, 1, A]
        uniform = torch.rand((), device=self.device) < self.args.epsilon
        noise = gumbel(*logits.shape, device=self.device)
        act = int(torch.where(uniform, noise, logits + noise).argmax())  # the only sync of a step
        self.obs, rew, terminated, truncated, info = self.env.step(act)
        life_lost, self.lives = info.get("lives", 0) < self.lives, info.get("lives", 0)
        self.buffer.add(self.obs, act, float(rew), terminated or life_lost)
        self.signs[int(np.sign(rew))] += 1
        self.game_over, self.end = terminated or truncated, terminated or truncated or life_lost
        return info.get("episode")

    def update(self, phase: str) -> None:
        """One step of the world model (encoder, denoiser, reward/end model), or of the actor-critic; its logs go to `sums`."""
        batch, k, total = self.batch(phase), self.done[phase], self.amount(phase, self.num_epochs() - 1)
        decay = min(1.0, (total - k) / (self.args.lr_decay * total)) if self.args.lr_decay else 1.0
        self.agent.ent_coef.fill_(self.args.ent_coef * decay**2)
        try:
            logs = self.gradients[phase](batch)
        except Exception as error:
            if not self.fast:
                raise
            while error.__context__:  # a failing capture raises again on its way out: the first error is the cause
                error = error.__context__
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            reason = f"compiling or capturing failed ({what})"
            if self.args.compile:
                raise UsageError(f"--compile: {reason}; drop the flag") from error
            print(f"note: {reason}; going on without, which is slower", flush=True)
            self.accelerate(False)
            logs = self.gradients[phase](batch)
        for group in self.optimizers[phase].param_groups:
            group["lr"] = group["rate"] * decay ** group["power"] * min(1.0, (k + 1) / max(1, group["warmup"]))
        self.optimizers[phase].step()
        self.sums[phase] = {key: self.sums[phase].get(key, 0) + value for key, value in logs.items()}

    def batch(self, phase: str, generator: torch.Generator | None = None) -> Batch:
        """L-1 frames and an anchor, from which the actor-critic imagines; for the world model H+1 frames more."""
        after = self.args.horizon + 1 if phase == "world_model" else 0
        return self.buffer.sample(self.args.batch_size, self.args.num_conditioning_steps - 1, after, generator)

    def compute_gradients(self, phase: str, batch: Batch) -> dict[str, Tensor]:
        """Everything of an update but the optimizer's step, whose learning rate is a number of the host. -> logs."""
        args, size = self.args, len(batch.obs)
        if phase == "world_model":
            n, h = args.num_autoregressive_steps, args.image_size // 8
            sigma = (torch.randn(n, size, device=self.device) * args.p_std + args.p_mean).exp()
            sigma = sigma.clamp(*args.sigma_train)  # [n, B]
            noise = torch.randn(n, size, args.encoder_channels[-1], h, h, device=self.device)
            feed_own = torch.rand((), device=self.device) < 0.5  # a fair coin per batch [P]
            blur = torch.randn(*batch.real.shape, *noise.shape[2:], device=self.device)
            loss, logs = self.world_model_loss(self.agent, batch, sigma, noise, feed_own, blur)
        else:
            with torch.no_grad():
                z = self.agent.encoder(batch.obs)  # [B, L, C, h, w]
            randomness = imagination_noise(args, size, self.agent.num_actions, self.device)
            rollout = imagine(self.agent, z, batch.act, batch.real, *randomness, step=self.imagine_step)
            loss, logs = self.actor_critic_loss(self.agent, rollout)
        self.optimizers[phase].zero_grad()
        loss.backward()
        groups = self.optimizers[phase].param_groups
        return logs | {f"grad_norm/{g['name']}": nn.utils.clip_grad_norm_(g["params"], g["clip"]) for g in groups}

    @torch.no_grad()
    def refresh(self) -> None:
        """The encoder's statistics over 20 batches, from a generator of its own: doing it twice changes nothing."""
        generator, encoder = torch.Generator(self.device).manual_seed(self.epoch), self.agent.encoder
        batches = (self.batch("world_model", generator) for _ in range(20))
        statistics = zip(*(encoder.statistics(encoder.features(batch.obs), batch.real) for batch in batches))
        for buffer, values in zip((encoder.center, encoder.scale), statistics):
            buffer.copy_(torch.stack(values).mean(0))

    def state_dict(self) -> dict:
        state = {"agent": self.agent.state_dict(), "replay": self.buffer.state_dict(), "rng": self.random.get_rng_state()}
        state["optimizers"] = {phase: optimizer.state_dict() for phase, optimizer in self.optimizers.items()}
        return state | {name: getattr(self, name) for name in self.COUNTERS}

    def load_state_dict(self, state: dict) -> None:
        self.agent.load_state_dict(state["agent"])
        self.buffer.load_state_dict(state["replay"])
        self.random.set_rng_state(state["rng"])
        for phase, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][phase])
        for name in self.COUNTERS:
            setattr(self, name, state[name])


@torch.no_grad()
def evaluate_policy(agent: Agent, env_id: str, num_episodes: int, seed: int) -> dict:
    """Plays full games with the sampled policy, epsilon 0: one environment a game, all at once, so no bias to short ones. The
    content of result.json: `returns`, unclipped, `lengths` in agent steps, and all that tells with what they may be compared."""
    args, device, games, said = agent.args, next(agent.parameters()).device, [None] * num_episodes, 0.0
    envs = [make_env(env_id, seed + i, args.image_size) for i in range(num_episodes)]
    obs, state, generator = np.stack([env.reset()[0] for env in envs]), None, torch.Generator(device).manual_seed(seed)
    while None in games:
        z = agent.encoder(torch.from_numpy(obs).to(device)[:, None])  # [N, 1, C, h, w]
        logits, _, state = agent.actor_critic(z, None, state)  # [N, 1, A]
        actions = (logits + gumbel(*logits.shape, device=device, generator=generator)).argmax(-1).squeeze(1).tolist()
        for i in [i for i, game in enumerate(games) if game is None]:
            obs[i], _, terminated, truncated, info = envs[i].step(actions[i])
            games[i] = info["episode"] if terminated or truncated else None
        if Stop.signal:
            raise Stop
        if time.time() - said > 10:
            print(f"  {num_episodes - games.count(None)}/{num_episodes} games played", flush=True)
            said = time.time()
    spec, returns = envs[0].spec, [float(game["r"]) for game in games]
    atari = str(spec.entry_point).startswith("ale_py")
    protocol = {
        "episodes": num_episodes, "policy": "sampled", "temperature": 1.0, "epsilon": 0.0, "noop_max": NOOP_MAX * atari,
        "frame_skip": FRAME_SKIP if atari else 1, "sticky_actions": spec.kwargs.get("repeat_action_probability", 0.0),
        "checkpoint": "last", "life_loss_ends_episode": False, "reward_clipping": False, "eval_seed": seed,
    }  # fmt: skip
    versions = {package.__name__: package.__version__ for package in (torch, gym, ale_py, np)}
    return {
        "env_id": env_id, "game": game_name(env_id), "exp_name": args.exp_name, "seed": args.seed, "preset": args.preset,
        "returns": returns, "lengths": [int(game["l"]) for game in games], "mean_return": float(np.mean(returns)),
        "std_return": float(np.std(returns)), "protocol": protocol, "device": args.device,
        "versions": versions | {"python": platform.python_version(), "machine": platform.machine()},
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ The run directory
def resolve_device(name: str) -> torch.device:
    """auto -> cuda or cpu. Raises UsageError for a device that is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: not available here; use --device cpu ({str(error).splitlines()[0]})") from None


def set_up(device: torch.device) -> None:
    """The process, for speed."""
    torch.set_float32_matmul_precision("high")  # on CUDA, TF32 for what --bf16 leaves in float32
    torch.backends.cudnn.benchmark = True  # shapes are fixed: try all convolution kernels once, keep the fastest
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams and captures live on the current device
    if device.type == "cpu" and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc gives every freed block over 32 MiB back to the system, which then zeroes its pages anew: keep them instead
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def write(path: pathlib.Path, save) -> None:
    """save(file) goes beside the old file and replaces it only when it is on disk, whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        what, kept = str(error).splitlines()[0], "; the previous one is intact" * path.exists()
        raise UsageError(f"{path}: cannot be written ({what}){kept}; make room, then run the same command") from None


def load_checkpoint(run_dir: pathlib.Path) -> dict:
    """The state of a trainer, and about the run. Raises UsageError unless there is a whole one."""
    try:
        return torch.load(pathlib.Path(run_dir, "ckpt.pt"), map_location="cpu", weights_only=True)
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"{run_dir}/ckpt.pt: no whole checkpoint there ({what}); restore it or delete it") from None


class Run:
    """The directory <runs-dir>/<game>__<exp-name>__<seed>: a copy of the script, args.json, ckpt.pt, metrics.jsonl and, once
    training has finished, result.json, which nothing else writes."""

    def __init__(self, args: Args, trainer: Trainer):
        """Goes on from its checkpoint, if there is one. Raises UsageError if it holds another run than is asked for."""
        self.args, self.trainer, self.result = args, trainer, None
        self.wandb = importlib.import_module("wandb") if args.track else None
        self.dir = pathlib.Path(args.runs_dir, f"{game_name(args.env_id)}__{args.exp_name}__{args.seed}")
        self.dir.mkdir(parents=True, exist_ok=True)
        begun, finished = ((self.dir / name).exists() for name in ("ckpt.pt", "result.json"))
        script = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
        asked = json.loads(json.dumps(vars(args) | {"device": trainer.device.type, "script": script}))
        if not begun and not finished:
            shutil.copy(SCRIPT, self.dir)
            (self.dir / "args.json").write_text(json.dumps(asked, indent=1))
        kept = json.loads((self.dir / "args.json").read_text())
        for name, value in asked.items():
            if value != kept.get(name) and name not in ("compile", "runs_dir", "checkpoint_minutes", "track"):
                other = f"--{name.replace('_', '-')} {kept.get(name)}, not {value}; change --exp-name or --seed, or delete it"
                raise UsageError(f"{self.dir} holds a run with {other}".replace("--script", "the script"))
        if finished:
            self.result = json.loads((self.dir / "result.json").read_text())
        elif begun:
            trainer.load_state_dict(load_checkpoint(self.dir))
            log = self.dir / "metrics.jsonl"
            os.truncate(log, min(log.stat().st_size, trainer.log_size))  # forgets what was logged after the checkpoint
        else:
            (self.dir / "metrics.jsonl").write_text("")
        if self.wandb and not finished:
            self.wandb.init(project="jedi", name=self.dir.name, id=self.dir.name, resume="allow", config=vars(args))

    def log(self, metrics: dict[str, float]) -> None:
        step = self.trainer.done["collect"]
        with open(self.dir / "metrics.jsonl", "a") as file:
            known = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
            print(json.dumps({"global_step": step} | known), file=file)
        self.trainer.log_size = (self.dir / "metrics.jsonl").stat().st_size
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def checkpoint(self) -> None:
        state = {"args": vars(self.args), "num_actions": self.trainer.agent.num_actions} | self.trainer.state_dict()
        write(self.dir / "ckpt.pt", lambda file: torch.save(state, file))


# --------------------------------------------------------------------------------------------- Main loop and command line
class Stop(Exception):
    """On the command line the first Ctrl-C or SIGTERM stops the run after the current update; a second one kills it."""

    signal = 0

    @classmethod
    def ask(cls, number: int, frame) -> None:
        cls.signal = number
        signal.signal(number, signal.SIG_DFL)
        print("\nstopping after this update, with a checkpoint (once more: at once, without one)", flush=True)


def status(trainer: Trainer, phase: str, epoch: int) -> str:
    """What is done and what remains; until there is an actor-critic update, it takes as long as one of the world model."""
    speed, last = {name: trainer.seconds[name] / n for name, n in trainer.done.items() if n}, trainer.num_epochs() - 1
    left = {name: trainer.amount(name, last) - n for name, n in trainer.done.items()}
    seconds = sum(n * speed.get(name, speed.get("world_model", math.inf)) for name, n in left.items() if n)
    to_go = datetime.timedelta(seconds=int(seconds)) if seconds < math.inf else "unknown before the first update"
    return f"epoch {epoch + 1}/{last + 1} {phase} {trainer.done[phase]:,}/{trainer.amount(phase, epoch):,}, to go: {to_go}"


def train(trainer: Trainer, run: Run) -> None:
    """All epochs: collect, measure imagination, train the world model, train the actor-critic, log. Raises UsageError at the
    first NaN or inf, and Stop once a signal has come and the checkpoint is written."""
    args, saved, said, mark = trainer.args, time.time(), time.time(), time.time()
    while (epoch := trainer.epoch) < trainer.num_epochs():
        for phase in PHASES:
            while trainer.done[phase] < trainer.amount(phase, epoch):
                if game := trainer.advance(phase):
                    trainer.returns = [*trainer.returns, float(game["r"])][-10:]
                    run.log({"charts/episodic_return": float(game["r"]), "charts/episodic_length": int(game["l"])})
                signalled, now = Stop.signal, time.time()
                trainer.seconds[phase], mark = trainer.seconds[phase] + now - mark, now
                due = signalled or now - saved > 60 * args.checkpoint_minutes
                if due or now - said > 10 or trainer.done[phase] == trainer.amount(phase, epoch):
                    for key, value in trainer.sums[phase].items():
                        if not torch.isfinite(value):  # a sum never forgets it
                            place = f"{status(trainer, phase, epoch)}, or shortly before"
                            raise UsageError(f"{key} is {float(value)} at {place}; lower the learning rate")
                if now - said > 10:
                    print(f"  {status(trainer, phase, epoch)}", flush=True)
                    said = now
                if due:
                    run.checkpoint()
                    saved = now
                if signalled:
                    raise Stop
            if phase == "collect":
                trainer.first_steps = trainer.first_steps or trainer.done[phase]
                if not trainer.done["world_model"]:
                    trainer.refresh()
                new = trainer.done[phase] - trainer.amount(phase, epoch - 1)
                if new and not trainer.measured:  # on at most the newest 1,000 steps, which no update has seen
                    generator = torch.Generator(trainer.device).manual_seed(epoch)
                    newest = min(1000, new) + 1  # the last frame has no action yet
                    batch = trainer.buffer.sample(64, args.num_conditioning_steps - 1, args.horizon + 1, generator, newest)
                    noise = imagination_noise(args, 64, trainer.agent.num_actions, trainer.device, generator)
                    trainer.measured = measure(trainer.agent, batch, *noise)
            elif phase == "world_model":
                trainer.refresh()
        metrics = trainer.measured | {f"time/{phase}": seconds for phase, seconds in trainer.seconds.items()}
        for phase, sums in trainer.sums.items():
            updates = trainer.done[phase] - trainer.amount(phase, epoch - 1)
            metrics |= {key: float(value) / updates for key, value in sums.items()}
        trainer.epoch, trainer.measured, trainer.sums = epoch + 1, {}, {phase: {} for phase in PHASES}
        run.log(metrics | {"charts/epoch": epoch + 1, "charts/hours": sum(trainer.seconds.values()) / 3600})
        error, found = (metrics.get(f"world_model/{key}", math.nan) for key in ("error_1", "rewards_found"))
        returns = f"step {trainer.done['collect']:,} return {np.mean(trainer.returns or math.nan):.2f}"
        print(f"{status(trainer, phase, epoch)} | {returns} error {error:.2f} rewards found {found:.2f}", flush=True)
        change = metrics.get("latent/change_rms", math.inf)
        trainer.initial_change = trainer.initial_change or change
        if epoch and error > 1:
            print("warning: one step ahead imagination is worse than 'no change': the policy learns from a wrong world")
        if change < trainer.initial_change / 10:
            print("warning: what moves in the latent has shrunk to a tenth of what it was: the encoder is collapsing")


def main(args: Args) -> dict:
    """Trains, evaluates and returns the content of result.json. Raises UsageError, or Stop after a signal."""
    check_args(args)
    Stop.signal = 0
    device = resolve_device(args.device)
    args = dataclasses.replace(args, device=str(device), bf16=device.type == "cuda" if args.bf16 is None else args.bf16)
    set_up(device)
    env = make_env(args.env_id, args.seed, args.image_size)
    if sticky := env.spec.kwargs.get("repeat_action_probability"):
        print(f"warning: {args.env_id} repeats the last action with probability {sticky}: its scores are not Atari 100k")
    if args.preset == "paper" and device.type == "cpu":
        print("warning: the paper preset takes weeks on a CPU; --preset small takes minutes")
    trainer = Trainer(args, int(env.action_space.n), device)
    run = Run(args, trainer)
    if run.result:
        print(f"{run.dir} has finished: score {run.result['mean_return']:.2f}. For another run change --seed or --exp-name")
        return run.result
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in trainer.agent.named_children()}
    about = f"{args.preset} preset, {device}, {args.total_steps:,} steps, {trainer.num_epochs():,} epochs"
    print(f"{run.dir}: {about}, parameters", ", ".join(f"{name} {n:,}" for name, n in sizes.items()), flush=True)
    train(trainer, run)
    run.checkpoint()
    start = time.time()
    result = evaluate_policy(trainer.agent, args.env_id, args.eval_episodes, args.seed + 10_000)
    seconds = sum(trainer.seconds.values()) + time.time() - start
    result |= {"global_step": trainer.done["collect"], "wall_time_s": seconds}
    write(run.dir / "result.json", lambda file: file.write(json.dumps(result, indent=1).encode()))
    mean, std, spent = result["mean_return"], result["std_return"], datetime.timedelta(seconds=int(seconds))
    run.log({"eval/episodic_return": mean, "eval/episodic_return_std": std})
    print(f"score {mean:.2f} +- {std:.2f} (std over {args.eval_episodes} full games), {spent}; {run.dir}", flush=True)
    with contextlib.suppress(ImportError, AttributeError, KeyError):  # no such file here, or a game that is no Atari game
        random, human, *_ = importlib.import_module("evaluate").SCORES[result["game"]]
        share = f"{(mean - random) / (human - random):.0%} of the way"
        print(f"random play scores {random}, a human {human}: {share}. What longer runs learn: see README.md, Atari")
    return result


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args: defaults < preset < flags. Without --preset it is paper on CUDA, else small."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
    early.add_argument("--device", default="auto")
    given, _ = early.parse_known_args(argv)
    preset = given.preset or ("paper" if resolve_device(given.device).type == "cuda" else "small")
    return tyro.cli(Args, args=argv, default=Args(preset=preset, **(SMALL if preset == "small" else {})))


def cli(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, Stop.ask)
    try:
        main(parse_args(argv))
        return 0
    except (UsageError, NotImplementedError) as error:  # the latter: Apple's MPS lacks some operations
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
    except ImportError as error:  # --track without wandb
        print(f"error: {error}: pip install {error.name}", file=sys.stderr)
    except OSError as error:  # a full disk while logging, a directory taken away
        print(f"error: {error.filename}: {error.strerror}; mend that, then run the same command", file=sys.stderr)
    except Stop:
        print(f"stopped, with a checkpoint; the same command goes on from there: python {shlex.join(sys.argv)}")
        return 128 + Stop.signal
    return 2


if __name__ == "__main__":
    sys.exit(cli())
