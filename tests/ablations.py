"""Which part of the world model does the work? Each variant is jedi.py with one change, trained alone on recorded random play.

    python tests/ablations.py --out results/ablations.json                        # all, seeds 1 2 3: 40 minutes of one core
    python tests/ablations.py --variants full frozen --seeds 1                    # a look, 2 minutes
    python tests/ablations.py --plot results/ablations.json results/ablations.png # needs matplotlib

Yardsticks that do not depend on the encoder's own units, on play that was held out: where paddle, ball row and ball column
are in the imagined latent 1 and 5 steps ahead, read off by a linear probe fitted on real latents (share exactly right;
guessing: an eighth), and the probability that R gives, inside imagination, to what really happens: to the catches, and to the
near misses (the ball falls beside the paddle). `floor` is the probe on the real future latent. The encoder warms up over a
quarter of the updates.
"""

import argparse
import importlib.util
import json
import pathlib
import sys
import tempfile
import time

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Name: (what it is, changed Args, [(text in jedi.py, what replaces it), ...])
DETACHED = ("hist = list(z.unbind(1))", "hist = list(z.detach().unbind(1))")
ALWAYS_REAL = ("feed_own = torch.rand((), device=z.device) < 0.5", "feed_own = torch.tensor(False, device=z.device)")
ALWAYS_OWN = ("feed_own = torch.rand((), device=z.device) < 0.5", "feed_own = torch.tensor(True, device=z.device)")
NO_BOUND = [
    ("return self.args.latent_bound * torch.tanh(z / self.args.latent_bound)", "return z"),
    (".detach().clamp(-args.latent_bound, args.latent_bound)", ".detach()"),
    ("return z.clamp(-self.args.latent_bound, self.args.latent_bound)", "return z"),
]
MOMENTS = [("frames.nanmedian(0).values", "frames.nanmean(0)"), ("square.flatten().nanmedian(0).values", "square.nanmean()")]
VARIANTS = {
    "full": ("as it is", {}, []),
    "mse predictor": (
        "the next latent by regression: the noised latent is replaced by zeros, one network call a step", {},
        [
            ("z_noisy = z_next + sigma[:, None, None, None] * torch.randn_like(z_next)", "z_noisy = torch.zeros_like(z_next)"),
            ("target = (z_next - c_skip * z_noisy) / c_out", "target, c_out, c_noise = z_next, 1.0, c_noise"),
            ("d**2 / root**2, sigma.log() / 4", "d**2 / root**2, sigma.log() * 0"),
            ("for sigma, sigma_next in zip(self.sigmas, self.sigmas[1:]):", "for sigma, sigma_next in ():"),
            ("return z.clamp(", "return self.unet(0 * z, 0 * z[:, 0, 0, 0], z_hist, act_hist).clamp("),
        ],
    ),
    "no diffusion gradient": ("the encoder learns from reward and end alone", {}, [DETACHED]),
    "frozen": ("the encoder stays as it was initialised", {"encoder_lr_scale": 0.0}, []),
    "clean rewards": ("R learns from latents without noise", {"reward_end_noise": 0.0}, []),
    "no reward gradient": ("the encoder learns from the diffusion loss alone", {},
                           [("z = z + args.reward_end_noise", "z = z.detach() + args.reward_end_noise")]),
    "ema target": (
        "the target is encoded by a moving average of the encoder (0.99)", {},
        [
            ("self.encoder, self.denoiser = Encoder(args), Denoiser(args, num_actions)",
             "self.encoder, self.denoiser = Encoder(args), Denoiser(args, num_actions)\n"
             "        self.slow = [Encoder(args)]\n"
             "        self.slow[0].load_state_dict(self.encoder.state_dict())"),
            ("    diffusion_loss = agent.denoiser.loss(",
             "    with torch.no_grad():\n"
             "        for slow, fast in zip(agent.slow[0].parameters(), agent.encoder.parameters()):\n"
             "            slow.lerp_(fast, 0.01)\n"
             "        agent.denoiser.target = agent.slow[0](batch.obs, batch.real)\n"
             "    diffusion_loss = agent.denoiser.loss("),
            ("z_next = z[:, steps + i].detach()", "z_next = self.target[:, steps + i]"),
        ],
    ),
    "deterministic switching": ("the denoiser's own latent is always fed on", {}, [ALWAYS_OWN]),
    "no switching": ("the encoder's latent is always fed on", {}, [ALWAYS_REAL]),
    "no switching, no bound": ("and neither tanh nor clamp", {}, [ALWAYS_REAL, *NO_BOUND]),
    "published form": ("z = C(x): no normalisation", {},
                       [("z = self.args.sigma_data * (x - center) / (scale * motion)", "z = x")]),
    "mean and variance": ("the statistics are no medians", {}, MOMENTS),
    "plain batch norm": ("and the gradient flows through the standard deviation instead of the motion", {},
                         [*MOMENTS, ("torch.nan).detach()", "torch.nan)"),
                          ("motion = motion / motion.detach()", "motion = 1.0")]),
}  # fmt: skip


def load_variant(name: str):
    """jedi.py with the variant's replacements, as a module. Raises AssertionError unless each text occurs exactly once."""
    source = (ROOT / "jedi.py").read_text()
    for old, new in VARIANTS[name][2]:
        assert source.count(old) == 1, f"{name}: {source.count(old)} times in jedi.py: {old}"
        source = source.replace(old, new)
    path = pathlib.Path(tempfile.mkdtemp(), "jedi_variant.py")
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("jedi_variant", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(jedi, args, num_steps: int, seed: int):
    """A replay buffer of uniformly random play."""
    env, rng, over = jedi.make_env(args.env_id, seed, args.image_size), np.random.default_rng(seed), True
    buffer = jedi.ReplayBuffer(jedi.dataclasses.replace(args, total_steps=num_steps), torch.device("cpu"))
    for _ in range(num_steps):
        if over:
            buffer.add(env.reset()[0])
        act = int(rng.integers(3))
        obs, rew, end, over, _ = env.step(act)
        over = over or end
        buffer.add(obs, act, float(rew), end)
    return buffer


def read_screen(obs: torch.Tensor) -> torch.Tensor:
    """Frames [N, 3, 32, 32] of Catch or NoisyCatch -> column of the paddle, row and column of the ball [N, 3]."""
    cells = obs[:, :, 1::4, 1::4].int()  # [N, 3, 8, 8]
    paddle = (cells[:, 2, 7] == 240).float() @ torch.arange(8.0) / 3  # [N] its middle
    paddle = torch.where((cells[:, 2, 7] == 240).sum(1) == 3, paddle, -1)  # hidden in part by the ball: unknown
    ball = (cells[:, 0] == 240).flatten(1).float().argmax(1)  # [N]
    return torch.stack([paddle.round().long(), ball // 8, ball % 8], 1)


@torch.no_grad()
def measure(jedi, trainer, fit, held_out) -> dict[str, float]:
    """The numbers of the docstring at the top."""
    args, agent = trainer.args, trainer.agent
    steps, ahead = args.num_conditioning_steps, (1, 5)
    encode = lambda obs: torch.cat([agent.encoder(chunk) for chunk in obs.split(256)])  # noqa: E731
    x, truth = encode(fit.obs[: fit.size]).flatten(1).double(), read_screen(fit.obs[: fit.size])
    known = (truth >= 0).all(1)
    x, y = x[known], torch.nn.functional.one_hot(truth[known], 8).flatten(1).double()  # [N, D], [N, 24]
    mean, center, gram = x.mean(0), y.mean(0), (x - x.mean(0)).T @ (x - x.mean(0))
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weights = torch.linalg.solve(gram + ridge, (x - mean).T @ (y - center))
    decode = lambda z: ((z.flatten(1).double() - mean) @ weights + center).unflatten(1, (3, 8)).argmax(2)  # noqa: E731  [N, 3]

    generator = torch.Generator().manual_seed(0)
    batch = held_out.sample(512, steps - 1, args.horizon + 1, generator)
    torch.manual_seed(0)
    z = encode(batch.obs.flatten(0, 1)).unflatten(0, batch.obs.shape[:2])
    act, rew, step = (x[:, steps - 1 : steps - 1 + args.horizon] for x in (batch.act, batch.rew, batch.step))  # [B, H]
    imagined = jedi.imagine(agent, z[:, :steps], batch.act[:, :steps], batch.real[:, :steps], args.horizon, actions=act)
    result = {k.split("/")[1]: v for k, v in jedi.measure(agent, batch).items()}
    for h in ahead:
        t, truth = steps - 1 + h, read_screen(batch.obs[:, steps - 1 + h])  # [B, 3]
        good = batch.real[:, t] & (truth >= 0).all(1)
        for where, latent in (("imagined", imagined.z[:, t]), ("floor", z[:, t])):
            right = (decode(latent) == truth)[good].double().mean(0).tolist()
            result |= {f"{name}_{h}_{where}": value for name, value in zip(("paddle", "ball_row", "ball_column"), right)}
    screen = read_screen(batch.obs[:, steps : steps + args.horizon].flatten(0, 1)).unflatten(0, rew.shape)  # [B, H, 3]
    beside = (screen[..., 0] - screen[..., 2]).abs() == 2  # [B, H]
    acts = torch.cat([batch.act[:, : steps - 1], act], 1)  # [B, L+H-1]
    rew_logits, _, _ = agent.reward_end(imagined.z[:, :-1], acts, imagined.z[:, 1:], imagined.real[:, :-1])
    known = rew_logits[:, steps - 1 :].softmax(-1).gather(-1, rew.long()[..., None] + 1).squeeze(-1)  # [B, H]
    for name, event in (("catches_found", rew == 1), ("near_misses_found", (rew == -1) & beside)):
        result[name] = float(known[event & step].double().mean())
    state = ("paddle_1", "ball_row_1", "ball_column_1", "paddle_5", "ball_row_5", "ball_column_5")
    result["state_right"] = float(np.mean([result[f"{name}_imagined"] for name in state]))
    return result


def run(name: str, seed: int, env_id: str, updates: int, frames: int) -> dict:
    jedi = load_variant(name)
    args = jedi.Args(preset="small", env_id=env_id, seed=seed, **jedi.SMALL | VARIANTS[name][1])
    args = jedi.dataclasses.replace(args, total_steps=frames, collect_steps=(frames, 400), batch_size=16, horizon=6,
                                    world_model_updates=(updates, 0), warmup_updates=(100, updates // 4))  # fmt: skip
    trainer, start = jedi.Trainer(args, 3, torch.device("cpu")), time.time()
    trainer.buffer = record(jedi, args, frames, seed)
    trainer.refresh()
    for _ in range(updates):
        trainer.advance("world_model")
    trainer.refresh()
    minutes = (time.time() - start) / 60
    numbers = measure(jedi, trainer, record(jedi, args, 2000, 1000 + seed), record(jedi, args, 1500, 2000 + seed))
    return {"variant": name, "seed": seed, "env_id": env_id, "updates": updates, "minutes": minutes} | numbers


SHOWN = ("state_right", "paddle_5_imagined", "catches_found", "near_misses_found", "change_rms", "moving_std")


def table(runs: list[dict]) -> str:
    """Markdown: mean and range over the seeds, a row a variant, with the change that makes it."""
    lines = ["| variant | seeds | " + " | ".join(SHOWN) + " |", "|" + " --- |" * (2 + len(SHOWN))]
    for name in VARIANTS:
        if mine := [run for run in runs if run["variant"] == name]:
            cells = [np.array([run[key] for run in mine]) for key in SHOWN]
            text = " | ".join(f"{cell.mean():.2f} ({cell.min():.2f} to {cell.max():.2f})" for cell in cells)
            lines.append(f"| {name}: {VARIANTS[name][0]} | {len(mine)} | {text} |")
    return "\n".join(lines)


def plot(runs: list[dict], path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    names = [name for name in VARIANTS if any(run["variant"] == name for run in runs)]
    titles = {
        "state_right": "paddle and ball right, 1 and 5 steps ahead",
        "catches_found": "catches found in imagination",
        "near_misses_found": "near misses found in imagination",
    }
    for axes, (key, title) in zip(figure.subplots(1, 3, sharey=True), titles.items()):
        for i, name in enumerate(names):
            values = np.array([run[key] for run in runs if run["variant"] == name])
            axes.plot([values.min(), values.max()], [i, i], f"C{i % 10}", linewidth=3, alpha=0.4)
            axes.plot(values, [i] * len(values), f"C{i % 10}o", markersize=4)
            axes.plot(values.mean(), i, f"C{i % 10}|", markersize=18)
        axes.set(title=title, yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5), xlim=(0, 1))
        axes.grid(alpha=0.3)
    figure.suptitle(f"{runs[0]['env_id']}, {runs[0]['updates']} updates of the world model; dots: seeds, tick: mean")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--env-id", default="tests.toy:NoisyCatch-v0")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--out", type=pathlib.Path, help="JSON; runs that it holds already are not repeated")
    parser.add_argument("--plot", nargs=2, type=pathlib.Path, metavar=("JSON", "PNG"))
    given = parser.parse_args()
    if given.plot:
        return plot(json.loads(given.plot[0].read_text()), given.plot[1])
    runs = json.loads(given.out.read_text()) if given.out and given.out.exists() else []
    for seed in given.seeds:
        for name in given.variants:
            if any((run["variant"], run["seed"]) == (name, seed) for run in runs):
                continue
            runs.append(run(name, seed, given.env_id, given.updates, given.frames))
            print(f"{name}, seed {seed}: " + ", ".join(f"{key} {runs[-1][key]:.3f}" for key in SHOWN), flush=True)
            if given.out:
                given.out.write_text(json.dumps(runs, indent=1))
    print(table(runs))


if __name__ == "__main__":
    main()
