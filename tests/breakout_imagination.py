"""Does imagination obey Breakout? Trains the world model alone on recorded frames and holds imagination beside the emulator.

    python tests/breakout_imagination.py --updates 2000                                    # the small preset
    python tests/breakout_imagination.py --updates 2000 --encoder-lr-scale 0               # its frozen twin
    python tests/breakout_imagination.py --preset paper --updates 10000 --out paper.jsonl  # for a GPU

From held-out contexts with the ball in play it imagines 15 steps under the real actions and decodes paddle x, ball x and
ball y (the emulator's RAM 72, 99 and 101) from the latents with a ridge regression fitted on real latents of the training
recording. Errors are mean absolute errors in RAM pixels, beside "no change" (the value at the context) and beside the "floor"
(the same probe on the real future latent). `push` is how far apart 5 x LEFT and 5 x RIGHT move the imagined paddle from one
context, as a fraction of what the emulator does. Every flag of jedi.py works here too; on a CPU a seed determines the numbers.
"""

import dataclasses
import json
import pathlib
import sys
import time

import numpy as np
import torch
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import jedi  # noqa: E402

RAM = {"paddle": 72, "ball_x": 99, "ball_y": 101}
NOOP, FIRE, RIGHT, LEFT = range(4)
STEPS, REPORT = 15, (1, 5, 15)


@dataclasses.dataclass
class ProbeArgs(jedi.Args):
    updates: int = 2_000  # updates of the world model
    eval_every: int = 500  # updates between two measurements
    frames: int = 20_000  # recorded training steps; a fifth as many are held out
    out: str | None = None  # also append the measurements to this JSON-lines file


def record(num_steps: int, seed: int, args: jedi.Args, device: torch.device, branch: bool):
    """Plays a half random, half ball-following policy. Returns the replay, the RAM [slots, 3] and, with `branch`, for every
    20th step the slot and the paddle after 5 x LEFT and 5 x RIGHT [N, 3]."""
    env, rng = jedi.make_env("BreakoutNoFrameskip-v4", seed, args.image_size), np.random.default_rng(seed)
    ale, buffer = env.unwrapped.ale, jedi.ReplayBuffer(dataclasses.replace(args, total_steps=num_steps), device)
    ram = lambda: [int(ale.getRAM()[address]) for address in RAM.values()]  # noqa: E731
    rams, branches, game_over, end = [], [], True, True
    for step in range(num_steps):
        if game_over:
            obs, info = env.reset()
        if end:
            lives = info["lives"]
            buffer.add(obs)
            rams.append(ram())
        paddle, ball_x, ball_y = rams[-1]
        if branch and step % 20 == 0 and ball_y:
            saved, moved = ale.cloneState(), []
            for action in (LEFT, RIGHT):
                for _ in range(5 * jedi.FRAME_SKIP):
                    ale.act(env.unwrapped._action_set[action])
                moved.append(ram()[0])
                ale.restoreState(saved)
            branches.append([buffer.size - 1, *moved])
        follow = FIRE if ball_y == 0 else LEFT if ball_x < paddle - 4 else RIGHT if ball_x > paddle + 4 else NOOP
        action = int(rng.integers(4)) if rng.random() < 0.5 else follow
        obs, reward, terminated, truncated, info = env.step(action)
        buffer.add(obs, action, reward, terminated or info["lives"] < lives)
        rams.append(ram())
        game_over = terminated or truncated
        end = game_over or info["lives"] < lives
    return buffer, torch.tensor(rams, device=device), np.array(branches)


@torch.no_grad()
def measure(agent: jedi.Agent, train, held_out, device: torch.device) -> dict:
    """The numbers of the docstring at the top, for one state of the networks."""
    (buffer, ram, _), (test, test_ram, branches) = train, held_out
    steps = agent.args.num_conditioning_steps
    encode = lambda obs: torch.cat([agent.encoder(chunk) for chunk in obs.split(256)])  # noqa: E731  [N, C, h, w]
    slots = torch.nonzero(ram[:, 2] > 0).squeeze(1)  # ball in play
    features, targets = encode(buffer.obs[slots]).flatten(1).double(), ram[slots].double()
    mean, target_mean, fit = features.mean(0), targets.mean(0), len(slots) * 4 // 5
    x, y = features - mean, targets - target_mean

    def ridge(x: torch.Tensor, y: torch.Tensor, strengths: list[float]) -> list[torch.Tensor]:
        gram, eye = x.T @ x, torch.eye(x.shape[1], device=device, dtype=x.dtype)
        return [torch.linalg.solve(gram + s * gram.diagonal().mean() * eye, x.T @ y) for s in strengths]

    # The strength is the one that predicts the last fifth of the training recording best
    strengths = [10.0**k for k in range(-6, 1)]
    errors = [(x[fit:] @ weights - y[fit:]).abs().mean() for weights in ridge(x[:fit], y[:fit], strengths)]
    (weights,) = ridge(x, y, [strengths[int(torch.stack(errors).argmin())]])
    decode = lambda z: ((z.flatten(-3).double() - mean) @ weights + target_mean).clamp(0, 255)  # noqa: E731  [..., 3]

    def imagine(batch: jedi.Batch, actions: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        context = agent.encoder(batch.obs[:, :steps]), batch.act[:, :steps], batch.real[:, :steps]
        return jedi.imagine(agent, *context, actions.shape[1], actions=actions).z[:, steps:]

    def segments(anchors: torch.Tensor, after: int) -> tuple[jedi.Batch, torch.Tensor]:
        slot = anchors[:, None] + torch.arange(-steps + 1, after + 1, device=device)  # [B, T]
        same = test.first[slot] == test.first[anchors, None]
        return jedi.Batch(test.obs[slot], test.act[slot], test.rew[slot], test.end[slot], same, same), test_ram[slot]

    # Contexts: all frames from L-1 before to STEPS after the anchor in one episode, with the ball in play
    anchors = torch.arange(steps, test.size - STEPS - 1, device=device)
    window = anchors[:, None] + torch.arange(-steps + 1, STEPS + 1, device=device)
    good = (test.first[window] == test.first[anchors, None]).all(1) & (test_ram[window, 2] > 0).all(1)
    batch, truth = segments(anchors[good][::3][:256], STEPS)
    z_hat = imagine(batch, batch.act[:, steps - 1 : -1])  # [B, STEPS, C, h, w]
    z_real = encode(batch.obs[:, steps:].flatten(0, 1)).unflatten(0, z_hat.shape[:2])
    z_now = agent.encoder(batch.obs[:, steps - 1])[:, None]
    now, future = truth[:, steps - 1 : steps].double(), truth[:, steps:].double()
    result = {"contexts": len(truth), "latent_std": z_real.std().item()}
    result["change_std"] = (z_real[:, 0] - z_now[:, 0]).std().item()
    for h in REPORT:
        i = h - 1
        error = lambda prediction: (prediction - future[:, i]).abs().mean(0).tolist()  # noqa: B023, E731
        latent = (z_hat[:, i] - z_real[:, i]).square().mean() / (z_now[:, 0] - z_real[:, i]).square().mean()
        rows = zip(RAM, error(decode(z_hat[:, i])), error(now[:, 0]), error(decode(z_real[:, i])))
        result[h] = {"latent": latent.item()} | {name: dict(imagined=a, no_change=b, floor=c) for name, a, b, c in rows}
    # LEFT against RIGHT from the same contexts
    known = torch.from_numpy(branches).to(device)
    known = known[(known[:, 0] >= steps - 1) & (test.first[known[:, 0]] == test.first[known[:, 0] - steps + 1])]
    batch, _ = segments(known[:, 0], 0)
    left, right = (decode(imagine(batch, torch.full((len(known), 5), a, device=device))[:, -1])[:, 0] for a in (LEFT, RIGHT))
    result["push"] = ((right - left).mean() / (known[:, 2] - known[:, 1]).double().mean()).item()
    return result


def show(m: dict) -> str:
    """One measurement as text: imagined/no change/floor in RAM pixels."""
    std = f"latent std {m['latent_std']:.3f}, of one step's change {m['change_std']:.3f}"
    lines = [
        f"{m['updates']:6d} updates {m['minutes']:5.1f} min loss {m.get('loss', float('nan')):.3f} push {m['push']:.2f} {std}"
    ]
    for h in REPORT:
        errors = {name: "/".join(f"{x:.1f}" for x in value.values()) for name, value in m[h].items() if name != "latent"}
        lines.append(f"   {h:2d} steps: latent {m[h]['latent']:.2f}x " + " ".join(f"{k} {v}" for k, v in errors.items()))
    return "\n".join(lines)


def main(args: ProbeArgs) -> list[dict]:
    jedi.check_args(args)
    device = torch.device(args.device)
    args = dataclasses.replace(args, world_model_updates=(args.updates, 0))  # the schedule of the rates ends with them
    args = dataclasses.replace(args, bf16=device.type == "cuda" if args.bf16 is None else args.bf16)
    trainer = jedi.Trainer(args, 4, device)
    train = record(args.frames, args.seed, args, device, False)
    held_out = record(args.frames // 5, args.seed + 1, args, device, True)
    trainer.buffer = train[0]
    print(f"{device}, preset {args.preset}; errors are imagined/no change/floor in RAM pixels", flush=True)
    seconds, curve = 0.0, []
    while True:
        updates = trainer.done["world_model"]
        if updates % args.eval_every == 0 or updates == args.updates:
            trainer.refresh()
            about = {"updates": updates, "minutes": seconds / 60, "seed": args.seed}
            if curve:  # the mean of the updates since the last measurement
                about["loss"] = float(trainer.sums["losses/denoising"]) / (updates - curve[-1]["updates"])
            trainer.sums = {}
            with torch.random.fork_rng():  # measuring does not change what follows
                curve.append(about | measure(trainer.agent, train, held_out, device))
            print(show(curve[-1]), flush=True)
            if args.out:
                with open(args.out, "a") as file:
                    print(json.dumps(curve[-1]), file=file)
        if updates == args.updates:
            return curve
        start = time.perf_counter()
        trainer.advance("world_model")
        seconds += time.perf_counter() - start


if __name__ == "__main__":
    try:
        preset = {} if "paper" in sys.argv else jedi.SMALL | {"preset": "small"}
        main(tyro.cli(ProbeArgs, default=ProbeArgs(**preset)))
    except jedi.UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
