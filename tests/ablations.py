"""Which part of the world model does the work? Every variant is jedi.py with one change.

    # all variants, seeds 1 2
    python tests/ablations.py --out results/ablations.json
    # a look
    python tests/ablations.py --variants full frozen --seeds 1
    # needs matplotlib
    python tests/ablations.py --plot results/ablations.json results/ablations.png

A variant trains its world model alone on recorded random play. The yardsticks do not depend on the
units of the latent. They are taken on held-out play, in imagination under the real actions:

    state right     share of cells read exactly right (paddle, ball row, ball column), 1 and 5
                    steps ahead; a linear map, fitted on real latents, reads them; guessing gives
                    an eighth
    paddle 5        the paddle's share alone, 5 steps ahead
    catches found   probability that R gives to the catches, in the step in which they really happen
    misses found    the same for near misses: the ball falls beside the paddle
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SWITCH = "feed_own = torch.rand((), device=z.device) < 0.5"
NEVER = (SWITCH, "feed_own = torch.tensor(False, device=z.device)")
ALWAYS = (SWITCH, "feed_own = torch.tensor(True, device=z.device)")
NO_BOUND = ("return limit * torch.tanh(z / limit)", "return z")
NORMALISED = "z = self.args.sigma_data * (x - center) / scale.clamp(min=1e-6)"


class Variant:
    """A change of jedi.py: texts to replace, each of which must occur exactly once, and flags."""

    def __init__(self, about, *replacements, **flags):
        self.about = about
        self.replacements = replacements
        self.flags = flags


VARIANTS = {
    "full": Variant("as it is"),
    "ema target": Variant(
        "the target comes from a moving average of the encoder (0.99)",
        (
            "        self.denoiser = Denoiser(args, num_actions)\n",
            "        self.denoiser = Denoiser(args, num_actions)\n"
            "        self.slow = [Encoder(args)]\n"
            "        self.slow[0].load_state_dict(self.encoder.state_dict())\n",
        ),
        (
            "    denoising_loss = agent.denoiser.loss(z, batch.act, batch.real)\n",
            "    with torch.no_grad():\n"
            "        for slow, fast in zip("
            "agent.slow[0].parameters(), agent.encoder.parameters()):\n"
            "            slow.lerp_(fast, 0.01)\n"
            "        agent.denoiser.target = agent.slow[0](batch.obs, batch.real)\n"
            "    denoising_loss = agent.denoiser.loss(z, batch.act, batch.real)\n",
        ),
        ("z_next = z[:, L + i].detach()", "z_next = self.target[:, L + i]"),
    ),
    "deterministic switching": Variant("the denoiser's own latent is always fed on", ALWAYS),
    "no switching": Variant("the encoder's latent is always fed on", NEVER),
    "no switching, no bound": Variant("and C(z) = z", NEVER, NO_BOUND),
    "mse predictor": Variant(
        "the next latent by regression: zeros in the place of the noised latent, one call a step",
        (
            "z_noisy = z_next + sigma[:, None, None, None] * torch.randn_like(z_next)",
            "z_noisy = 0 * z_next",
        ),
        (
            "target = (z_next - c_skip * z_noisy) / c_out",
            "target = z_next\n            c_out = 1.0",
        ),
        ("c_noise = sigma.log() / 4", "c_noise = 0 * sigma"),
        (
            "for sigma, sigma_next in zip(self.sigmas, self.sigmas[1:]):",
            "for sigma, sigma_next in []:",
        ),
        (
            "            z = z + (sigma_next - sigma) * ((z - denoised) / sigma)\n"
            "        return z\n",
            "            z = z + (sigma_next - sigma) * ((z - denoised) / sigma)\n"
            "        z = self.unet(0 * z, 0 * z[:, 0, 0, 0], z_hist, act_hist)\n"
            "        return bound(z, self.args.latent_bound)\n",
        ),
    ),
    "no diffusion gradient": Variant(
        "the encoder learns from reward and end alone",
        (
            "latents = list(z.unbind(1))  # [B, C, h, w] each",
            "latents = list(z.detach().unbind(1))",
        ),
    ),
    "no reward gradient": Variant(
        "the encoder learns from the diffusion loss alone",
        (
            "agent.reward_end(z, batch.act, batch.has_act)\n    rew_class",
            "agent.reward_end(z.detach(), batch.act, batch.has_act)\n    rew_class",
        ),
    ),
    "frozen": Variant("the encoder stays as it was initialised", encoder_lr_scale=0.0),
    "plain batch norm": Variant(
        "the gradient flows through the spread instead of the motion",
        ("scale = masked_mean(distance, real).detach()", "scale = masked_mean(distance, real)"),
        ("self.scale.lerp_(scale, 0.1)", "self.scale.lerp_(scale.detach(), 0.1)"),
        ("scale = scale * (motion / motion.detach())", "scale = scale * 1.0"),
    ),
    "published latent": Variant("z = C(x): no normalisation", (NORMALISED, "z = x")),
}
SHOWN = ["state right", "paddle 5", "catches found", "misses found", "change rms"]


def load_variant(name):
    """Returns jedi.py with the variant's replacements, as a module."""
    source = (ROOT / "jedi.py").read_text()
    for old, new in VARIANTS[name].replacements:
        assert source.count(old) == 1, f"{name}: {source.count(old)} times in jedi.py: {old}"
        source = source.replace(old, new)
    path = Path(tempfile.mkdtemp(), "jedi_variant.py")
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("jedi_variant", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(jedi, args, num_steps, seed):
    """Returns a replay buffer of uniformly random play."""
    env = jedi.make_env(args.env_id, seed, args.image_size)
    rng = np.random.default_rng(seed)
    replay = jedi.ReplayBuffer(replace(args, total_steps=num_steps), torch.device("cpu"))
    over = True
    for _ in range(num_steps):
        if over:
            replay.start_episode(env.reset()[0])
        act = int(rng.integers(3))
        obs, rew, over, _, _ = env.step(act)
        replay.add(act, rew, over, obs)
    return replay


def read_screen(obs):
    """Frames [N, 3, 32, 32] of Catch -> paddle column, ball row, ball column [N, 3].

    What is hidden is -1.
    """
    cells = obs[:, :, 1::4, 1::4].int()  # [N, 3, 8, 8]
    is_paddle = cells[:, 2, 7] == 240  # [N, 8]
    middle = is_paddle.float() @ torch.arange(8.0) / 3
    paddle = torch.where(is_paddle.sum(1) == 3, middle.round().long(), -1)
    ball = (cells[:, 0] == 240).flatten(1).float().argmax(1)
    return torch.stack([paddle, ball // 8, ball % 8], 1)


@torch.no_grad()
def encode(agent, obs):
    """Frames [..., 3, S, S] -> latents [..., C, h, w], in parts."""
    parts = [agent.encoder(part) for part in obs.flatten(0, -4).split(256)]
    return torch.cat(parts).unflatten(0, obs.shape[:-3])


def fit_reader(agent, replay):
    """Fits a ridge regression from latents to screen cells. Returns a function z -> [N, 3]."""
    obs = replay.data["obs"][: replay.size]
    truth = read_screen(obs)
    known = (truth >= 0).all(1)
    x = encode(agent, obs)[known].flatten(1).double()
    y = torch.nn.functional.one_hot(truth[known], 8).flatten(1).double()  # [N, 24]
    x_mean = x.mean(0)
    y_mean = y.mean(0)
    gram = (x - x_mean).T @ (x - x_mean)
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weights = torch.linalg.solve(gram + ridge, (x - x_mean).T @ (y - y_mean))

    def read(z):
        scores = (z.flatten(1).double() - x_mean) @ weights + y_mean
        return scores.unflatten(1, (3, 8)).argmax(2)

    return read


@torch.no_grad()
def measure(jedi, agent, fit, held_out):
    """The numbers of the docstring at the top."""
    L = agent.args.num_conditioning_steps
    H = agent.args.horizon
    read = fit_reader(agent, fit)
    torch.manual_seed(0)
    batch = held_out.sample(held_out.anchors(512), L - 1, H)
    z = encode(agent, batch.obs)
    actions = batch.act[:, L - 1 : -1]
    rollout = jedi.imagine(agent, z[:, :L], batch.act[:, :L], batch.real[:, :L], H, actions)
    result = {}
    for h in (1, 5):
        t = L - 1 + h
        truth = read_screen(batch.obs[:, t])
        good = batch.real[:, t] & (truth >= 0).all(1)
        for name, latents in {"imagined": rollout.z, "real": z}.items():
            right = (read(latents[:, t]) == truth)[good].double().mean(0)
            result[f"cells {h} {name}"] = right.tolist()
    result["state right"] = float(np.mean(result["cells 1 imagined"] + result["cells 5 imagined"]))
    result["paddle 5"] = result["cells 5 imagined"][0]

    logits, _ = agent.reward_end(rollout.z, batch.act, batch.has_act)
    probs = logits.softmax(-1)[:, L:-1]  # [B, H-1, 3] at imagined frames
    rew = batch.rew[:, L:-1]
    acted = batch.has_act[:, L:-1]
    after = read_screen(batch.obs[:, L + 1 :].flatten(0, 1)).unflatten(0, rew.shape)  # [B, H-1, 3]
    beside = (after[..., 0] - after[..., 2]).abs() == 2
    result["catches found"] = probs[..., 2][acted & (rew == 1)].mean().item()
    result["misses found"] = probs[..., 0][acted & (rew == -1) & beside].mean().item()
    moved = (z[:, 1:] - z[:, :-1])[batch.real[:, 1:] & batch.real[:, :-1]]
    result["change rms"] = moved.square().mean().sqrt().item()
    return result


def run(name, seed, env_id, updates, frames):
    jedi = load_variant(name)
    args = replace(jedi.PRESETS["small"], env_id=env_id, seed=seed, batch_size=16, horizon=6)
    args = replace(args, num_autoregressive_steps=4, total_steps=frames, first_collect_steps=frames)
    args = replace(args, first_world_model_updates=updates, **VARIANTS[name].flags)
    torch.manual_seed(seed)
    agent = jedi.Agent(args, 3)
    optimizer, _, scheduler, _ = jedi.make_optimizers(agent, args)
    replay = record(jedi, args, frames, seed)
    start = time.time()
    for _ in range(updates):
        anchor = replay.anchors(args.batch_size)
        batch = replay.sample(anchor, args.num_conditioning_steps - 1, args.horizon)
        loss, _ = jedi.world_model_loss(agent, batch)
        jedi.optimize(loss, optimizer, scheduler)
    minutes = (time.time() - start) / 60
    fit = record(jedi, args, 2000, 1000 + seed)
    held_out = record(jedi, args, 1500, 2000 + seed)
    about = {
        "variant": name,
        "seed": seed,
        "env_id": env_id,
        "updates": updates,
        "minutes": minutes,
    }
    return about | measure(jedi, agent, fit, held_out)


def table(runs):
    """Markdown: a row a variant, mean and range over the seeds."""
    lines = ["| variant | seeds | " + " | ".join(SHOWN) + " |", "|" + " --- |" * (2 + len(SHOWN))]
    for name, variant in VARIANTS.items():
        mine = [run for run in runs if run["variant"] == name]
        if not mine:
            continue
        cells = []
        for key in SHOWN:
            values = [run[key] for run in mine]
            cells.append(f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        lines.append(f"| {name}: {variant.about} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    names = [name for name in VARIANTS if any(run["variant"] == name for run in runs)]
    for axes, key in zip(figure.subplots(1, 4, sharey=True), SHOWN):
        for i, name in enumerate(names):
            values = [run[key] for run in runs if run["variant"] == name]
            axes.plot([min(values), max(values)], [i, i], f"C{i % 10}", linewidth=3, alpha=0.4)
            axes.plot(values, [i] * len(values), f"C{i % 10}o", markersize=4)
        axes.set(title=key, yticks=range(len(names)), yticklabels=names, xlim=(0, 1))
        axes.grid(alpha=0.3)
    axes.invert_yaxis()
    about = f"{runs[0]['env_id']}, {runs[0]['updates']} updates of the world model"
    figure.suptitle(f"{about}; a dot is a seed")
    figure.savefig(path, dpi=110)


def main():
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--env-id", default="tests.toy:NoisyCatch-v0")
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--frames", type=int, default=3000)
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON; runs that it holds already are not repeated",
    )
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("JSON", "PNG"))
    given = parser.parse_args()
    if given.plot:
        plot(json.loads(given.plot[0].read_text()), given.plot[1])
        return
    runs = []
    if given.out and given.out.exists():
        runs = json.loads(given.out.read_text())
    for seed in given.seeds:
        for name in given.variants:
            if any(run["variant"] == name and run["seed"] == seed for run in runs):
                continue
            runs.append(run(name, seed, given.env_id, given.updates, given.frames))
            shown = ", ".join(f"{key} {runs[-1][key]:.3f}" for key in SHOWN)
            print(f"{name}, seed {seed}: {shown}", flush=True)
            if given.out:
                given.out.write_text(json.dumps(runs, indent=1))
    print(table(runs))


if __name__ == "__main__":
    main()
