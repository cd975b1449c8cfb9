"""Tests of jedi.py. `pytest` runs those of seconds; `pytest -m slow` those that train."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch

import evaluate
import jedi
from tests.toy import Catch

ROOT = pathlib.Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = dict(
    env_id="tests.toy:Catch-v0", image_size=16, encoder_channels=(8, 8, 8, 4), denoiser_channels=16, cond_channels=32,
    reward_end_channels=8, lstm_dim=16, actor_critic_channels=(8, 8), horizon=3, batch_size=4, total_steps=60,
    first_collect_steps=40, first_collect_max=40, steps_per_epoch=20, final_epochs=1, first_world_model_updates=4,
    world_model_updates=2, first_actor_critic_updates=3, actor_critic_updates=2, eval_episodes=3, device="cpu", preset="small",
)  # fmt: skip


def tiny(**changes) -> jedi.Args:
    return jedi.Args(**(TINY | changes))


def make_agent(args: jedi.Args, num_actions: int = 3) -> jedi.Agent:
    """An agent whose zero-initialised layers are random, so that every path carries signal and gradient."""
    torch.manual_seed(0)
    agent = jedi.Agent(args, num_actions)
    for parameter in agent.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return agent


def filled_buffer(args: jedi.Args, episodes=((5, True), (9, False), (12, True)), seed: int = 0) -> jedi.ReplayBuffer:
    """Random frames; each (length, ended) is an episode that ends or is truncated."""
    rng, steps = np.random.default_rng(seed), sum(length for length, _ in episodes)
    buffer = jedi.ReplayBuffer(steps, args.image_size, CPU, args.recency_weights)
    frame = lambda: rng.integers(0, 256, (3, args.image_size, args.image_size), dtype=np.uint8)  # noqa: E731
    for length, ended in episodes:
        buffer.begin_episode(frame())
        for t in range(length):
            last = t == length - 1
            buffer.add(int(rng.integers(3)), float(rng.integers(-2, 3)), last and ended, last and not ended, frame())
    return buffer


def loss_inputs(args: jedi.Args, batch: int, feed_own: bool = True):
    generator, n, h = torch.Generator().manual_seed(1), args.num_autoregressive_steps, args.image_size // 8
    sigma = torch.rand(n, batch, generator=generator) * 2 + 0.1
    return sigma, torch.randn(n, batch, args.encoder_channels[-1], h, h, generator=generator), torch.tensor(feed_own)


# --------------------------------------------------------------------------------------------------------------------
# Diffusion
# --------------------------------------------------------------------------------------------------------------------
def test_preconditioning_identities():
    denoiser = make_agent(tiny()).denoiser
    sigma, d = torch.logspace(-4, 2, 50, dtype=torch.float64), 0.5
    c_in, c_out, c_skip, c_noise = (c.flatten() for c in denoiser.precondition(sigma))
    torch.testing.assert_close(c_skip**2 * (sigma**2 + d**2) + c_out**2, torch.full_like(sigma, d**2))  # unit-variance target
    torch.testing.assert_close(c_in**2 * (sigma**2 + d**2), torch.ones_like(sigma))  # unit-variance input
    torch.testing.assert_close(c_noise, sigma.log() / 4)
    assert c_skip[0] > 0.999999 and c_out[0] < 1.1e-4  # without noise the denoiser is the identity


def test_karras_sigmas():
    sigmas = jedi.karras_sigmas(3, 2e-3, 5.0, 7.0)
    assert sigmas[0] == pytest.approx(5.0) and sigmas[2] == pytest.approx(2e-3) and sigmas[3] == 0.0
    assert sigmas[1] == pytest.approx(((5 ** (1 / 7) + 2e-3 ** (1 / 7)) / 2) ** 7)  # halfway in sigma^(1/rho)
    assert jedi.karras_sigmas(1, 2e-3, 5.0, 7.0) == pytest.approx([5.0, 0.0])


@pytest.mark.parametrize("s_churn", [0.0, 1.0])
def test_sampler_recovers_a_gaussian(s_churn):
    mean, std, steps = 1.5, 0.5, 200
    noise = torch.randn(1 + steps if s_churn else 1, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoise = lambda x, sigma: (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)  # noqa: E731  E[clean | x]
    x = jedi.euler_sample(denoise, noise, jedi.karras_sigmas(steps, 2e-3, 80.0, 7.0), s_churn)
    assert x.mean().item() == pytest.approx(mean, abs=0.03) and x.std().item() == pytest.approx(std, abs=0.03)


def test_sampler_recovers_a_mixture():
    modes, weights, std = torch.tensor([-1.0, 1.0], dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64), 0.1

    def denoise(x, sigma):
        var = std**2 + sigma**2
        posterior = torch.softmax(weights.log() - (x[:, None] - modes) ** 2 / (2 * var), 1)  # [N, 2]
        return (posterior * (std**2 * x[:, None] + sigma**2 * modes) / var).sum(1)

    noise = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = jedi.euler_sample(denoise, noise, jedi.karras_sigmas(200, 2e-3, 80.0, 7.0))
    assert (x > 0).double().mean().item() == pytest.approx(0.7, abs=0.02)
    for mode in (-1.0, 1.0):
        near = x[(x - mode).abs() < 0.6]
        assert near.mean().item() == pytest.approx(mode, abs=0.02) and near.std().item() == pytest.approx(std, abs=0.02)


def test_sampler_denoises_at_sigma_hat():
    seen = []
    denoise = lambda x, sigma: seen.append(sigma) or x * 0  # noqa: E731
    jedi.euler_sample(denoise, torch.zeros(4, 1), [4.0, 2.0, 1.0, 0.0], s_churn=0.9)
    assert seen == pytest.approx([4.0 * 1.3, 2.0 * 1.3, 1.0 * 1.3])


@pytest.mark.parametrize("predict", ["absolute", "change"])
def test_gradient_reaches_the_encoder_through_the_condition_only(predict):
    args = tiny(predict=predict)
    agent, steps, n = make_agent(args), args.num_conditioning_steps, args.num_autoregressive_steps
    agent.denoiser.change_rms.fill_(0.3)
    z = torch.randn(4, steps + n, 4, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    real = torch.ones(4, steps + n, dtype=torch.bool)
    act = torch.zeros(4, steps + n, dtype=torch.long)
    for feed_own in (False, True):
        loss, _ = agent.denoiser.loss(z, act, real, *loss_inputs(args, 4, feed_own))
        (grad,) = torch.autograd.grad(loss, z)
        assert grad[:, :steps].abs().amin(0).flatten(1).amax(1).min() > 0  # every condition latent
        assert not grad[:, -1].any()  # the last latent is a target only
        # The first target becomes the condition of the second step, unless the denoiser's own latent takes its place
        assert grad[:, steps].any() == (not feed_own)


def test_change_and_absolute_describe_the_same_latent():
    args = tiny(predict="change")
    denoiser = make_agent(args).denoiser
    denoiser.change_rms.fill_(0.1)
    z_hist = torch.randn(2, 4, 4, 2, 2).clamp(-2, 2)
    base, scale = denoiser.origin(z_hist)
    z_next = z_hist[:, -1] + 0.1 * torch.randn(2, 4, 2, 2)
    torch.testing.assert_close(denoiser.to_latent((z_next - base) / scale, z_hist), z_next)
    assert scale.item() == pytest.approx(0.1 / args.sigma_data)  # so that y has std sigma_data


def test_batch_norm_of_latents_removes_what_never_changes():
    args = tiny(latent_norm="batch")
    agent = make_agent(args)
    obs = torch.full((64, 3, 16, 16), 90, dtype=torch.uint8)
    obs[:, :, 2:6, 2:6] = torch.randint(0, 256, (64, 1, 1, 1), dtype=torch.uint8)
    z = agent.encoder(obs, torch.ones(64, dtype=torch.bool))
    assert z.mean(0).abs().max() < 0.05 and z.std().item() == pytest.approx(args.sigma_data, rel=0.1)
    torch.testing.assert_close(agent.encoder(obs), z, atol=1e-4, rtol=1e-3)  # after one batch the running values are its own


# --------------------------------------------------------------------------------------------------------------------
# Replay and losses: what may enter, what may not
# --------------------------------------------------------------------------------------------------------------------
def test_segments_keep_to_their_episode():
    args = tiny()
    buffer = filled_buffer(args)
    batch = buffer.sample(500, 3, 4, torch.Generator().manual_seed(0))
    assert batch.real[:, 3].all() and batch.step[:, 3].all()  # the anchor is a real frame with an action
    assert (~batch.real[:, 0]).any() and (~batch.real[:, -1]).any()  # padding occurs on both sides
    left = ~batch.real & (torch.arange(8) < 3)
    for b, t in left.nonzero().tolist()[:50]:
        first = batch.real[b].long().argmax()
        assert torch.equal(batch.obs[b, t], batch.obs[b, first]) and batch.act[b, t] == 0
    final = batch.real & ~batch.step
    assert final.any() and not batch.end[~batch.step & batch.real].any()
    assert (batch.end.bool() & batch.step).any()


def test_truncation_is_not_an_end():
    buffer = filled_buffer(tiny(), episodes=((6, False),))
    batch = buffer.sample(100, 0, 6, torch.Generator().manual_seed(0))
    assert not batch.end.any() and buffer.trunc.sum() == 1


def test_final_frame_is_kept():
    buffer = filled_buffer(tiny(), episodes=((5, True), (5, True)))
    assert buffer.size == 12 and buffer.num_steps == 10 and not buffer.has_step[5] and not buffer.has_step[11]


def test_recency_weights():
    buffer = filled_buffer(tiny(), episodes=((10, True),) * 8)
    batch = buffer.sample(40_000, 0, 0, torch.Generator().manual_seed(0))
    frames = {buffer.obs[slot].numpy().tobytes(): slot // 22 for slot in range(buffer.size)}  # two episodes of 11 slots a part
    parts = np.bincount([frames[obs.numpy().tobytes()] for obs in batch.obs[:, 0]], minlength=4) / 40_000
    assert parts == pytest.approx([0.1, 0.1, 0.1, 0.7], abs=0.01)


def test_replay_grows_when_episodes_are_short():
    buffer = filled_buffer(tiny(), episodes=((1, True),) * 40)
    batch = buffer.sample(200, 2, 2, torch.Generator().manual_seed(0))
    assert buffer.size == 80 and (batch.real.sum(1) == 2).all()  # each one the only step's frame and the final one


@pytest.mark.parametrize("form", [dict(), dict(latent_norm="batch", predict="change")], ids=["published", "small"])
def test_padding_never_enters_a_loss(form):
    args = tiny(**form)
    agent = make_agent(args)
    batch = filled_buffer(args).sample(64, args.num_conditioning_steps - 1, args.horizon + 1, torch.Generator().manual_seed(0))
    after = ~batch.real & (torch.arange(batch.real.shape[1]) >= args.num_conditioning_steps)
    assert after.any()
    other = batch._replace(
        obs=torch.where(after[..., None, None, None], 255 - batch.obs, batch.obs),
        rew=torch.where(batch.step, batch.rew, 1.0), end=torch.where(batch.step, batch.end, 1),
        act=torch.where(after, 2, batch.act),
    )  # fmt: skip
    start = {k: v.clone() for k, v in agent.state_dict().items()}  # running statistics
    reset = lambda: agent.load_state_dict(start)  # noqa: E731
    noise = loss_inputs(args, 64)
    same, _ = jedi.world_model_loss(agent, batch, *noise)
    reset()
    changed, _ = jedi.world_model_loss(agent, other, *noise)
    torch.testing.assert_close(same, changed)
    reset()
    touched = batch._replace(rew=torch.where(batch.step & (batch.rew == 1), -1.0, batch.rew))  # while real data does enter
    assert jedi.world_model_loss(agent, touched, *noise)[0] != same


def test_lstm_ignores_padding():
    args = tiny()
    agent, z = make_agent(args), torch.randn(2, 5, 4, 2, 2)
    real = torch.tensor([[False, False, True, True, True]] * 2)
    padded = agent.actor_critic(z, real)[0][:, 2:]
    torch.testing.assert_close(padded, agent.actor_critic(z[:, 2:])[0])


def brute_force_lambda_return(rew, end, value, t, gamma, lambda_):
    """The definition: (1 - lambda) sum lambda^(n-1) G_n, the last n-step return taking the remaining weight."""
    horizon, total, weight = len(rew), 0.0, 1.0
    for n in range(1, horizon - t + 1):
        ret, discount, ended = 0.0, 1.0, False
        for k in range(n):
            ret += discount * rew[t + k]
            discount *= gamma
            if end[t + k]:
                ended = True
                break
        ret += 0.0 if ended else discount * value[t + n]
        last = n == horizon - t
        total += weight * (1.0 if last else 1 - lambda_) * ret
        weight *= lambda_
    return total


def test_lambda_returns_against_brute_force():
    generator = torch.Generator().manual_seed(0)
    rew, end = torch.randn(20, 7, generator=generator).double(), (torch.rand(20, 7, generator=generator) < 0.2).double()
    value = torch.randn(20, 8, generator=generator).double()
    returns = jedi.lambda_returns(rew, end, value, 0.9, 0.8)
    expected = [
        [brute_force_lambda_return(rew[b].tolist(), end[b].tolist(), value[b].tolist(), t, 0.9, 0.8) for t in range(7)]
        for b in range(20)
    ]
    torch.testing.assert_close(returns, torch.tensor(expected, dtype=torch.float64))


def test_truncation_bootstraps_and_end_does_not():
    rew, value = torch.zeros(1, 2), torch.full((1, 3), 10.0)
    assert jedi.lambda_returns(rew, torch.zeros(1, 2), value, 0.5, 1.0).tolist() == [[2.5, 5.0]]  # the horizon truncates
    assert jedi.lambda_returns(rew, torch.tensor([[0.0, 1.0]]), value, 0.5, 1.0).tolist() == [[0.0, 0.0]]


def test_no_policy_loss_after_an_imagined_end():
    args = tiny()
    agent, horizon = make_agent(args), args.horizon
    z = torch.randn(2, 4 + horizon, 4, 2, 2)
    real, act, rew = (
        torch.ones(2, 4 + horizon, dtype=torch.bool),
        torch.zeros(2, horizon, dtype=torch.long),
        torch.ones(2, horizon),
    )
    end = torch.tensor([[0.0, 1.0, 0.0]] * 2)
    rollout = jedi.Rollout(z, real, act, rew, end, torch.zeros(2, horizon, 3), torch.zeros(2, horizon, 2))
    loss, logs = jedi.actor_critic_loss(agent, rollout)
    after = rollout._replace(
        rew=torch.tensor([[1.0, 1.0, -1.0]] * 2), act=torch.tensor([[0, 0, 2]] * 2), z=z.index_fill(1, torch.tensor([6]), 5.0)
    )
    torch.testing.assert_close(jedi.actor_critic_loss(agent, after)[0], loss)
    assert logs["imagination/return"] == 2.0  # two rewards until the end, none after it


def test_policy_never_trains_the_world_model():
    args = tiny()
    agent, buffer = make_agent(args), filled_buffer(args)
    trainer = jedi.Trainer(agent, args, CPU)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    trainer.update_actor_critic(trainer.contexts(buffer))
    changed = {name.split(".")[0] for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"actor_critic"}
    trainer.update_world_model(trainer.segments(buffer))
    changed = {name.split(".")[0] for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"actor_critic", "encoder", "denoiser", "reward_end"}


def test_imagination_follows_given_actions_and_samples_the_policy():
    args = tiny(horizon=6)
    agent = make_agent(args)
    torch.nn.init.zeros_(agent.actor_critic.actor.weight)
    agent.actor_critic.actor.bias.data = torch.tensor([2.0, 1.0, 0.0])
    batch, generator = (
        filled_buffer(args).sample(3000, 3, 0, torch.Generator().manual_seed(0)),
        torch.Generator().manual_seed(1),
    )
    noise = jedi.imagination_noise(args, 3000, 3, generator)
    z = agent.encoder(batch.obs)
    rollout = jedi.imagine(agent, z, batch.act, batch.real, *noise)
    frequencies = torch.bincount(rollout.act.flatten(), minlength=3) / rollout.act.numel()
    torch.testing.assert_close(frequencies, torch.tensor([2.0, 1.0, 0.0]).softmax(0), atol=0.02, rtol=0)
    again = jedi.imagine(agent, z, batch.act, batch.real, *noise, actions=rollout.act)
    assert torch.equal(again.z, rollout.z) and torch.equal(again.rew, rollout.rew)
    other = jedi.imagine(agent, z, batch.act, batch.real, *noise, actions=(rollout.act + 1) % 3)
    assert torch.equal(other.z[:, :4], rollout.z[:, :4]) and not torch.equal(other.z[:, 4], rollout.z[:, 4])


def test_overfits_one_batch():
    """Both world-model losses fall to near zero on one batch: every path from the data to the loss is connected."""
    args = tiny(encoder_channels=(8, 8, 8, 4), denoiser_channels=32, learning_rate=3e-3, warmup_updates=1, latent_norm="batch")
    agent, buffer = make_agent(args), filled_buffer(args)
    trainer = jedi.Trainer(agent, args, CPU)
    batch = trainer.segments(buffer)
    logs = [trainer.update_world_model(batch) for _ in range(300)]
    first, last = ({k: torch.stack([log[k] for log in part]).mean() for k in logs[0]} for part in (logs[:10], logs[-10:]))
    assert last["losses/denoising"] < 0.3 * first["losses/denoising"]
    assert last["losses/reward"] < 0.05 and last["losses/end"] < 0.05


# --------------------------------------------------------------------------------------------------------------------
# Environment
# --------------------------------------------------------------------------------------------------------------------
def test_frames_equal_the_opencv_area_resize():
    """Recorded screens and what cv2.resize(..., interpolation=cv2.INTER_AREA) made of them (opencv 5.0.0)."""
    recorded = np.load(ROOT / "tests" / "area_resize.npz")
    for screen, expected in zip(recorded["screens"], recorded["frames"]):
        rows, cols = jedi.area_weights(210, 64), jedi.area_weights(160, 64)
        frame = np.rint(rows @ screen.transpose(2, 0, 1).astype(np.float32) @ cols.T)
        assert np.abs(frame - expected.transpose(2, 0, 1)).max() <= 1


@pytest.mark.parametrize("game, address, one, other", [("Breakout", 72, 3, 2), ("Pong", 51, 3, 2)])
def test_actions_move_the_paddle(game, address, one, other):
    position, frames = {}, {}
    for action in (one, other):
        env = jedi.make_env(f"{game}NoFrameskip-v4", 0, training=True)
        env.reset()
        for _ in range(10):
            frame = env.step(action)[0]
        position[action], frames[action] = int(env.unwrapped.ale.getRAM()[address]), frame
    assert abs(position[one] - position[other]) > 20 and (frames[one] != frames[other]).any()


def test_life_loss_ends_the_learning_episode_while_the_game_goes_on():
    env = jedi.make_env("BreakoutNoFrameskip-v4", 0, training=True)
    ends, games, rng = 0, [], np.random.default_rng(0)
    env.reset()
    while not games:
        obs, _, end, trunc, info = env.step(int(rng.integers(4)))
        if end:
            ends += 1
            lives = env.unwrapped.ale.lives()
            if "episode" in info:
                games.append(info["episode"])
            else:
                resumed, _ = env.reset()
                assert np.array_equal(resumed, obs) and env.unwrapped.ale.lives() == lives == 5 - ends  # no new game
    assert ends == 5
    env = jedi.make_env("BreakoutNoFrameskip-v4", 0, training=False)
    env.reset()
    lives = {env.unwrapped.ale.lives()}
    for _ in range(10_000):
        _, _, end, trunc, info = env.step(int(rng.integers(4)))
        lives.add(env.unwrapped.ale.lives())
        if end:
            break
    assert end and lives == {0, 1, 2, 3, 4, 5} and info["episode"]["l"] > 50  # evaluation plays full games


def test_final_observation_is_the_last_screen():
    env = jedi.make_env("BreakoutNoFrameskip-v4", 3, training=False)
    env.reset()
    end, rng = False, np.random.default_rng(0)
    while not end:
        obs, _, end, _, _ = env.step(int(rng.integers(4)))
    resize = env.env  # RecordEpisodeStatistics -> ResizeFrame
    assert np.array_equal(obs, resize.observation(env.unwrapped.ale.getScreenRGB()))


class ScriptedScreens(gym.Env):
    """Raw frames numbered 1, 2, 3, ...; the game ends at the 6th."""

    observation_space, action_space = gym.spaces.Box(0, 255, (2, 2, 3), np.uint8), gym.spaces.Discrete(1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.full((2, 2, 3), 0, np.uint8), {}

    def step(self, action):
        self.t += 1
        return np.full((2, 2, 3), (self.t, 100 - self.t, 0), np.uint8), 1.0, self.t == 6, False, {}


def test_frame_skip_pools_the_last_two_frames_and_stops_at_the_end():
    game = jedi.AtariGame(ScriptedScreens())
    game.env.reset()
    obs, reward, end, _, _ = game.step(0)
    assert obs[0, 0].tolist() == [4, 97, 0] and reward == 4 and not end  # max of frames 3 and 4
    obs, reward, end, _, _ = game.step(0)
    assert obs[0, 0].tolist() == [6, 94, 0] and reward == 2 and end


def test_env_is_seeded():
    def play(seed):
        env = jedi.make_env("PongNoFrameskip-v4", seed, training=True)
        env.reset()
        return np.stack([env.step(t % 6)[0] for t in range(30)])

    assert np.array_equal(play(1), play(1)) and not np.array_equal(play(1), play(2))


def test_evaluation_gives_each_environment_its_quota():
    seen = []
    agent = make_agent(tiny(image_size=32))
    frames = []
    games = jedi.evaluate_policy(
        agent, "tests.toy:Catch-v0", 7, 0, num_envs=3, progress=lambda *x: seen.append(x), frames=frames
    )
    assert len(games["returns"]) == len(games["lengths"]) == 7 and seen == [(i, 7) for i in range(1, 8)]
    assert games == jedi.evaluate_policy(agent, "tests.toy:Catch-v0", 7, 0, num_envs=3)
    assert len(frames) == games["lengths"][0] and frames[0].shape == (32, 32, 3)


# --------------------------------------------------------------------------------------------------------------------
# Hyperparameters
# --------------------------------------------------------------------------------------------------------------------
def test_every_field_is_documented_and_read():
    source = (ROOT / "jedi.py").read_text()
    block = source[source.index("class Args:") : source.index("SMALL = dict(")]
    for field in dataclasses.fields(jedi.Args):
        assert re.search(rf"\n    {field.name}: [^\n]+\n    \"\"\"[^\n]{{10,}}\"\"\"", block), f"{field.name} has no docstring"
        assert re.search(rf"\bargs\.{field.name}\b", source) or re.search(rf"\bfirst\.{field.name}\b", source), (
            f"{field.name} is never read"
        )
    hyperparameters = block[block.index("# Environment and replay") :]
    for name, docstring in re.findall(r"\n    (\w+): [^\n]+\n    \"\"\"([^\n]+)\"\"\"", hyperparameters):
        assert re.search(r"\[[PDO]\b", docstring) or "not comparable" in docstring or "EDM" in docstring, (
            f"{name} has no provenance"
        )


def test_readme_table_holds_the_presets():
    """The last two columns of the README's hyperparameter table are Args and SMALL."""

    def shown(value) -> str:
        if isinstance(value, (tuple, bool)):
            return ", ".join(map(str, value)) if isinstance(value, tuple) else ("yes" if value else "no")
        return str(value).replace(",", "")

    rows = re.findall(r"^\| `--([\w-]+)` \|.*\| ([^|]+) \| ([^|]+) \|$", (ROOT / "README.md").read_text(), flags=re.M)
    assert len(rows) > 50
    for flag, paper, small in rows:
        name, default = flag.replace("-", "_"), jedi.Args()
        for text, value in ((paper, getattr(default, name)), (small, jedi.SMALL.get(name, "="))):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                assert float(text.replace(",", "")) == value, (flag, text, value)
            else:
                assert text == shown(value), (flag, text, value)


def test_readme_fork_example_works(tmp_path):
    """The diff of the worked example applies to jedi.py, and the direct predictor that it makes overfits one batch."""
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)[1].replace("jedi_mse.py", "jedi.py")
    (tmp_path / "jedi.py").write_text((ROOT / "jedi.py").read_text())
    subprocess.run(["git", "apply", "-p0", "-"], cwd=tmp_path, input=diff, text=True, check=True)
    spec = importlib.util.spec_from_file_location("jedi_mse", tmp_path / "jedi.py")
    fork = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fork)
    args = fork.Args(**TINY | dict(learning_rate=3e-3, warmup_updates=1))
    torch.manual_seed(0)
    agent, buffer = fork.Agent(args, 3), filled_buffer(args)
    trainer = fork.Trainer(agent, args, CPU)
    batch = trainer.segments(buffer)
    losses = [trainer.update_world_model(batch)["losses/denoising"].item() for _ in range(150)]
    assert losses[-1] < 0.1 * losses[0]


def test_paper_preset_has_the_published_size():
    agent = jedi.Agent(jedi.Args(), num_actions=4)
    assert sum(p.numel() for p in agent.parameters()) == pytest.approx(13.5e6, rel=0.05)
    assert agent.encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 16, 8, 8)


def test_flags_win_over_the_preset():
    args = jedi.parse_args(["--preset", "small", "--batch-size", "7", "--device", "cpu"])
    assert args.batch_size == 7 and args.lstm_dim == jedi.SMALL["lstm_dim"] and args.preset == "small"
    args = jedi.parse_args(["--preset", "paper", "--lstm-dim", "64"])
    assert args.lstm_dim == 64 and args.total_steps == 100_000
    if not torch.cuda.is_available():
        assert jedi.parse_args([]).preset == "small"


# --------------------------------------------------------------------------------------------------------------------
# Runs: determinism, resume, checkpoints
# --------------------------------------------------------------------------------------------------------------------
def run(tmp_path, **changes) -> tuple[dict, dict, pathlib.Path]:
    """One tiny run in this process: result, checkpoint, run directory."""
    args = tiny(runs_dir=str(tmp_path), **changes)
    result = jedi.main(args)
    run_dir = pathlib.Path(args.resume) if args.resume else max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return result, jedi.load_checkpoint(run_dir), run_dir


def assert_equal(a, b, path=""):
    """Bit equality of nested containers of tensors."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def comparable(checkpoint: dict) -> dict:
    """Without wall times and the names of directories."""
    drop = {"wall_time", "log_lines"}
    return {k: v for k, v in checkpoint.items() if k not in ("args", "progress")} | {
        "progress": {k: v for k, v in checkpoint["progress"].items() if k not in drop}
    }


def test_two_runs_with_one_seed_are_bit_equal(tmp_path):
    first, first_checkpoint, run_dir = run(tmp_path / "a")
    second, second_checkpoint, _ = run(tmp_path / "b")
    assert_equal(comparable(first_checkpoint), comparable(second_checkpoint))
    assert first["returns"] == second["returns"] and first["lengths"] == second["lengths"]
    other, other_checkpoint, _ = run(tmp_path / "c", seed=2)
    assert not torch.equal(
        first_checkpoint["agent"]["actor_critic.actor.weight"], other_checkpoint["agent"]["actor_critic.actor.weight"]
    )
    for name in ("args.json", "jedi.py", "versions.json", "metrics.jsonl", "ckpt.pt", "result.json"):
        assert (run_dir / name).exists(), name
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    keys = set().union(*lines)
    assert {
        "losses/denoising",
        "world_model/error_1",
        "latent/effective_rank",
        "imagination/return",
        "world_model/return_real",
        "eval/episodic_return",
    } <= keys
    result = json.loads((run_dir / "result.json").read_text())
    assert result["preset"] == "small" and len(result["returns"]) == 3 and result["protocol"]["epsilon"] == 0.0


@pytest.mark.parametrize("phase, updates", [("update_world_model", 3), ("update_actor_critic", 2)])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, phase, updates):
    """N updates, Ctrl-C, resume, N updates == 2 N updates, bit for bit."""
    once = dict(total_steps=40, final_epochs=0, latent_norm="batch", predict="change")
    whole, whole_checkpoint, _ = run(tmp_path / "whole", **once)
    original, calls = getattr(jedi.Trainer, phase), []

    def interrupting(self, batch):
        if len(batch.obs) == 4:  # not measure_speed's warm-up
            calls.append(1)
        if len(calls) == updates + 1:  # the first full batch is measure_speed's
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(jedi.Trainer, phase, interrupting)
        with pytest.raises(jedi.Interrupted):
            run(tmp_path / "parts", **once)
    run_dir = next((tmp_path / "parts").iterdir())
    stopped = jedi.load_checkpoint(run_dir)["progress"]
    assert stopped["world_model"] + stopped["actor_critic"] < 7
    parts, parts_checkpoint, _ = run(tmp_path / "parts", resume=str(run_dir), **once)
    assert_equal(comparable(whole_checkpoint), comparable(parts_checkpoint))
    assert parts["returns"] == whole["returns"]


def test_resume_while_collecting_goes_on_at_an_episode_boundary(tmp_path, monkeypatch):
    original, calls = jedi.Collector.step, []

    def interrupting(self):
        calls.append(1)
        if len(calls) == 30 + 50:  # measure_speed takes 30
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(jedi.Collector, "step", interrupting)
        with pytest.raises(jedi.Interrupted):
            run(tmp_path)
    run_dir = next(tmp_path.iterdir())
    state = jedi.load_checkpoint(run_dir)
    assert state["replay"]["num_steps"] == 50 and state["progress"]["world_model"] == 4
    result, checkpoint, _ = run(tmp_path, resume=str(run_dir))
    replay = checkpoint["replay"]
    assert replay["num_steps"] == 60 and result["global_step"] == 60
    assert replay["end"][49 + len(state["replay"]["starts"]) - 1] or replay["trunc"][49 + len(state["replay"]["starts"]) - 1]
    steps = [json.loads(line)["global_step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_kill_while_checkpointing_leaves_a_whole_checkpoint(tmp_path):
    """kill -9 at a random moment of a process that does nothing but write checkpoints."""
    script = (
        "import sys, pathlib, torch, jedi\n"
        "path, i = pathlib.Path(sys.argv[1]), 0\n"
        "while True:\n"
        "    i += 1\n"
        "    jedi.save_checkpoint(path, {'i': i, 'x': torch.full((2_000_000,), float(i))})\n"
        "    print(i, flush=True)\n"
    )
    path = tmp_path / "ckpt.pt"
    for delay in (0.0, 0.011, 0.023):
        process = subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        process.stdout.readline(), process.stdout.readline()
        time.sleep(delay)
        process.kill()
        written = [2] + [int(line) for line in process.stdout.read().split()]
        process.wait()
        state = torch.load(path, weights_only=True)
        assert state["i"] in (written[-1], written[-1] + 1) and bool((state["x"] == state["i"]).all())


def test_full_disk_keeps_the_previous_checkpoint(tmp_path):
    """A limit on the file size stands in for a full disk: writing fails in the middle."""
    script = (
        "import pathlib, resource, sys, torch, jedi\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "jedi.save_checkpoint(path, {'i': 1})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    jedi.save_checkpoint(path, {'i': 2, 'x': torch.zeros(1_000_000)})\n"
        "except jedi.UsageError as error:\n"
        "    print(error)\n"
    )
    path = tmp_path / "ckpt.pt"
    out = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert "previous one is intact" in out.stdout and out.stdout.count("\n") == 1, out
    assert torch.load(path, weights_only=True)["i"] == 1 and list(tmp_path.iterdir()) == [path]


def test_nan_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    original = jedi.world_model_loss

    def poisoned(*inputs):
        loss, logs = original(*inputs)
        return loss, logs | {"losses/denoising": logs["losses/denoising"] * math.nan}

    monkeypatch.setattr(jedi, "world_model_loss", poisoned)
    with pytest.raises(jedi.UsageError, match="losses/denoising is nan in world_model update 4 .*epoch 0.*no checkpoint yet"):
        run(tmp_path)


# --------------------------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------------------------
def flags(**changes) -> list[str]:
    words = []
    for name, value in (TINY | changes).items():
        words += ["--" + name.replace("_", "-"), *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


gym.register("VectorObs-v0", lambda: gym.make("CartPole-v1").unwrapped)


class ContinuousActions(gym.Env):
    observation_space, action_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), gym.spaces.Box(-1, 1, (2,))


gym.register("Continuous-v0", ContinuousActions)

BAD_INPUT = {
    "unknown env": (
        dict(env_id="BraekoutNoFrameskip-v4"),
        ["--env-id BraekoutNoFrameskip-v4", "did you mean", "BreakoutNoFrameskip-v4"],
    ),
    "unknown module": (dict(env_id="nowhere:Game-v0"), ["--env-id nowhere:Game-v0", "nowhere"]),
    "no image": (dict(env_id="VectorObs-v0"), ["--env-id VectorObs-v0", "not uint8 images"]),
    "no discrete action": (dict(env_id="Continuous-v0"), ["--env-id Continuous-v0", "not Discrete"]),
    "v5": (dict(env_id="ALE/Breakout-v5"), ["sticky", "--env-id BreakoutNoFrameskip-v4", "--allow-sticky"]),
    "v4 with built-in skip": (dict(env_id="MsPacman-v4"), ["--env-id MsPacmanNoFrameskip-v4"]),
    "no such device": (dict(device="gpu"), ["--device gpu", "--device cpu"]),
    "image size": (dict(image_size=20), ["--image-size 20", "multiple of 8"]),
    "horizon": (dict(horizon=0), ["--horizon 0"]),
    "too few steps": (dict(total_steps=30), ["--total-steps 30", "--first-collect-steps 40"]),
    "batch too large": (dict(batch_size=41), ["--batch-size 41", "--first-collect-steps 40"]),
    "no autoregressive step": (dict(num_autoregressive_steps=0), ["--num-autoregressive-steps 0"]),
    "no episode": (dict(eval_episodes=0), ["--eval-episodes"]),
    "unwritable directory": (dict(runs_dir="/proc/nowhere"), ["--runs-dir /proc/nowhere"]),
    "no such run": (dict(resume="/nowhere"), ["/nowhere/ckpt.pt", "no checkpoint there"]),
}


@pytest.mark.parametrize("changes, expected", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(tmp_path, capsys, changes, expected):
    assert jedi.cli(flags(**{"runs_dir": tmp_path} | changes)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in expected), error
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent(capsys):
    assert jedi.cli(flags(device="cuda")) == 2
    assert "--device cuda: not available" in capsys.readouterr().err


def test_evaluate_plays_a_checkpoint(tmp_path, capsys):
    """evaluate.py --checkpoint on a real run: the same agent, seed and games as the final score, and nothing lost."""
    result, _, run_dir = run(tmp_path)
    assert not evaluate.main(["--checkpoint", str(run_dir), "--episodes", "3", "--seed", "10001"])
    again = json.loads((run_dir / "result.json").read_text())
    assert again["returns"] == result["returns"] and again["protocol"] == result["protocol"]
    assert json.loads((run_dir / "result.1.json").read_text())["returns"] == result["returns"]
    (run_dir / "ckpt.pt").write_bytes((run_dir / "ckpt.pt").read_bytes()[:1000])
    assert evaluate.main(["--checkpoint", str(run_dir)]) == 2 and "truncated" in capsys.readouterr().err


def test_bad_resume(tmp_path, capsys):
    _, _, run_dir = run(tmp_path)
    whole = (run_dir / "ckpt.pt").read_bytes()

    def fails(*words):
        code, error = jedi.cli(["--resume", str(run_dir), *words]), capsys.readouterr().err
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        return error

    assert "--batch-size 5" in (error := fails("--batch-size", "5")) and "has 4" in error  # other hyperparameters
    (run_dir / "ckpt.pt").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in fails()
    (run_dir / "ckpt.pt").write_bytes(whole)
    state = torch.load(run_dir / "ckpt.pt", weights_only=True)
    torch.save(state | {"format": 0}, run_dir / "ckpt.pt")
    assert "another version" in fails()
    torch.save(state | {"args": state["args"] | {"lstm_dim": 8}}, run_dir / "ckpt.pt")
    assert "other hyperparameters" in fails()
    (run_dir / "ckpt.pt").write_bytes(whole)
    assert jedi.cli(["--resume", str(run_dir), "--checkpoint-minutes", "5"]) == 0  # a finished run is evaluated again


def test_sticky_id_may_be_accepted_knowingly():
    env = jedi.make_env("ALE/Breakout-v5", 0, training=True, allow_sticky=True)
    env.reset()
    env.step(0)
    assert env.unwrapped.ale.getFloat("repeat_action_probability") == 0.25


def test_optional_logger_names_the_missing_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    assert jedi.cli(flags(runs_dir=tmp_path) + ["--track"]) == 2
    assert "pip install wandb" in capsys.readouterr().err


def test_command_line_end_to_end(tmp_path):
    """The whole program as a user runs it: train, Ctrl-C, resume, score."""
    command = [sys.executable, "jedi.py", *flags(runs_dir=tmp_path)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0 and not out.stderr, out.stderr
    lines = out.stdout.splitlines()
    assert lines[0].startswith("preset small") and "parameters: encoder" in out.stdout and "expected: " in out.stdout
    assert sum(line.startswith("epoch ") for line in lines) == 3 and "ETA" in out.stdout and "score " in lines[-1]

    slow = [sys.executable, "jedi.py", *flags(runs_dir=tmp_path / "slow", world_model_updates=100_000)]
    process = subprocess.Popen(slow, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    process.send_signal(signal.SIGINT)
    rest, error = process.communicate(timeout=60)
    assert process.returncode == 130 and not error and "--resume" in rest, (rest, error)


# --------------------------------------------------------------------------------------------------------------------
# Slow: learning, and the compiled path
# --------------------------------------------------------------------------------------------------------------------
TOY = (  # the README's command
    "--env-id tests.toy:Catch-v0 --preset small --image-size 32 --total-steps 6400 --steps-per-epoch 400 --final-epochs 0 "
    "--world-model-updates 60 --actor-critic-updates 80 --eval-episodes 50"
).split()


def progress_made(result: dict) -> float:
    """0: as the uniformly random policy, 1: as the optimal one. The random policy is played here, 2,000 games."""
    env, rng, total = Catch(), np.random.default_rng(0), 0.0
    env.reset(seed=0)
    for _ in range(2000):
        end = False
        while not end:
            _, reward, end, _, _ = env.step(int(rng.integers(3)))
            total += reward
        env.reset()
    random, optimal = total / 2000, Catch.CATCHES
    assert -0.6 < random < -0.3
    return (result["mean_return"] - random) / (optimal - random)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_learns_the_toy_game(tmp_path, seed):
    start = time.time()
    subprocess.run(
        [sys.executable, "jedi.py", *TOY, "--seed", str(seed), "--runs-dir", str(tmp_path), "--device", "cpu"],
        cwd=ROOT,
        check=True,
    )
    result = json.loads(next(tmp_path.glob("*/result.json")).read_text())
    assert progress_made(result) >= 0.8, result["returns"]
    assert time.time() - start < 15 * 60


@pytest.mark.slow
def test_does_not_learn_with_shuffled_actions(tmp_path, monkeypatch):
    """The negative control: same budget, but the world model cannot know what the actions do."""
    update = jedi.Trainer.update_world_model

    def shuffled(self, batch):
        order = torch.randperm(batch.act.numel(), generator=self.rng)
        return update(self, batch._replace(act=batch.act.flatten()[order].view_as(batch.act)))

    monkeypatch.setattr(jedi.Trainer, "update_world_model", shuffled)
    result = jedi.main(jedi.parse_args([*TOY, "--seed", "1", "--runs-dir", str(tmp_path), "--device", "cpu"]))
    assert progress_made(result) < 0.5, result["returns"]


@pytest.mark.slow
def test_compiled_equals_eager():
    """Inductor on the CPU: losses, gradients and the sampler on the same noise."""
    args = tiny(latent_norm="batch", predict="change")
    agent, buffer = make_agent(args), filled_buffer(args)
    batch, generator = buffer.sample(4, 3, 4, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    noise, randomness = loss_inputs(args, 4), jedi.imagination_noise(args, 4, 3, generator)
    z, start = agent.encoder(batch.obs[:, :4]).detach(), {k: v.clone() for k, v in agent.state_dict().items()}

    def outcome(trainer):
        agent.load_state_dict(start)  # the loss moves the running statistics
        agent.zero_grad()
        loss, _ = trainer.world_model_loss(agent, batch, *noise)
        loss.backward()
        context = z, batch.act[:, :4], batch.real[:, :4]
        rollout = jedi.imagine(agent, *context, *randomness, step=trainer.imagine_step)
        policy_loss, _ = trainer.actor_critic_loss(agent, rollout)
        policy_loss.backward()
        return [loss, policy_loss, rollout.z, *(p.grad.clone() for p in agent.parameters())]

    eager = outcome(jedi.Trainer(agent, args, CPU))
    compiled = outcome(jedi.Trainer(agent, dataclasses.replace(args, compile=True), CPU))
    for a, b in zip(eager, compiled):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
