"""Where does an Atari run break? Measures the chain from frames to play, on fresh play.

    python tests/chain.py runs/BreakoutNoFrameskip-v4__jedi__1       # a few minutes of one core
    python tests/chain.py runs/<run> --out chain.json                # the numbers, too

The first link that breaks is the one to mend:

    (a) latents      how far they spread, how far they move in one step, and how far they move when
                     a part of the frame is painted over with the game's median frame
    (b) R, real      area under the ROC curve (AUC) of what R expects from real latents, and its
                     mean expectation where a reward or an end came, and where none came
    (c) imagined     squared error under the real actions over that of "nothing changes", of one
                     sample and of the mean of all samples: where the game is random, a sample is
                     as wrong as chance, twice.
                     push: two different actions, five times each, from the same state; the slope
                     of the imagined difference of latents on the emulator's. 1 is right, 0: actions
                     mean nothing.
                     What the emulator's RAM knows (Breakout, Boxing), read from latents by a small
                     network: its error from imagined latents / if nothing changes / from the real
                     latents
    (d) R, imagined  as (b), on latents that are imagined under the real actions
    (e) imagination  choice: one of two actions, H times, from the same state; the correlation of
                     the imagined difference of rewards (by sign) and of ends with the emulator's,
                     and the share of states where the two make a difference. A policy learns from
                     such differences alone.
                     The return of H steps, by sign, of the policy and of uniformly random actions
    (f) real play    the same from the same starts; and the mean return of a whole game, also of a
                     blind player, who draws actions as often as the policy takes them, without
                     looking

Links (c) and (d) over the updates of a run are error_1, error_H, rewards_read and rewards_found in
its metrics.jsonl.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluate import Run  # noqa: E402
from tests.ablations import encode  # noqa: E402

# addresses of positions in the emulator's RAM (Anand et al. 2019, arXiv 1906.08226)
RAM = {
    "Breakout": {"paddle x": 72, "ball x": 99, "ball y": 101},
    "Boxing": {"own x": 32, "own y": 34, "other x": 33, "other y": 35},
}
# what is painted over: from which to which share of the frame's height
REGIONS = {"Breakout": {"ball": (0.45, 0.89), "paddle": (0.89, 0.94)}}
PUSH_STEPS = 5
PUSH_EVERY = 20  # steps of play
SAMPLES = 4  # of imagination from the same start


@dataclass
class Play:
    """Recorded play. A row of `pushes` is a slot and two actions, each then taken H times."""

    replay: object  # jedi.ReplayBuffer
    ram: torch.Tensor  # [slots, N]
    returns: list  # of whole games
    pushes: torch.Tensor  # [P, 3]
    pushed: torch.Tensor  # [P, 2, 3, S, S] frames after PUSH_STEPS, or of the end before
    lasted: torch.Tensor  # [P] bool, no end in PUSH_STEPS
    outcomes: torch.Tensor  # [P, 2, 2] sum of the signs of rewards, and end, in H steps


def record(run, choose, num_steps, seed):
    """Plays by choose(obs, state) -> action, new state; counts a lost life as an end."""
    env = run.env
    ale = env.unwrapped.ale
    rng = np.random.default_rng(seed)
    replay = run.source.ReplayBuffer(replace(run.args, total_steps=num_steps), torch.device("cpu"))
    addresses = list(names_of(run.args.env_id, RAM).values())
    ram = []
    returns = []
    pushes = []
    pushed = []
    lasted = []
    outcomes = []

    def try_out(action):
        """Takes the action H times. Returns a frame, if it came before an end, [rewards, end]."""
        saved = ale.cloneState()
        rewards = 0.0
        for k in range(run.args.horizon):
            obs, rew, terminated, truncated, info = env.step(action)
            if k < PUSH_STEPS:
                frame = torch.from_numpy(obs)
            rewards += np.sign(rew)
            end = terminated or truncated or info["lives"] < lives
            if end:
                break
        ale.restoreState(saved)
        return frame, k >= PUSH_STEPS or not end, [rewards, float(end)]

    game_over = True
    end = True
    for step in range(num_steps):
        if game_over:
            obs, info = env.reset()
            game_return = 0.0
        if end:
            lives = info.get("lives", 0)
            state = None
            replay.start_episode(obs)
            ram.append(ale.getRAM()[addresses])
        if step % PUSH_EVERY == 0:
            pair = rng.choice(env.action_space.n, 2, replace=False)
            frame_a, lasted_a, outcome_a = try_out(int(pair[0]))
            frame_b, lasted_b, outcome_b = try_out(int(pair[1]))
            pushes.append([replay.size - 1, *pair.tolist()])
            pushed.append(torch.stack([frame_a, frame_b]))
            lasted.append(lasted_a and lasted_b)
            outcomes.append([outcome_a, outcome_b])
        act, state = choose(obs, state)
        obs, rew, terminated, truncated, info = env.step(act)
        game_over = terminated or truncated
        life_lost = info.get("lives", 0) < lives
        end = game_over or life_lost
        replay.add(act, rew, terminated or life_lost, obs)
        ram.append(ale.getRAM()[addresses])
        game_return += rew
        if game_over:
            returns.append(game_return)
    ram = torch.from_numpy(np.array(ram)).float()
    return Play(
        replay=replay,
        ram=ram,
        returns=returns,
        pushes=torch.tensor(pushes),
        pushed=torch.stack(pushed),
        lasted=torch.tensor(lasted),
        outcomes=torch.tensor(outcomes),
    )


def blind_player(replay):
    """Returns a player who draws actions as often as the recording has them, without looking."""
    taken = replay.data["act"][replay.data["has_act"]]
    counts = torch.bincount(taken).float()

    def choose(obs, state):
        return torch.multinomial(counts, 1).item(), None

    return choose


def names_of(env_id, table):
    """Returns the table's entry for the game, or an empty one."""
    for game, entry in table.items():
        if env_id.startswith(game):
            return entry
    return {}


def roc_auc(score, positive):
    """Probability that a positive has a higher score than a negative; ties count half."""
    pos = score[positive]
    neg = score[~positive].sort().values
    if len(pos) == 0 or len(neg) == 0:
        return float("nan")
    below = torch.searchsorted(neg, pos)
    not_above = torch.searchsorted(neg, pos, right=True)
    return ((below + not_above).double().mean() / 2 / len(neg)).item()


def mean_and_error(x):
    """Mean of x [N] and its standard error."""
    return [x.mean().item(), (x.std() / len(x) ** 0.5).item()]


def fit_reader(z, ram, epochs=12):
    """Fits a small convolutional network that reads RAM values [N, K] from latents [N, C, h, w]."""
    channels, height, width = z.shape[1:]
    net = nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.Conv2d(channels, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 32, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * height * width, 128),
        nn.ReLU(),
        nn.Linear(128, ram.shape[1]),
    )
    center = ram.mean(0)
    scale = ram.std(0)
    target = (ram - center) / scale
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs)
    for _ in range(epochs):
        for index in torch.randperm(len(z)).split(256):
            loss = (net(z[index]) - target[index]).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    net.eval().requires_grad_(False)
    return lambda latents: center + scale * net(latents)


def measure_latents(run, play):
    """Link (a)."""
    obs = play.replay.data["obs"][: play.replay.size]
    z = encode(run.agent, obs)
    follows = play.replay.data["has_act"][: play.replay.size - 1]
    moved = (z[1:] - z[:-1])[follows]
    result = {"std": z.std().item(), "change": moved.square().mean().sqrt().item()}
    some = obs[:: max(1, len(obs) // 256)]
    median = obs.float().median(0).values.to(torch.uint8)  # [3, S, S]
    regions = {"whole frame": (0.0, 1.0)} | names_of(run.args.env_id, REGIONS)
    for name, (top, bottom) in regions.items():
        rows = slice(round(top * run.args.image_size), round(bottom * run.args.image_size))
        painted = some.clone()
        painted[..., rows, :] = median[:, rows]
        moved = encode(run.agent, painted) - encode(run.agent, some)
        result[f"without {name}"] = moved.square().mean().sqrt().item()
    return result


def expectations(logits, batch, t):
    """What R's logits expect at frame t -> {kind: [AUC, mean where it came, mean elsewhere]}."""
    rew_logits, end_logits = logits
    good = batch.has_act[:, t]
    probs = rew_logits[good, t].softmax(-1)  # [N, 3] of -1, 0 and 1
    came = {
        "rewards": (1 - probs[:, 1], batch.rew[good, t] != 0),
        "ends": (end_logits[good, t].softmax(-1)[:, 1], batch.end[good, t] == 1),
    }
    result = {}
    for kind, (score, true) in came.items():
        result[kind] = [roc_auc(score, true), score[true].mean().item(), score[~true].mean().item()]
    return result


def choose_anchors(replay, horizon, generator):
    """Random steps, and up to 256 steps with a reward or an end at most `horizon` steps away."""
    last = replay.size - horizon - 1
    has_act = torch.nonzero(replay.data["has_act"][:last]).squeeze(1)
    some = has_act[torch.randperm(len(has_act), generator=generator)[:512]]
    event = (replay.data["rew"] != 0) | replay.data["end"]
    events = torch.nonzero(event[:last]).squeeze(1)
    events = events[torch.randperm(len(events), generator=generator)[:256]]
    before = events - torch.randint(horizon + 1, events.shape, generator=generator)
    before = torch.maximum(before, replay.data["first"][events])
    return torch.cat([some, before])


def imagined_return(rollout):
    """Sum of the signs of rewards up to the first imagined end, [B]."""
    ended_before = rollout.end.cumsum(1) - rollout.end
    return torch.where(ended_before == 0, rollout.rew, 0).sum(1)


def measure_imagination(run, play, read, generator):
    """Links (b), (c) and (d)."""
    agent = run.agent
    L = run.args.num_conditioning_steps
    H = run.args.horizon
    anchors = choose_anchors(play.replay, H, generator)
    batch = play.replay.sample(anchors, L - 1, H)
    z = encode(agent, batch.obs)  # [B, L+H, C, h, w]
    actions = batch.act[:, L - 1 : -1]
    starts = (z[:, :L], batch.act[:, :L], batch.real[:, :L])
    samples = []
    for _ in range(SAMPLES):
        rollout = run.source.imagine(agent, *starts, H, actions)
        samples.append(rollout.z)
    samples = torch.stack(samples)  # [SAMPLES, B, L+H, C, h, w]
    from_real = agent.reward_end(z, batch.act, batch.has_act)
    from_imagined = agent.reward_end(samples[0], batch.act, batch.has_act)
    result = {"real": expectations(from_real, batch, L - 1)}
    now = z[:, L - 1]
    for k in sorted({1, 3, 5, 6, H}):
        t = L - 1 + k
        real = batch.real[:, t]
        future = z[real, t]
        no_change = (now[real] - future).square().mean()
        sample_error = (samples[:, real, t] - future).square().mean()
        spread = samples[:, real, t].var(0).mean()
        mean_error = (samples[:, real, t].mean(0) - future).square().mean() - spread / SAMPLES
        result[f"error {k}"] = [(sample_error / no_change).item(), (mean_error / no_change).item()]
        result[f"imagined {k}"] = expectations(from_imagined, batch, t)
        if read:
            slots = anchors[real] + k
            truth = play.ram[slots]
            guesses = [read(samples[0, real, t]), play.ram[anchors[real]], read(future)]
            table = torch.stack([(guess - truth).abs().mean(0) for guess in guesses])  # [3, K]
            result[f"ram {k}"] = table.T.tolist()
    return result


def measure_pushes(run, play):
    """Push, of link (c), and choice, of link (e)."""
    L = run.args.num_conditioning_steps
    H = run.args.horizon
    slots = play.pushes[:, 0]
    batch = play.replay.sample(slots, L - 1, 0)
    z = encode(run.agent, batch.obs)
    pushed = []
    outcomes = []
    for i in (1, 2):
        actions = play.pushes[:, i, None].expand(-1, H)
        total = torch.zeros(len(slots), 2)
        for _ in range(SAMPLES):
            rollout = run.source.imagine(run.agent, z, batch.act, batch.real, H, actions)
            total += torch.stack([imagined_return(rollout), rollout.end.amax(1)], 1)
        pushed.append(rollout.z[:, L - 1 + min(PUSH_STEPS, H)])
        outcomes.append(total / SAMPLES)
    imagined = (pushed[0] - pushed[1])[play.lasted]
    frames = play.pushed[play.lasted]
    real = encode(run.agent, frames[:, 0]) - encode(run.agent, frames[:, 1])
    result = {"push": ((imagined * real).sum() / real.square().sum()).item()}
    imagined = outcomes[0] - outcomes[1]  # [P, 2]
    real = play.outcomes[:, 0] - play.outcomes[:, 1]  # [P, 2]
    correlation = nn.functional.cosine_similarity(imagined, real, dim=0)
    differ = (real != 0).float().mean(0)
    for i, kind in enumerate(("rewards", "ends")):
        result[f"choice of {kind}"] = [correlation[i].item(), differ[i].item()]
    return result


def measure_returns(run, play, uniform):
    """Links (e) and (f): returns of H steps from the same starts, by policy and uniform actions."""
    L = run.args.num_conditioning_steps
    H = run.args.horizon
    result = {}
    for name, recording in {"policy": play, "uniform": uniform}.items():
        replay = recording.replay
        anchors = torch.nonzero(replay.data["has_act"][: replay.size - H]).squeeze(1)
        anchors = anchors[torch.randperm(len(anchors))[:768]]
        batch = replay.sample(anchors, L - 1, H)
        rew = torch.where(batch.has_act, batch.rew, 0)[:, L - 1 : -1]
        result[f"{name}, real"] = mean_and_error(rew.sum(1))
        z = encode(run.agent, batch.obs[:, :L])
        actions = None
        if name == "uniform":
            actions = torch.randint(run.env.action_space.n, (len(z), H))
        rollout = run.source.imagine(run.agent, z, batch.act[:, :L], batch.real[:, :L], H, actions)
        result[f"{name}, imagined"] = mean_and_error(imagined_return(rollout))
        result[f"{name}, games"] = recording.returns
    return result


def show(run, m):
    """Returns the table as text."""

    def three(values):
        auc, came, elsewhere = values
        return f"AUC {auc:.2f} ({came:.3f} where it came, {elsewhere:.3f} elsewhere)"

    H = run.args.horizon
    seen = f"{m['rewards']} rewards in {m['steps']} steps"
    lines = [f"{m['run']}: {m['updates']} updates of the world model, {seen}"]
    latent = ", ".join(f"{name} {value:.3f}" for name, value in m["latents"].items())
    lines.append(f"(a) latents      {latent}")
    for kind in ("rewards", "ends"):
        lines.append(f"(b) R, real      {kind} {three(m['real'][kind])}")
    steps = sorted({1, 5, H})
    shown = "/".join(str(k) for k in steps)
    sample = "/".join(f"{m[f'error {k}'][0]:.2f}" for k in steps)
    mean = "/".join(f"{m[f'error {k}'][1]:.2f}" for k in steps)
    error = f"error {sample}, of the mean {mean} at {shown} steps"
    lines.append(f"(c) imagined     {error}; push {m['push']:.2f}")
    for i, name in enumerate(names_of(run.args.env_id, RAM)):
        cells = []
        for k in steps:
            cells.append("/".join(f"{x:.1f}" for x in m[f"ram {k}"][i]))
        lines.append(f"                 {name} {', '.join(cells)} at {shown} steps")
    for kind in ("rewards", "ends"):
        for k in sorted({1, 3, 6, H}):
            found = three(m[f"imagined {k}"][kind])
            lines.append(f"(d) R, imagined  {kind} {k} steps ahead {found}")
    cells = []
    for kind in ("rewards", "ends"):
        correlation, differ = m[f"choice of {kind}"]
        cells.append(f"{kind} {correlation:.2f} (they differ in {differ:.3f} of the states)")
    lines.append(f"(e) choice       {', '.join(cells)}")
    for letter, place in (("    imagination ", "imagined"), ("(f) real play   ", "real")):
        cells = []
        for who in ("policy", "uniform"):
            mean, error = m["returns"][f"{who}, {place}"]
            cells.append(f"{who} {mean:.3f} +- {error:.3f}")
        lines.append(f"{letter} {', '.join(cells)} in {H} steps")
    for who in ("policy", "uniform", "blind"):
        games = m["returns"][f"{who}, games"]
        if len(games) > 1:
            mean, error = mean_and_error(torch.tensor(games))
            score = f"{mean:.2f} +- {error:.2f} ({len(games)})"
            lines.append(f"                 whole games, {who}: {score}")
    return "\n".join(lines)


def main(argv=None):
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=5_000, help="of play, and as many at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON lines, to which the numbers are appended")
    given = parser.parse_args(argv)
    run = Run(given.run, "cpu", given.seed + 20_000)
    generator = torch.Generator().manual_seed(given.seed)
    with torch.no_grad():
        play = record(run, run.agent.act, given.steps, given.seed)
        uniform = record(run, partial(run.agent.act, epsilon=1.0), given.steps, given.seed + 1)
    read = None
    if names_of(run.args.env_id, RAM):
        obs = uniform.replay.data["obs"][: uniform.replay.size]
        read = fit_reader(encode(run.agent, obs), uniform.ram)
    numbers = {
        "run": given.run.name,
        "updates": run.state["wm_scheduler"]["last_epoch"],
        "steps": given.steps,
        "rewards": int((play.replay.data["rew"] != 0).sum()),
    }
    with torch.no_grad():
        numbers["latents"] = measure_latents(run, play)
        numbers |= measure_imagination(run, play, read, generator)
        numbers |= measure_pushes(run, play)
        numbers["returns"] = measure_returns(run, play, uniform)
        blind = record(run, blind_player(play.replay), given.steps, given.seed + 2)
        numbers["returns"]["blind, games"] = blind.returns
    print(show(run, numbers), flush=True)
    if given.out:
        with open(given.out, "a") as file:
            print(json.dumps(numbers), file=file)
    return numbers


if __name__ == "__main__":
    main()
