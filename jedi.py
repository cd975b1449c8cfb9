"""JEDI: Joint Embedding DIffusion, a latent-diffusion world-model agent for Atari 100k, in one file.

Papers: arXiv 2505.19698 ("Performance Asymmetry in Model-Based RL") and its successor 2605.13013. JEDI's parent is DIAMOND
(arXiv 2405.12399), which imagines the next 64x64x3 frame by diffusion. JEDI imagines the next 16x8x8 latent instead. It has
no decoder and no reconstruction loss: the encoder learns only from what helps to predict the next latent, reward and end.

    python jedi.py --env-id Breakout    # the published experiment on a GPU, a small one on a CPU; again: goes on from there

Shapes: B batch, T time, L conditioning steps, H horizon, C h w latent channels and size, S image size, A actions.
z latent, act action, rew sign of the reward, end of a life; real: the frame is no padding.
"""

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import json
import math
import os
import pathlib
import shlex
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
from torch.utils import _pytree as pytree  # noqa: E402

SCRIPT = pathlib.Path(__file__).resolve()  # a fork names itself in its runs and in its messages


class UsageError(Exception):
    """What the user can mend, in one line. The command line prints it and exits with 2."""


# ------------------------------------------------------------------------------------------------------ Hyperparameters
@dataclasses.dataclass
class Args:
    """JEDI on one game. [P] published for JEDI, [D] DIAMOND's default, [O] our own. The same command continues a run."""

    env_id: str = "Breakout"  # an Atari game, or module:Name-v0 for any environment of images and Discrete actions
    preset: Literal["paper", "small"] = "paper"  # the published experiment, or one for a CPU; without: by device
    seed: int = 1  # of every random number; on a CPU it determines the run bit for bit
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda, cuda:1, mps
    compile: bool | None = None  # torch.compile, on CUDA with CUDA graphs; None: on CUDA, unless it fails there
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
    num_denoising_steps: int = 3  # Euler steps per imagined latent [D]
    # Reward and end model R, actor-critic
    reward_end_channels: int = 32  # width of R's residual blocks [D]
    reward_end_noise: float = 0.5  # std of the noise on the latents from which R learns / sigma_data [O]
    lstm_dim: int = 512  # units of R's LSTM and of the actor-critic's [D]
    actor_critic_channels: tuple[int, int] = (32, 64)  # widths of the actor-critic's two residual blocks [O, after D]
    horizon: int = 15  # H, imagined steps per rollout [D]
    gamma: float = 0.985  # discount per agent step [D]
    td_lambda: float = 0.95  # lambda of the lambda-returns [D]
    ent_coef: float = 0.001  # eta, weight of the policy's entropy in nats [D]
    batch_size: int = 32  # B, replayed segments per update; the paper reports the better of 32 and 64 per game [P]
    learning_rate: float = 1e-4  # AdamW's rate for all networks but the encoder [D]
    warmup_updates: tuple[int, int] = (100, 100)  # linear warm-up of rates [D]; of the encoder's, late [O]
    lr_decay: float = 0.0  # share of all updates, at the end, over which rates fall to 0, ent_coef as their square [D]
    max_grad_norm: tuple[float, float, float] = (1.0, 100.0, 100.0)  # of encoder, denoiser; of R; of the actor-critic [D]
    # Schedule, in agent steps of 4 frames: 100,000 of them are the 400k frames of "Atari 100k". Pairs: first epoch, later ones
    total_steps: int = 100_000  # agent steps in the environment [D]
    collect_steps: tuple[int, int] = (5_000, 100)  # agent steps per epoch [D]
    world_model_updates: tuple[int, int] = (10_000, 400)  # updates of encoder, denoiser, reward/end model per epoch [D]
    actor_critic_updates: tuple[int, int] = (5_000, 400)  # updates of the actor-critic per epoch [D]
    final_epochs: int = 50  # epochs without collecting at the end [D]
    epsilon: float = 0.01  # probability of a uniformly random action while collecting; 0 in evaluation [D]
    eval_episodes: int = 100  # full games of the final score, played with the last weights [D]

    def __post_init__(self):
        self.env_id += "" if "-v" in self.env_id else "NoFrameskip-v4"  # Breakout -> BreakoutNoFrameskip-v4


# What --preset small changes: widths, rates and budgets, never what is computed
SMALL = dict(
    image_size=32, encoder_channels=(8, 16, 32, 16), encoder_lr_scale=0.05, num_autoregressive_steps=4, denoiser_channels=48,
    cond_channels=128, reward_end_channels=16, lstm_dim=128, actor_critic_channels=(16, 32), horizon=10, ent_coef=0.05,
    batch_size=24, learning_rate=1.5e-3, warmup_updates=(100, 300), lr_decay=1.0, max_grad_norm=(1.0, 100.0, 1.0),
    total_steps=10_400, collect_steps=(4_000, 800), world_model_updates=(600, 40), actor_critic_updates=(60, 80),
    final_epochs=0, eval_episodes=50,
)  # fmt: skip
MAY_BE_ZERO = """seed checkpoint_minutes recency_weights encoder_lr_scale reward_end_noise gamma td_lambda ent_coef
    warmup_updates lr_decay world_model_updates actor_critic_updates final_epochs epsilon""".split()


def check_args(args: Args) -> None:
    """Raises UsageError for the first value that cannot work."""
    low = dict.fromkeys(MAY_BE_ZERO, 0) | dict(num_conditioning_steps=2, total_steps=args.collect_steps[0])
    high = dict.fromkeys(("gamma", "td_lambda", "lr_decay", "epsilon"), 1) | {"num_autoregressive_steps": args.horizon + 1}
    multiple = {"image_size": 8, "denoiser_channels": 8, "cond_channels": 2 * args.num_conditioning_steps}
    for name, value in ({"horizon": args.horizon} | vars(args)).items():  # the bound of another comes first
        for x in value if isinstance(value, tuple) else [value] if type(value) in (int, float) else []:
            lo, hi, m = low.get(name, 1 if type(x) is int else 1e-9), high.get(name, 10**9), multiple.get(name)
            if not lo <= x <= hi or m and x % m:
                must = f"must be from {lo} to {hi}" + f", a multiple of {m}" * bool(m)
                raise UsageError(f"--{name.replace('_', '-')} {value}: {must}")
    if not any(args.recency_weights):
        raise UsageError(f"--recency-weights {args.recency_weights}: must not all be 0")


# ----------------------- Environment: the usual Atari protocol (Machado et al. 2018), or any image environment as it is
FRAME_SKIP, NOOP_MAX = 4, 30  # [D]


class AtariGame(gym.Wrapper):
    """No-op starts and frame skip with a pixelwise max over the last two raw frames. No FIRE-reset."""

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        for _ in range(self.unwrapped.np_random.integers(1, NOOP_MAX + 1)):
            obs, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                obs, info = self.env.reset()
        return obs, info

    def step(self, action):
        total, last = 0.0, None
        for _ in range(FRAME_SKIP):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total, previous, last = total + reward, last, obs
            if terminated or truncated:  # the last observation is the real last screen
                return obs, total, terminated, truncated, info
        return np.maximum(previous, last), total, terminated, truncated, info


def game_name(env_id: str) -> str:
    """BreakoutNoFrameskip-v4, ALE/Breakout-v5 -> Breakout; tests.toy:Catch-v0 -> Catch."""
    return env_id.split(":")[-1].split("/")[-1].rsplit("-v", 1)[0].removesuffix("NoFrameskip")


def make_env(env_id: str, seed: int, image_size: int = 64) -> gym.Env:
    """Environment with uint8 frames [3, S, S], discrete actions, unclipped rewards and, in the info of a game's last step,
    `episode` = {"r": return, "l": length}; on Atari also "lives". Seeded; reset() goes on from the seed. Raises UsageError."""
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
    if not image or not isinstance(actions, gym.spaces.Discrete):
        raise UsageError(f"--env-id {env_id}: needs uint8 images [h, w, 1 or 3] and Discrete actions, not {space}, {actions}")

    def weights(size: int) -> np.ndarray:
        """[S, size]: the share of each pixel in each bin of a frame, fractional at the edges as in cv2.INTER_AREA."""
        edges, pixel = np.linspace(0, size, image_size + 1), np.arange(size)
        overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)  # [S, size]
        return (overlap.clip(0) * image_size / size).astype(np.float32)

    def resize(screen: np.ndarray) -> np.ndarray:
        screen = np.broadcast_to(screen.reshape(*screen.shape[:2], -1), (*screen.shape[:2], 3))  # grey becomes RGB
        return np.rint(rows @ screen.transpose(2, 0, 1).astype(np.float32) @ cols.T).astype(np.uint8)  # [3, S, S]

    rows, cols = map(weights, space.shape[:2])
    env, frames = AtariGame(env) if atari else env, gym.spaces.Box(0, 255, (3, image_size, image_size), np.uint8)
    env = gym.wrappers.TransformAction(env, lambda act: act + actions.start, gym.spaces.Discrete(actions.n))
    env = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.TransformObservation(env, resize, frames))
    env.reset(seed=seed)
    return env


# ------------------------------------- Replay: uint8, preallocated on the training device, so that a batch is one index
class Batch(NamedTuple):  # T consecutive frames around an anchor. Outside its episode is padding, which no loss may see
    obs: Tensor  # [B, T, 3, S, S] uint8
    act: Tensor  # [B, T] long, 0 where step is False
    rew: Tensor  # [B, T] float, sign of the reward that followed act
    end: Tensor  # [B, T] long, 1 if act ended the learning episode (no bootstrap); a truncation is 0
    real: Tensor  # [B, T] bool, the frame belongs to the episode
    step: Tensor  # [B, T] bool, an action was recorded at this frame (False for a final frame)


class ReplayBuffer:
    """One slot per frame; the final frame of an episode has its own, without an action: at most two slots per step."""

    # has_step: an action was recorded there; rew: unclipped; first: the slot of the episode's first frame
    FIELDS = dict(obs=torch.uint8, act=torch.long, rew=torch.float, end=torch.bool, has_step=torch.bool, first=torch.long)

    def __init__(self, args: Args, device: torch.device):
        self.args, self.device, self.size, self.weights = args, device, 0, None
        for name, dtype in self.FIELDS.items():
            shape = (3, args.image_size, args.image_size) if name == "obs" else ()
            setattr(self, name, torch.zeros(2 * args.total_steps + 100, *shape, dtype=dtype, device=device))

    def add(self, obs: np.ndarray, act: int | None = None, rew: float = 0.0, end: bool = False) -> None:
        """The frame [3, S, S] to which `act` at the newest one led; without `act` the first frame of an episode. An episode
        that is still open then, as after a resume, stays truncated."""
        slot, self.first[self.size] = self.size - 1, self.size
        if act is not None:
            self.act[slot], self.rew[slot], self.end[slot], self.has_step[slot] = act, rew, end, True
            self.first[self.size] = self.first[slot]
        self.obs[self.size], self.size, self.weights = torch.from_numpy(obs), self.size + 1, None

    def anchor_weights(self) -> Tensor:
        """[slots]: the episodes are cut into equal parts, oldest to newest; a part is drawn by recency, then a step of it."""
        # DEVIATES: uniform over the part's steps; DIAMOND draws an episode of the part, then a step of it
        step, first = self.has_step[: self.size], self.first[: self.size]  # [slots]
        episode = (first == torch.arange(self.size, device=self.device)).cumsum(0) - 1  # [slots]
        recency = torch.tensor(self.args.recency_weights, device=self.device)  # [parts]
        part = len(recency) - 1 - (episode[-1] - episode) * len(recency) // (episode[-1] + 1)  # [slots] the newest in the last
        return recency[part] * step / torch.zeros_like(recency).index_add_(0, part, step.float()).clamp(min=1)[part]

    def sample(self, batch_size: int, before: int, after: int, generator=None, newest: int | None = None) -> Batch:
        """Segments of `before` frames, an anchor with an action, `after` frames. `newest`: anchors uniform among so many."""
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
        return {name: getattr(self, name)[: self.size].clone() for name in self.FIELDS}

    def load_state_dict(self, state: dict) -> None:
        self.size, self.weights = len(state["obs"]), None
        for name in self.FIELDS:
            getattr(self, name)[: self.size] = state[name]


# ------------------------------------------------------------------------------------------------------- Network blocks
conv3x3 = functools.partial(nn.Conv2d, kernel_size=3, padding=1)


class GroupNorm(nn.Module):
    """Group normalisation, 32 channels a group [D]; with cond_channels its scale and shift come from a condition [B, K]."""

    def __init__(self, channels: int, cond_channels: int = 0):
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(channels, max(1, channels // 32)), channels, affine=not cond_channels)
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
    """uint8 frames [..., 3, S, S] -> z [..., C, S/8, S/8] = C(sigma_data (x - center) / scale), C(z) = s tanh(z / s) [P]. x is
    the network's output, center its median over frames, scale the median over frames of their rms distance from it."""

    # DEVIATES: published is z = C(x). Nothing then keeps what moves in x from shrinking, for a latent that stands still is
    # the easiest to predict. So x is normalised, by medians for frames that flash, with its gradient in units of its motion.

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
def karras_sigmas(n: int, sigma_min: float = 2e-3, sigma_max: float = 20.0, rho: float = 7.0) -> list[float]:
    """n noise levels from sigma_max down to sigma_min, then 0. Karras et al. 2022, Eq. 5. Constants: [D], but sigma_max."""
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
        self.norm_mid, self.attention = GroupNorm(width), nn.MultiheadAttention(width, width // 8, batch_first=True)
        self.up1, self.up2 = (ResBlock(2 * width, width, cond) for _ in range(2))
        self.norm_out, self.conv_out = GroupNorm(width), conv3x3(width, latent)
        for output in (self.conv_out, self.attention.out_proj):
            nn.init.zeros_(output.weight)
        self.sigmas = karras_sigmas(args.num_denoising_steps)

    def precondition(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_in, c_out, c_skip [B, 1, 1, 1] and c_noise [B] for noise levels sigma [B]. Karras et al. 2022, Table 1."""
        s, d = sigma[:, None, None, None], self.args.sigma_data
        root = (s**2 + d**2).sqrt()
        return 1 / root, s * d / root, d**2 / root**2, sigma.log() / 4

    def unet(self, z_in: Tensor, c_noise: Tensor, z_hist: Tensor, act_hist: Tensor) -> Tensor:
        """F of Karras et al. z_in: [B, C, h, w] noised latent scaled by c_in -> [B, C, h, w]."""
        angle = 2 * math.pi * c_noise[:, None] * self.fourier  # [B, cond / 2]
        actions = self.action_embedding(act_hist).flatten(1)  # [B, cond]
        with torch.autocast(z_in.device.type, torch.bfloat16, enabled=bool(self.args.bf16)):
            cond = self.cond_mlp(torch.cat([angle.cos(), angle.sin()], 1) + actions)  # [B, cond]
            x = self.conv_in(torch.cat([z_hist.flatten(1, 2) / self.args.sigma_data, z_in], 1))  # [B, width, h, w]
            y = self.down(x, cond)
            h = self.mid1(y, cond)
            v = self.norm_mid(h).flatten(2).transpose(1, 2)  # [B, h * w, width]
            h = self.mid2(h + self.attention(v, v, v, need_weights=False)[0].transpose(1, 2).reshape(h.shape), cond)
            h = self.up2(torch.cat([self.up1(torch.cat([h, y], 1), cond), x], 1), cond)
            return self.conv_out(F.silu(self.norm_out(h))).float()

    def loss(self, z: Tensor, act: Tensor, real: Tensor) -> Tensor:
        """The self-consistency objective (2505.19698): n latents in a row. z [B, T, C, h, w]; act, real [B, T]; T >= L+n."""
        args, steps, loss = self.args, self.args.num_conditioning_steps, 0.0
        # Random switching, a fair coin per batch [P]: later steps see the denoiser's own latents, as in imagination, or E's
        feed_own = torch.rand((), device=z.device) < 0.5
        hist = list(z.unbind(1))  # not stopped: the encoder learns through the condition alone
        for i in range(args.num_autoregressive_steps):
            z_hist = torch.stack(hist[i : i + steps], 1)  # [B, L, C, h, w]
            z_next = z[:, steps + i].detach()  # [B, C, h, w] stop-gradient on the target
            sigma = (torch.randn(len(z), device=z.device) * 1.2 - 0.4).exp().clamp(2e-3, 20)  # [B] P_std, P_mean [D]
            z_noisy = z_next + sigma[:, None, None, None] * torch.randn_like(z_next)
            c_in, c_out, c_skip, c_noise = self.precondition(sigma)
            output = self.unet(c_in * z_noisy, c_noise, z_hist, act[:, i : i + steps])
            target = (z_next - c_skip * z_noisy) / c_out  # Karras et al. 2022, Eq. 8 with lambda(sigma) = 1 / c_out^2
            error = (output - target).square().mean((1, 2, 3))  # [B]
            loss = loss + masked_mean(error, real[:, steps + i]) / args.num_autoregressive_steps
            # DEVIATES: a clamp, not C(z) = s tanh(z / s), which again at every imagined step would shrink z without end
            denoised = (c_skip * z_noisy + c_out * output).detach().clamp(-args.latent_bound, args.latent_bound)
            hist[steps + i] = torch.where(feed_own, denoised, hist[steps + i])
        return loss

    @torch.no_grad()
    def sample(self, z_hist: Tensor, act_hist: Tensor, noise: Tensor) -> Tensor:
        """The next latent [B, C, h, w] from unit noise. Karras et al. 2022, Algorithm 2: Euler steps, no churn."""
        z = self.sigmas[0] * noise  # DEVIATES: from sigma 5 and unit noise, as in DIAMOND, what is rare is hardly ever drawn
        for sigma, sigma_next in zip(self.sigmas, self.sigmas[1:]):
            c_in, c_out, c_skip, c_noise = self.precondition(torch.full((len(z),), sigma, device=z.device))
            denoised = c_skip * z + c_out * self.unet(c_in * z, c_noise, z_hist, act_hist)
            z = z + (sigma_next - sigma) * ((z - denoised) / sigma)
        return z.clamp(-self.args.latent_bound, self.args.latent_bound).contiguous()


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
    rew, end [B, H], value [B, H+1] -> [B, H]. An end stops the return; the horizon, a truncation, bootstraps."""
    returns, following = [], value[:, -1]
    for t in reversed(range(rew.shape[1])):
        following = rew[:, t] + gamma * (1 - end[:, t]) * ((1 - lambda_) * value[:, t + 1] + lambda_ * following)
        returns.append(following)
    return torch.stack(returns[::-1], 1)


# ---------------------------------------------------------------------------------------------------------- Imagination
class Agent(nn.Module):
    def __init__(self, args: Args, num_actions: int):
        super().__init__()
        self.args, self.num_actions = args, num_actions
        self.encoder, self.denoiser = Encoder(args), Denoiser(args, num_actions)
        self.reward_end, self.actor_critic = RewardEndModel(args, num_actions), ActorCritic(args, num_actions)
        self.register_buffer("ent_coef", torch.tensor(args.ent_coef), persistent=False)  # it falls with the learning rates
        self.to(memory_format=torch.channels_last)  # the layout in which convolutions run fastest


class Rollout(NamedTuple):  # L context frames followed by H imagined ones
    z: Tensor  # [B, L+H, C, h, w]
    real: Tensor  # [B, L+H] bool, False only for padding before an episode's start
    act: Tensor  # [B, H] taken at frames L-1 .. L+H-2
    rew: Tensor  # [B, H] expected sign of the reward
    end: Tensor  # [B, H] sampled end, 0 or 1


@torch.no_grad()
def imagine_step(agent: Agent, z_hist: Tensor, act_hist: Tensor, policy_state, model_state, act: Tensor | None = None):
    """One step of policy and world model, from the last L latents [B, L, C, h, w] and the L-1 actions between them [B, L-1].
    -> z_next [B, C, h, w], (act, rew, end [B]), new LSTM states. With `act` [B] the policy is not asked."""
    z_now = z_hist[:, -1:]  # [B, 1, C, h, w]
    if act is None:
        logits, _, policy_state = agent.actor_critic(z_now, None, policy_state)
        act = F.gumbel_softmax(logits[:, 0]).argmax(1)  # [B] a sample; torch.multinomial would wait for the device
    z_next = agent.denoiser.sample(z_hist, torch.cat([act_hist, act[:, None]], 1), torch.randn_like(z_now[:, 0]))
    rew_logits, end_logits, model_state = agent.reward_end(z_now, act[:, None], z_next[:, None], None, model_state)
    # DEVIATES: the reward is R's expectation, not a sample: the same in the mean, and a rare reward is no longer noise
    minus, _, plus = rew_logits[:, 0].softmax(-1).unbind(-1)  # [B]
    end = F.gumbel_softmax(end_logits[:, 0]).argmax(1).float()  # [B]
    return z_next, (act, plus - minus, end), policy_state, model_state


@torch.no_grad()
def imagine(agent: Agent, z: Tensor, act: Tensor, real: Tensor, horizon: int, actions=None, step=imagine_step) -> Rollout:
    """Rolls policy and world model H steps from the contexts z [B, L, C, h, w], act [B, L] (the last one unused), real [B, L].
    With `actions` [B, H] the policy is not asked. `step` may be compiled; what a graph returns must be copied at once."""
    steps, zs, acts, records = z.shape[1], list(z.unbind(1)), list(act[:, :-1].unbind(1)), []
    policy_state = agent.actor_critic(z[:, :-1], real[:, :-1])[-1]  # both LSTMs burn in on the context
    states = policy_state, agent.reward_end(z[:, :-1], act[:, :-1], z[:, 1:], real[:, :-1])[-1]
    for t in range(horizon):
        z_hist, act_hist = torch.stack(zs[-steps:], 1), torch.stack(acts[1 - steps :], 1)  # [B, L, C, h, w], [B, L-1]
        given = None if actions is None else actions[:, t]  # [B]
        z_next, record, *states = pytree.tree_map(torch.clone, step(agent, z_hist, act_hist, *states, given))
        zs, acts, records = [*zs, z_next], [*acts, record[0]], [*records, record]
    real = torch.cat([real, real.new_ones(len(real), horizon)], 1)  # [B, L+H]
    return Rollout(torch.stack(zs, 1), real, *(torch.stack(x, 1) for x in zip(*records)))


# ---------------------------- Losses: tensors in, a loss and a dict of detached tensors out. No host sync, fixed shapes
def world_model_loss(agent: Agent, batch: Batch) -> tuple[Tensor, dict]:
    """Diffusion, reward and end loss on segments with L-1 frames before the anchor and H+1 after it. All reach the encoder."""
    # DEVIATES: one batch, encoded once, feeds both losses; DIAMOND draws one for each
    args, z = agent.args, agent.encoder(batch.obs, batch.real)  # [B, T, C, h, w]
    diffusion_loss = agent.denoiser.loss(z, batch.act, batch.real)
    # DEVIATES: R learns from noised latents. Else it reads, and teaches the encoder to write, traits too faint for the
    # denoiser to imagine: on Catch it knew every near miss from real latents and took 84 % of the imagined ones for catches
    z = z + args.reward_end_noise * args.sigma_data * torch.randn_like(z)
    act, rew, end, step = (x[:, :-1] for x in (batch.act, batch.rew, batch.end, batch.step))  # [B, T-1]
    rew_logits, end_logits, _ = agent.reward_end(z[:, :-1], act, z[:, 1:], step)
    reward_loss = masked_mean(F.cross_entropy(rew_logits.transpose(1, 2), rew.long() + 1, reduction="none"), step)
    end_loss = masked_mean(F.cross_entropy(end_logits.transpose(1, 2), end, reduction="none"), step)
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
    alive = torch.cat([torch.ones_like(rollout.end[:, :1]), 1 - rollout.end[:, :-1]], 1).cumprod(1).bool()  # [B, H]
    log_probs = logits.log_softmax(-1)  # [B, H, A]
    log_prob = log_probs.gather(-1, rollout.act[..., None]).squeeze(-1)  # [B, H]
    entropy = masked_mean(-(log_probs.exp() * log_probs).sum(-1), alive)
    policy_loss = masked_mean(-log_prob * (returns - value[:, :-1]).detach(), alive)
    value_loss = masked_mean((value[:, :-1] - returns).square(), alive)
    logs = {"losses/policy": policy_loss, "losses/value": value_loss, "losses/entropy": entropy}
    logs |= {"imagination/return": (rollout.rew * alive).sum(1).mean(), "imagination/value": masked_mean(value[:, :-1], alive)}
    return policy_loss + value_loss - agent.ent_coef * entropy, {k: v.detach() for k, v in logs.items()}


@torch.no_grad()
def measure(agent: Agent, batch: Batch) -> dict[str, float]:
    """Imagination beside reality on real segments, under the real actions. error_h: squared latent error h steps ahead over
    that of "no change". rewards_found, no_reward_found, ends_found: share of the real ones that imagination has in that step.
    moving_std, change_rms: of the latent less its mean picture, of its change. effective_rank: its (Roy & Vetterli 2007)."""
    steps, horizon = agent.args.num_conditioning_steps, agent.args.horizon
    z = agent.encoder(batch.obs)  # [B, L+H+1, C, h, w]
    act, rew, end, step = (x[:, steps - 1 : steps - 1 + horizon] for x in (batch.act, batch.rew, batch.end, batch.step))
    rollout = imagine(agent, z[:, :steps], batch.act[:, :steps], batch.real[:, :steps], horizon, actions=act)
    z_real, real = z[:, steps : steps + horizon], batch.real[:, steps : steps + horizon]  # [B, H, C, h, w], [B, H]
    error = (rollout.z[:, steps:] - z_real).square().mean((2, 3, 4)) * real  # [B, H]
    no_change = (z[:, steps - 1 : steps] - z_real).square().mean((2, 3, 4)) * real  # [B, H]
    logs = {f"world_model/error_{h}": error[:, h - 1].sum() / no_change[:, h - 1].sum() for h in (1, min(5, horizon), horizon)}
    right, ended = (1 - (rollout.rew - rew).abs()).clamp(min=0), (rollout.end == end).float()  # [B, H]
    classes = {"rewards_found": (right, rew != 0), "no_reward_found": (right, rew == 0), "ends_found": (ended, end == 1)}
    for name, (found, real_class) in classes.items():
        logs[f"world_model/{name}"] = (found * (real_class & step)).sum() / (real_class & step).sum()
    moving, both = (z - z.mean((0, 1)))[batch.real], batch.real[:, 1:] & batch.real[:, :-1]
    s = torch.linalg.svdvals(moving[:1000].flatten(1).cpu())  # not every device can
    logs["latent/effective_rank"] = torch.special.entr(s / s.sum()).sum().exp()
    logs["latent/moving_std"], logs["latent/change_rms"] = moving.std(), (z[:, 1:] - z[:, :-1])[both].square().mean().sqrt()
    return {name: float(value) for name, value in logs.items()}


# ------------------------------------------------------------------------------------------- Score, files, stop signal
STOP = []  # the signal that asks for it


def stop(number: int, frame) -> None:
    """On the command line the first Ctrl-C or SIGTERM stops the run after the current update; a second one kills it."""
    STOP.append(number)
    signal.signal(number, signal.SIG_DFL)
    print("\nstopping after this update, with a checkpoint (once more: at once, without one)", flush=True)


@torch.no_grad()
def evaluate_policy(agent: Agent, env_id: str, num_episodes: int, seed: int) -> dict:
    """Full games with the sampled policy, epsilon 0: one environment a game, all at once, so no bias to short ones. -> content
    of result.json: `returns`, unclipped, `lengths` in agent steps, and all that tells with what they may be compared."""
    torch.manual_seed(seed)
    args, device, games, said = agent.args, next(agent.parameters()).device, [None] * num_episodes, 0.0
    envs = [make_env(env_id, seed + i, args.image_size) for i in range(num_episodes)]
    obs, state = np.stack([env.reset()[0] for env in envs]), None
    while None in games:
        z = agent.encoder(torch.from_numpy(obs).to(device)[:, None])  # [N, 1, C, h, w]
        logits, _, state = agent.actor_critic(z, None, state)  # [N, 1, A]
        actions = F.gumbel_softmax(logits[:, 0]).argmax(1).tolist()
        for i in [i for i, game in enumerate(games) if game is None]:
            obs[i], _, terminated, truncated, info = envs[i].step(actions[i])
            games[i] = info["episode"] if terminated or truncated else None
        if STOP:
            raise KeyboardInterrupt
        if time.time() - said > 10:
            print(f"  {num_episodes - games.count(None)}/{num_episodes} games played", flush=True)
            said = time.time()
    returns, atari = [float(game["r"]) for game in games], "lives" in info
    protocol = {
        "episodes": num_episodes, "policy": "sampled", "temperature": 1.0, "epsilon": 0.0, "noop_max": NOOP_MAX * atari,
        "frame_skip": FRAME_SKIP if atari else 1, "sticky_actions": envs[0].spec.kwargs.get("repeat_action_probability", 0.0),
        "checkpoint": "last", "life_loss_ends_episode": False, "reward_clipping": False, "eval_seed": seed,
    }  # fmt: skip
    return {name: getattr(args, name) for name in ("env_id", "exp_name", "seed", "preset", "device")} | {
        "game": game_name(env_id), "returns": returns, "lengths": [int(game["l"]) for game in games], "protocol": protocol,
        "mean_return": float(np.mean(returns)), "std_return": float(np.std(returns)),
        "versions": {package.__name__: package.__version__ for package in (torch, gym, ale_py, np)},
    }  # fmt: skip


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
        raise UsageError(f"{path}: not written, the previous one is intact ({error!r:.99})") from None


def load_checkpoint(run_dir: pathlib.Path) -> dict:
    """The state of a trainer. Raises UsageError unless there is a whole one."""
    try:
        return torch.load(pathlib.Path(run_dir, "ckpt.pt"), map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"{run_dir}/ckpt.pt: no whole checkpoint there ({error!r:.99}); restore it or delete it") from None


# ------------------------------------------------- The run: what a checkpoint holds, the directory, the loop over its phases
PHASES = ("collect", "world_model", "actor_critic")  # of an epoch, in their order


class Trainer:
    """Networks, optimizers, replay, counters, random state; kept in <runs-dir>/<game>__<exp-name>__<seed> with the script,
    args.json, metrics.jsonl and, once all has ended, result.json. `advance` is one agent step or one update."""

    COUNTERS = "stage done seconds sums measured log_size returns".split()

    def __init__(self, args: Args, num_actions: int, device: torch.device):
        torch.manual_seed(args.seed)  # the one source of randomness besides the emulator's
        self.args, self.device, self.env = args, device, None
        self.dir = pathlib.Path(args.runs_dir, f"{game_name(args.env_id)}__{args.exp_name}__{args.seed}")
        self.agent, self.buffer = Agent(args, num_actions).to(device), ReplayBuffer(args, device)
        rate, (clip, *clips), (warmup, late) = args.learning_rate, args.max_grad_norm, args.warmup_updates
        columns = dict(  # encoder, denoiser, R, actor-critic. power: of the decay; the encoder rests before those that read it
            params=[list(network.parameters()) for network in self.agent.children()], warmup=(late, warmup, warmup, warmup),
            rate=(rate * args.encoder_lr_scale, rate, rate, rate), clip=(clip, clip, *clips), power=(2, 1, 1, 1),
            name=("encoder", "denoiser", "reward_end", "actor_critic"), weight_decay=(1e-2, 1e-2, 1e-2, 0.0),
        )  # fmt: skip
        groups = [dict(zip(columns, row)) for row in zip(*columns.values())]
        adamw = functools.partial(torch.optim.AdamW, fused=device.type in ("cpu", "cuda"))
        self.optimizers = {"world_model": adamw(groups[:3]), "actor_critic": adamw(groups[3:])}
        self.parts = {"agent": self.agent, "replay": self.buffer} | self.optimizers
        self.random = torch if device.type == "cpu" else torch.get_device_module(device)  # has get_rng_state, set_rng_state
        self.plan = dict(zip(PHASES, (args.collect_steps, args.world_model_updates, args.actor_critic_updates)))
        self.num_epochs = 1 + math.ceil((args.total_steps - args.collect_steps[0]) / args.collect_steps[1]) + args.final_epochs
        self.stage, self.done, self.seconds = 0, dict.fromkeys(PHASES, 0), 0.0  # phases, agent steps or updates that are done
        # Logs of the phase's updates, measurements of the epoch, returns of the newest 10 training games
        self.sums, self.measured, self.returns, self.log_size = {}, {}, [], 0
        self.accelerate(device.type == "cuda" if args.compile is None else args.compile)

    def accelerate(self, fast: bool) -> None:
        """Compiled functions, on CUDA with their kernels in graphs; or eager, the reference."""
        functions, self.fast = (world_model_loss, imagine_step, actor_critic_loss), fast
        if fast:  # one imagined step: unrolled over H of them, a graph would take many minutes to compile
            functions = (torch.compile(f, fullgraph=True, dynamic=False, mode="reduce-overhead") for f in functions)
        self.world_model_loss, self.imagine_step, self.actor_critic_loss = functions

    def amount(self, phase: str, epoch: int) -> int:
        """Agent steps or updates of a phase that are done by the end of an epoch (0, 1, ...; -1: before the first)."""
        (first, later), limit = self.plan[phase], self.args.total_steps if phase == "collect" else math.inf
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
            self.env = make_env(self.args.env_id, self.args.seed + self.done["collect"], self.args.image_size)
            self.game_over = self.end = True
        if self.game_over:
            self.obs, info = self.env.reset()
            self.lives = info.get("lives", 0)
        if self.end:
            self.lstm_state = None
            self.buffer.add(self.obs)
        z = self.agent.encoder(torch.from_numpy(self.obs).to(self.device)[None, None])  # [1, 1, C, h, w]
        logits, _, self.lstm_state = self.agent.actor_critic(z, None, self.lstm_state)  # [1, 1, A]
        act = int(F.gumbel_softmax(logits * (torch.rand((), device=self.device) >= self.args.epsilon)).argmax())
        self.obs, rew, terminated, truncated, info = self.env.step(act)
        life_lost, self.lives = info.get("lives", 0) < self.lives, info.get("lives", 0)
        self.buffer.add(self.obs, act, float(rew), terminated or life_lost)
        self.game_over, self.end = terminated or truncated, terminated or truncated or life_lost
        return info.get("episode")

    def update(self, phase: str) -> None:
        """One step of the world model (encoder, denoiser, reward/end model), or of the actor-critic; its logs go to `sums`."""
        k, total, optimizer = self.done[phase], self.amount(phase, self.num_epochs - 1), self.optimizers[phase]
        decay = min(1.0, (total - k) / (self.args.lr_decay * total)) if self.args.lr_decay else 1.0
        self.agent.ent_coef.fill_(self.args.ent_coef * decay**2)
        optimizer.zero_grad()
        try:
            logs = self.compute_gradients(phase)
        except Exception as error:
            if not self.fast:
                raise
            while error.__context__:  # what is raised on the way out may hide the cause
                error = error.__context__
            reason = f"--compile failed: {type(error).__name__}: {error}".splitlines()[0]
            if self.args.compile:
                raise UsageError(reason) from error
            print(f"note: {reason}; going on without, which is slower", flush=True)
            self.accelerate(False)
            return self.update(phase)
        for group in optimizer.param_groups:
            logs[f"grad_norm/{group['name']}"] = nn.utils.clip_grad_norm_(group["params"], group["clip"])
            group["lr"] = group["rate"] * decay ** group["power"] * min(1.0, (k + 1) / max(1, group["warmup"]))
        optimizer.step()
        self.sums = {key: self.sums.get(key, 0) + value for key, value in logs.items()}

    def batch(self, phase: str, generator: torch.Generator | None = None) -> Batch:
        """L-1 frames and an anchor, from which the actor-critic imagines; for the world model H+1 frames more."""
        after = self.args.horizon + 1 if phase == "world_model" else 0
        return self.buffer.sample(self.args.batch_size, self.args.num_conditioning_steps - 1, after, generator)

    def compute_gradients(self, phase: str) -> dict[str, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()  # a graph may now overwrite what it left behind in the last update
        batch = self.batch(phase)
        if phase == "world_model":
            loss, logs = self.world_model_loss(self.agent, batch)
        else:
            with torch.no_grad():
                z = self.agent.encoder(batch.obs)  # [B, L, C, h, w]
            rollout = imagine(self.agent, z, batch.act, batch.real, self.args.horizon, step=self.imagine_step)
            loss, logs = self.actor_critic_loss(self.agent, rollout)
        loss.backward()
        return logs

    @torch.no_grad()
    def refresh(self) -> None:
        """The encoder's statistics over 20 batches, from a generator of its own: doing it twice changes nothing."""
        generator, encoder = torch.Generator(self.device).manual_seed(self.stage // 3), self.agent.encoder
        batches = (self.batch("world_model", generator) for _ in range(20))
        statistics = zip(*(encoder.statistics(encoder.features(batch.obs), batch.real) for batch in batches))
        for buffer, values in zip((encoder.center, encoder.scale), statistics):
            buffer.copy_(torch.stack(values).mean(0))

    def open(self) -> dict | None:
        """Goes on from a checkpoint. Returns the result of a finished run. Raises UsageError for another run's directory."""
        self.dir.mkdir(parents=True, exist_ok=True)
        result, log, script = self.dir / "result.json", self.dir / "metrics.jsonl", self.dir / SCRIPT.name
        asked = json.loads(json.dumps(vars(self.args) | {"device": self.device.type}))
        if not (begun := (self.dir / "ckpt.pt").exists()) and not result.exists():
            script.write_bytes(SCRIPT.read_bytes())
            (self.dir / "args.json").write_text(json.dumps(asked, indent=1))
            log.write_text("")
        kept, remedy = json.loads((self.dir / "args.json").read_text()), "change --exp-name or --seed, or delete it"
        if not script.exists() or script.read_bytes() != SCRIPT.read_bytes():
            raise UsageError(f"{self.dir} holds a run of another script; {remedy}")
        for name, value in asked.items():
            if value != kept.get(name) and name not in ("compile", "runs_dir", "checkpoint_minutes", "track"):
                other = f"--{name.replace('_', '-')} {kept.get(name)}, not {value}"
                raise UsageError(f"{self.dir} holds a run with {other}; {remedy}")
        if result.exists():
            return json.loads(result.read_text())
        if begun:
            state = load_checkpoint(self.dir)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.random.set_rng_state(state["rng"])
            vars(self).update({name: state[name] for name in self.COUNTERS})
            os.truncate(log, min(log.stat().st_size, self.log_size))  # forgets what was logged after the checkpoint
        init = importlib.import_module("wandb").init if self.args.track else lambda **_: None
        self.wandb = init(project="jedi", name=self.dir.name, id=self.dir.name, resume="allow", config=vars(self.args))

    def log(self, metrics: dict[str, float]) -> None:
        with open(self.dir / "metrics.jsonl", "a") as file:
            known = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
            print(json.dumps({"global_step": self.done["collect"]} | known), file=file)
            self.log_size = file.tell()
        if self.wandb:
            self.wandb.log(metrics, step=self.done["collect"])

    def train(self) -> None:
        """All epochs of three phases: collect and measure imagination, train the world model, train the actor-critic. Raises
        UsageError at the first NaN or inf, and KeyboardInterrupt once a signal has come."""
        saved = said = mark = time.time()
        while self.stage < 3 * self.num_epochs:
            epoch, phase = self.stage // 3, PHASES[self.stage % 3]
            before, target = self.amount(phase, epoch - 1), self.amount(phase, epoch)
            while self.done[phase] < target:
                if game := self.advance(phase):
                    self.returns = [*self.returns, float(game["r"])][-10:]
                    self.log({"charts/episodic_return": float(game["r"]), "charts/episodic_length": int(game["l"])})
                signalled, now = bool(STOP), time.time()
                self.seconds, mark = self.seconds + now - mark, now
                due = signalled or now - saved > 60 * self.args.checkpoint_minutes
                if due or now - said > 10 or self.done[phase] == target:
                    self.report(f"epoch {epoch + 1}/{self.num_epochs} {phase} {self.done[phase]:,}/{target:,}")
                    said = now
                if due:
                    self.checkpoint()
                    saved = now
                if signalled:
                    raise KeyboardInterrupt
            metrics = {key: float(value) / (target - before) for key, value in self.sums.items()}
            if phase == "world_model" or not self.stage:
                self.refresh()
            if phase == "collect" and target > before:  # on new steps, which no update has seen; the last frame has no action
                newest, sizes = min(1000, target - before) + 1, (self.args.num_conditioning_steps - 1, self.args.horizon + 1)
                metrics = self.measured = measure(self.agent, self.buffer.sample(64, *sizes, newest=newest))
                if epoch and metrics["world_model/error_1"] > 1:
                    print("warning: imagination is worse than 'no change': the policy learns from a wrong world")
                if metrics["latent/change_rms"] < 0.05 * self.args.sigma_data:
                    print("warning: hardly anything moves in the latent: the encoder is collapsing")
            self.stage, self.sums = self.stage + 1, {}
            self.log(metrics | {"charts/epoch": epoch + 1, "charts/hours": self.seconds / 3600})

    def report(self, place: str) -> None:
        """What is done, what remains, how it goes. Raises UsageError if a loss is not finite."""
        for key, value in self.sums.items():
            if not torch.isfinite(value):  # a sum never forgets it
                raise UsageError(f"{key} is {float(value)} at {place}, or shortly before; lower the learning rate")
        planned = sum(self.amount(phase, self.num_epochs - 1) for phase in PHASES[1:])  # updates, which take nearly all time
        done = self.done["world_model"] + self.done["actor_critic"]
        to_go = f"{self.seconds / 60 * (planned / done - 1):,.1f}" if done else "?"
        error, found = (self.measured.get(f"world_model/{key}", math.nan) for key in ("error_1", "rewards_found"))
        known = f"return {np.mean(self.returns or math.nan):.2f} error {error:.2f} rewards found {found:.2f}"
        print(f"{place}, {to_go} min to go | {known}", flush=True)

    def checkpoint(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()} | {"rng": self.random.get_rng_state()}
        state |= {name: getattr(self, name) for name in self.COUNTERS}
        write(self.dir / "ckpt.pt", lambda file: torch.save(state, file))


# ------------------------------------------------------------------------------------------------ Main and command line
def main(args: Args) -> dict:
    """Trains, evaluates and returns the content of result.json. Raises UsageError, or KeyboardInterrupt after a signal."""
    check_args(args)
    STOP.clear()
    try:
        device = torch.zeros(1, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {args.device}: not available, try --device cpu ({str(error).splitlines()[0]})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams and graphs live on the current device
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: keep large freed blocks; glibc would give them back and zero their pages anew
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
    torch.set_float32_matmul_precision("high")  # on CUDA, TF32 for what --bf16 leaves in float32
    torch.backends.cudnn.benchmark = True  # shapes are fixed: try all convolution kernels once, keep the fastest
    args = dataclasses.replace(args, device=str(device), bf16=device.type == "cuda" if args.bf16 is None else args.bf16)
    env = make_env(args.env_id, args.seed, args.image_size)
    if sticky := env.spec.kwargs.get("repeat_action_probability"):
        print(f"warning: {args.env_id} repeats the last action with probability {sticky}: its scores are not Atari 100k")
    if args.preset == "paper" and device.type == "cpu":
        print("warning: the paper preset takes weeks on a CPU; --preset small takes minutes")
    run = Trainer(args, int(env.action_space.n), device)
    if result := run.open():
        print(f"{run.dir} has finished: score {result['mean_return']:.2f}. For another run change --seed or --exp-name")
        return result
    sizes = ", ".join(f"{name} {sum(p.numel() for p in net.parameters()):,}" for name, net in run.agent.named_children())
    print(f"{run.dir}: {args.preset} preset, {device}, {args.total_steps:,} steps, parameters {sizes}", flush=True)
    run.train()
    run.checkpoint()
    start = time.time()
    result = evaluate_policy(run.agent, args.env_id, args.eval_episodes, args.seed + 10_000)
    result |= {"global_step": args.total_steps, "wall_time_s": run.seconds + time.time() - start}
    write(run.dir / "result.json", lambda file: file.write(json.dumps(result, indent=1).encode()))
    mean, std, minutes = result["mean_return"], result["std_return"], result["wall_time_s"] / 60
    run.log({"eval/episodic_return": mean, "eval/episodic_return_std": std})
    print(f"score {mean:.2f} +- {std:.2f} (std of {args.eval_episodes} full games), {minutes:,.1f} min; {run.dir}", flush=True)
    with contextlib.suppress(ImportError, AttributeError, KeyError):  # no such file here, or a game that is no Atari game
        random, human, *_ = importlib.import_module("evaluate").SCORES[result["game"]]
        print(f"random play scores {random}, a human {human}: {(mean - random) / (human - random):.0%} of the way; README.md")
    return result


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args: defaults < preset < flags. Without --preset it is paper on CUDA, else small."""
    words = " ".join(sys.argv[1:] if argv is None else argv).replace("=", " ").split()
    given = dict(zip(words, words[1:]))
    preset = given.get("--preset", "paper" if given.get("--device", Args.device).startswith("cuda") else "small")
    return tyro.cli(Args, args=argv, default=Args(preset=preset, **(SMALL if preset == "small" else {})))


def cli(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        main(parse_args(argv))
        return 0
    except KeyboardInterrupt:
        print(f"stopped, with a checkpoint; the same command goes on from there: python {shlex.join(sys.argv)}")
        return 128 + STOP[0]
    except (UsageError, OSError, ImportError, NotImplementedError) as error:  # the last: Apple's MPS lacks some operations
        install = f": pip install {error.name}" if isinstance(error, ImportError) else ""  # --track without wandb
        print(f"error: {str(error).splitlines()[0]}{install}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(cli())
