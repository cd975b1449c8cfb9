"""Does imagination obey Breakout? Trains the world model alone and holds imagination beside the emulator.

    python tests/breakout_imagination.py --updates 1000                       # six minutes of one core
    python tests/breakout_imagination.py --updates 1000 --encoder-lr-scale 0  # its frozen twin

The recorded player follows the ball in half of its steps and is random in the others. On a held-out
recording the script imagines 15 steps under the real actions and prints:

    latent    squared error of the imagined latent over that of "nothing changes"
    paddle    distance from the emulator's paddle x, ball x and ball y (RAM 72, 99, 101), in RAM pixels. A
              ridge regression reads the paddle from a latent, a small network the ball; both are fitted
              on real latents of the training recording. Three numbers: from the imagined latent / no
              change / from the real latent, which tells how well the reader reads.
    push      how far apart 5 x LEFT and 5 x RIGHT move the imagined paddle, over what the emulator does
    AUC       area under the ROC curve of what R expects: of rewards and of ends, on real latents, and on
              latents that are imagined 1, 3 and 6 steps ahead

The preset is `small` with 64 x 64 pixels; every flag of jedi.py works. On a CPU a seed determines the numbers.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jedi  # noqa: E402

PADDLE, BALL_X, BALL_Y = 72, 99, 101  # addresses in the emulator's RAM
NAMES = ["paddle", "ball x", "ball y"]
NOOP, FIRE, RIGHT, LEFT = range(4)
STEPS = 15  # imagined steps
SHOWN_STEPS = [1, 5, 15]
REWARD_STEPS = [1, 3, 6]


@dataclass
class ProbeArgs(jedi.Args):
    updates: int = 1_000  # of the world model
    eval_every: int = 500  # updates between two measurements
    frames: int = 20_000  # steps of the training recording; the held-out one has a fifth of them
    out: str | None = None  # JSON lines to which the measurements are appended


@dataclass
class Recording:
    replay: jedi.ReplayBuffer
    ram: torch.Tensor  # [slots, 3] paddle x, ball x, ball y
    branches: torch.Tensor  # [N, 3] a slot, and the paddle after 5 x LEFT and after 5 x RIGHT from there


def record(args, num_steps, seed, branch):
    """Plays `num_steps` steps. With `branch` it also tries LEFT and RIGHT from every twentieth step."""
    env = jedi.make_env("BreakoutNoFrameskip-v4", seed, args.image_size)
    ale = env.unwrapped.ale
    rng = np.random.default_rng(seed)
    replay = jedi.ReplayBuffer(replace(args, total_steps=num_steps), torch.device("cpu"))
    ram = []
    branches = []

    def read_ram():
        memory = ale.getRAM()
        return [int(memory[PADDLE]), int(memory[BALL_X]), int(memory[BALL_Y])]

    def paddle_after(action):
        saved = ale.cloneState()
        for _ in range(5 * jedi.FRAME_SKIP):
            ale.act(env.unwrapped._action_set[action])
        paddle = read_ram()[0]
        ale.restoreState(saved)
        return paddle

    game_over = True
    end = True
    for step in range(num_steps):
        if game_over:
            obs, info = env.reset()
        if end:
            lives = info["lives"]
            replay.start_episode(obs)
            ram.append(read_ram())
        paddle, ball_x, ball_y = ram[-1]
        if branch and step % 20 == 0 and ball_y > 0:
            branches.append([replay.size - 1, paddle_after(LEFT), paddle_after(RIGHT)])
        action = NOOP
        if ball_y == 0:
            action = FIRE
        elif ball_x < paddle - 4:
            action = LEFT
        elif ball_x > paddle + 4:
            action = RIGHT
        if rng.random() < 0.5:
            action = int(rng.integers(4))
        obs, reward, terminated, truncated, info = env.step(action)
        game_over = terminated or truncated
        life_lost = info["lives"] < lives
        end = game_over or life_lost
        replay.add(action, reward, terminated or life_lost, obs)
        ram.append(read_ram())
    env.close()
    return Recording(replay, torch.tensor(ram).float(), torch.tensor(branches))


@torch.no_grad()
def encode(agent, obs):
    """Frames [..., 3, S, S] -> latents [..., C, h, w], in parts."""
    frames = obs.flatten(0, -4)
    parts = [agent.encoder(part) for part in frames.split(256)]
    return torch.cat(parts).unflatten(0, obs.shape[:-3])


def fit_paddle(agent, recording):
    """Fits a ridge regression that reads the paddle's x from latents [..., C, h, w]."""
    playing = torch.nonzero(recording.ram[:, 2] > 0).squeeze(1)  # the ball is in play
    x = encode(agent, recording.replay.data["obs"][playing]).flatten(1).double()
    y = recording.ram[playing, 0].double()
    x_mean = x.mean(0)
    gram = (x - x_mean).T @ (x - x_mean)
    ridge = 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weights = torch.linalg.solve(gram + ridge, (x - x_mean).T @ (y - y.mean()))
    return lambda z: ((z.flatten(-3).double() - x_mean) @ weights + y.mean()).float()


def fit_ball(agent, recording, epochs=12):
    """Fits a small convolutional network that reads ball x and ball y from latents [N, C, h, w]."""
    playing = torch.nonzero(recording.ram[:, 2] > 0).squeeze(1)
    x = encode(agent, recording.replay.data["obs"][playing])
    y = recording.ram[playing, 1:] / 100
    channels, height, width = x.shape[1:]
    net = nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.Conv2d(channels, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 32, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * height * width, 128),
        nn.ReLU(),
        nn.Linear(128, 2),
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(256):
            loss = (net(x[index]) - y[index]).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    net.eval()
    return lambda z: 100 * net(z)


def fit_reader(agent, recording):
    """Returns a function that reads [paddle x, ball x, ball y] from latents [N, C, h, w]."""
    read_paddle = fit_paddle(agent, recording)
    read_ball = fit_ball(agent, recording)
    return lambda z: torch.cat([read_paddle(z)[:, None], read_ball(z)], 1)


def roc_auc(score, positive):
    """Probability that a positive has a higher score than a negative; ties count half."""
    pos = score[positive]
    neg = score[~positive].sort().values
    if len(pos) == 0 or len(neg) == 0:
        return float("nan")
    below = torch.searchsorted(neg, pos)
    not_above = torch.searchsorted(neg, pos, right=True)
    return ((below + not_above).double().mean() / 2 / len(neg)).item()


@torch.no_grad()
def measure_rewards(agent, replay):
    """AUC of rewards and ends on 768 held-out segments, and R's mean expectation with and without a reward."""
    L = agent.args.num_conditioning_steps
    anchors = torch.nonzero(replay.data["has_act"][: replay.size - STEPS]).squeeze(1)
    anchors = anchors[torch.randperm(len(anchors))[:768]]
    batch = replay.sample(anchors, L - 1, STEPS)
    z = encode(agent, batch.obs)
    actions = batch.act[:, L - 1 : -1]
    rollout = jedi.imagine(agent, z[:, :L], batch.act[:, :L], batch.real[:, :L], STEPS, actions)
    result = {}
    for name, latents in {"real": z, "imagined": rollout.z}.items():
        rew_logits, end_logits, _ = agent.reward_end(latents, batch.act, batch.has_act)
        plus = rew_logits.softmax(-1)[..., 2]  # [B, L+H]
        end = end_logits.softmax(-1)[..., 1]
        steps = [0] if name == "real" else REWARD_STEPS
        for k in steps:
            t = L - 1 + k
            good = batch.has_act[:, t]
            rewarded = batch.rew[good, t] > 0
            key = name if name == "real" else f"{name} {k}"
            result[f"rewards AUC {key}"] = roc_auc(plus[good, t], rewarded)
            result[f"ends AUC {key}"] = roc_auc(end[good, t], batch.end[good, t] == 1)
            result[f"expected with a reward {key}"] = plus[good, t][rewarded].mean().item()
            result[f"expected without {key}"] = plus[good, t][~rewarded].mean().item()
    return result


@torch.no_grad()
def measure_motion(agent, recording, read):
    """Errors of the imagined latent and of what is read from it, and the push of opposite actions."""
    L = agent.args.num_conditioning_steps
    replay = recording.replay
    first = replay.data["first"]
    anchors = torch.arange(L, replay.size - STEPS - 1)
    window = anchors[:, None] + torch.arange(-L + 1, STEPS + 1)
    inside = (first[window] == first[anchors, None]).all(1)
    playing = (recording.ram[window, 2] > 0).all(1)
    anchors = anchors[inside & playing][::3][:256]
    batch = replay.sample(anchors, L - 1, STEPS)
    truth = recording.ram[anchors[:, None] + torch.arange(STEPS + 1)]  # [B, 1 + STEPS, 3]
    z = encode(agent, batch.obs)
    actions = batch.act[:, L - 1 : -1]
    imagined = jedi.imagine(agent, z[:, :L], batch.act[:, :L], batch.real[:, :L], STEPS, actions).z
    now = z[:, L - 1]
    change = (z[:, L] - now).square().mean().sqrt().item()
    result = {"contexts": len(anchors), "latent std": z.std().item(), "change rms": change}
    for h in SHOWN_STEPS:
        future = z[:, L - 1 + h]
        error = (imagined[:, L - 1 + h] - future).square().mean()
        result[f"latent {h}"] = (error / (now - future).square().mean()).item()
        from_imagined = (read(imagined[:, L - 1 + h]) - truth[:, h]).abs().mean(0).tolist()
        no_change = (truth[:, 0] - truth[:, h]).abs().mean(0).tolist()
        from_real = (read(future) - truth[:, h]).abs().mean(0).tolist()
        for i, name in enumerate(NAMES):
            result[f"{name} {h}"] = [from_imagined[i], no_change[i], from_real[i]]

    slots = recording.branches[:, 0]
    good = (slots >= L) & (first[slots] == first[slots - L + 1])
    branches = recording.branches[good]
    batch = replay.sample(branches[:, 0], L - 1, 0)
    z = encode(agent, batch.obs)
    paddles = []
    for action in (LEFT, RIGHT):
        actions = torch.full((len(z), 5), action)
        rollout = jedi.imagine(agent, z, batch.act, batch.real, 5, actions)
        paddles.append(read(rollout.z[:, -1])[:, 0])
    real_push = (branches[:, 2] - branches[:, 1]).float().mean()
    result["push"] = ((paddles[1] - paddles[0]).mean() / real_push).item()
    return result


def show(m):
    lines = [f"{m['updates']} updates, {m['minutes']:.1f} min, loss {m['loss']:.3f}, push {m['push']:.2f}"]
    lines.append(f"    latent std {m['latent std']:.3f}, change rms {m['change rms']:.3f}")
    for h in SHOWN_STEPS:
        line = f"    {h:2d} steps: latent {m[f'latent {h}']:.2f}"
        for name in NAMES:
            line += f", {name} " + "/".join(f"{x:.1f}" for x in m[f"{name} {h}"])
        lines.append(line)
    for kind in ("rewards", "ends"):
        imagined = ", ".join(f"{m[f'{kind} AUC imagined {k}']:.2f}" for k in REWARD_STEPS)
        lines.append(f"    {kind} AUC real {m[f'{kind} AUC real']:.2f}/imagined {imagined} at 1, 3, 6 steps")
    for key in ("real", "imagined 1", "imagined 3", "imagined 6"):
        pair = f"{m[f'expected with a reward {key}']:.3f}, without {m[f'expected without {key}']:.3f}"
        lines.append(f"    R expects, {key}: where a reward came {pair}")
    return "\n".join(lines)


def main(args):
    jedi.check_args(args)
    jedi.keep_freed_memory()
    args.final_epochs = 0
    args.total_steps = args.first_collect_steps
    args.first_world_model_updates = args.updates  # the learning rates are annealed over these
    torch.manual_seed(args.seed)
    agent = jedi.Agent(args, 4)
    optimizer, _, scheduler, _ = jedi.make_optimizers(agent, args)
    train = record(args, args.frames, args.seed, branch=False)
    held_out = record(args, args.frames // 5, args.seed + 1, branch=True)
    L = args.num_conditioning_steps
    seconds = 0.0
    losses = []
    measurements = []
    for update in range(1, args.updates + 1):
        start = time.perf_counter()
        batch = train.replay.sample(train.replay.anchors(args.batch_size), L - 1, args.horizon)
        loss, logs = jedi.world_model_loss(agent, batch)
        jedi.optimize(loss, optimizer, scheduler)
        seconds += time.perf_counter() - start
        losses.append(logs["losses/denoising"].item())
        if update % args.eval_every == 0 or update == args.updates:
            with torch.random.fork_rng():  # measuring does not change what follows
                torch.manual_seed(0)
                read = fit_reader(agent, train)
                numbers = {"updates": update, "minutes": seconds / 60, "loss": float(np.mean(losses[-100:]))}
                numbers |= {"seed": args.seed, "encoder_lr_scale": args.encoder_lr_scale}
                numbers |= measure_motion(agent, held_out, read)
                numbers |= measure_rewards(agent, held_out.replay)
            measurements.append(numbers)
            print(show(numbers), flush=True)
            if args.out:
                with open(args.out, "a") as file:
                    print(json.dumps(numbers), file=file)
    return measurements


if __name__ == "__main__":
    small = vars(jedi.PRESETS["small"]) | {"image_size": 64}
    main(tyro.cli(ProbeArgs, default=ProbeArgs(**small)))
