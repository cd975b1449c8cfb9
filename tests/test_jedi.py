"""Tests of jedi.py. `pytest` runs those of seconds; `pytest -m slow` those that train."""

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types

import gymnasium as gym
import numpy as np
import pytest
import torch

import evaluate
import jedi
from tests import ablations, atari_cpu
from tests.toy import Catch

ROOT = pathlib.Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = dict(
    env_id="tests.toy:Catch-v0", image_size=16, encoder_channels=(8, 8, 8, 4), denoiser_channels=16, cond_channels=32,
    reward_end_channels=8, lstm_dim=16, actor_critic_channels=(8, 8), horizon=3, batch_size=4, total_steps=60,
    collect_steps=(40, 20), final_epochs=1, world_model_updates=(4, 2), actor_critic_updates=(3, 2),
    eval_episodes=3, device="cpu", preset="small", num_autoregressive_steps=2,
)  # fmt: skip
# for updates one by one: none of them is beyond the schedule, whose rates stay as they are
LONG = dict(world_model_updates=(1000, 2), warmup_updates=(1, 1), lr_decay=0.0)


def tiny(**changes) -> jedi.Args:
    """What the command line makes of flags(**changes)."""
    return jedi.Args(**(jedi.SMALL | TINY | changes))


def fill_zeros(agent: jedi.Agent) -> None:
    """Makes zero-initialised layers random, so that every path carries signal and gradient."""
    for parameter in agent.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)


def make_agent(args: jedi.Args, num_actions: int = 3) -> jedi.Agent:
    torch.manual_seed(0)
    agent = jedi.Agent(args, num_actions)
    fill_zeros(agent)
    return agent


def filled_buffer(args: jedi.Args, episodes=((5, True), (9, False), (12, True)), seed: int = 0) -> jedi.ReplayBuffer:
    """Random frames; each (length, ended) is an episode that ends or is truncated."""
    rng, steps = np.random.default_rng(seed), sum(length for length, _ in episodes)
    buffer = jedi.ReplayBuffer(dataclasses.replace(args, total_steps=steps), CPU)
    frame = lambda: rng.integers(0, 256, (3, args.image_size, args.image_size), dtype=np.uint8)  # noqa: E731
    for length, ended in episodes:
        buffer.add(frame())
        for t in range(length):
            act, rew = int(rng.integers(3)), float(rng.integers(-2, 3))
            buffer.add(frame(), act, rew, ended and t == length - 1)
    return buffer


def make_trainer(args: jedi.Args, device: torch.device = CPU) -> jedi.Trainer:
    """A trainer with filled replay, no zero-initialised layers, and the statistics of both."""
    trainer = jedi.Trainer(args, 3, device)
    fill_zeros(trainer.agent)
    trainer.buffer.load_state_dict(filled_buffer(args).state_dict())
    trainer.refresh()
    return trainer


def update(trainer: jedi.Trainer, phase: str) -> dict[str, torch.Tensor]:
    """One update, without a step in the schedule -> its logs."""
    trainer.sums = {}
    trainer.update(phase)
    return trainer.sums


def seeded(function, *inputs, seed: int = 0):
    """function(*inputs) with the random numbers of the seed."""
    torch.manual_seed(seed)
    return function(*inputs)


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


def sample(denoise, sigmas: list[float], noise: torch.Tensor) -> torch.Tensor:
    """noise [N, D] after Denoiser.sample, in which c_skip z + c_out unet(c_in z, c_noise) = denoise(z, sigma)."""
    denoiser = make_agent(tiny(latent_bound=1e6)).denoiser

    def unet(z_in, c_noise, z_hist, act_hist):
        sigma = (4 * c_noise.double()).exp()  # [N]
        c_in, c_out, c_skip, _ = denoiser.precondition(sigma)
        z = z_in / c_in
        return (denoise(z.flatten(1), float(sigma[0]))[..., None, None] - c_skip * z) / c_out

    denoiser.unet, denoiser.sigmas = unet, sigmas
    return denoiser.sample(None, None, noise[..., None, None]).flatten(1)


def mixture(modes: torch.Tensor, weights: list[float], std: float):
    """E[clean | x] for x [N, D] = clean + sigma * noise, where clean is near one of the modes [M, D]."""

    def denoise(x, sigma):
        var = std**2 + sigma**2
        distance = (x[:, None] - modes).square().sum(2)  # [N, M]
        posterior = torch.softmax(torch.tensor(weights).log() - distance / (2 * var), 1)  # [N, M]
        return (std**2 * x + sigma**2 * (posterior @ modes)) / var

    return denoise


def test_sampler_recovers_a_gaussian():
    mean, std = 1.5, 0.5
    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoise = mixture(torch.tensor([[mean]], dtype=torch.float64), [1.0], std)
    x = sample(denoise, jedi.karras_sigmas(200, 2e-3, 80.0, 7.0), noise)
    assert x.mean().item() == pytest.approx(mean, abs=0.03) and x.std().item() == pytest.approx(std, abs=0.03)


def test_sampler_recovers_a_mixture():
    std = 0.1
    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoise = mixture(torch.tensor([[-1.0], [1.0]], dtype=torch.float64), [0.3, 0.7], std)
    x = sample(denoise, jedi.karras_sigmas(200, 2e-3, 80.0, 7.0), noise)
    assert (x > 0).double().mean().item() == pytest.approx(0.7, abs=0.02)
    for mode in (-1.0, 1.0):
        near = x[(x - mode).abs() < 0.6]
        assert near.mean().item() == pytest.approx(mode, abs=0.02) and near.std().item() == pytest.approx(std, abs=0.02)


def test_sampler_draws_what_is_rare():
    """Two latents, far apart in 256 dimensions, one with probability 0.1: the sampler must find it now and then."""
    draw = torch.Generator().manual_seed(0)
    often = 0.5 * torch.randn(256, generator=draw, dtype=torch.float64)
    rare = often + 1.5 * torch.randn(256, generator=draw, dtype=torch.float64)
    denoise = mixture(torch.stack([often, rare]), [0.9, 0.1], 0.05)
    noise = torch.randn(4000, 256, generator=draw, dtype=torch.float64)
    share = lambda z: ((z - rare).square().sum(1) < (z - often).square().sum(1)).double().mean()  # noqa: E731
    assert share(sample(denoise, jedi.karras_sigmas(3), noise)) > 0.005  # 0.012; 50 steps from sigma 80 give 0.08
    assert share(sample(denoise, jedi.karras_sigmas(3, sigma_max=5.0), noise / 5)) == 0  # from sigma 5, unit noise: never


def test_sampler_denoises_once_at_every_level():
    seen = []
    x = sample(lambda x, sigma: seen.append(sigma) or x * 0 + 2, [4.0, 2.0, 1.0, 0.0], torch.zeros(1, 1, dtype=torch.float64))
    assert seen == pytest.approx([4.0, 2.0, 1.0]) and x.item() == pytest.approx(2.0)


def test_gradient_reaches_the_encoder_through_the_condition_only():
    args = tiny()
    agent, steps, n = make_agent(args), args.num_conditioning_steps, args.num_autoregressive_steps
    z = torch.randn(4, steps + n, 4, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    real = torch.ones(4, steps + n, dtype=torch.bool)
    act = torch.zeros(4, steps + n, dtype=torch.long)
    coins = {float(seeded(torch.rand, (), seed=seed)) < 0.5: seed for seed in range(10)}  # the loss tosses it first
    for feed_own in (False, True):
        loss = seeded(agent.denoiser.loss, z, act, real, seed=coins[feed_own])
        (grad,) = torch.autograd.grad(loss, z)
        assert grad[:, :steps].abs().amin(0).flatten(1).amax(1).min() > 0  # every condition latent
        assert not grad[:, -1].any()  # the last latent is a target only
        # The first target becomes the condition of the second step, unless the denoiser's own latent takes its place
        assert grad[:, steps].any() == (not feed_own)


# --------------------------------------------------------------------------------------------------------------------
# The encoder's normalisation
# --------------------------------------------------------------------------------------------------------------------
def test_what_never_changes_is_removed():
    args = tiny()
    agent = make_agent(args)
    obs = torch.full((16, 4, 3, 16, 16), 90, dtype=torch.uint8)
    obs[..., 2:6, 2:6] = torch.randint(0, 256, (16, 4, 1, 1, 1), dtype=torch.uint8)
    z = agent.encoder(obs, torch.ones(16, 4, dtype=torch.bool))
    assert z.flatten(0, 1).median(0).values.abs().max() < 0.05
    assert z.square().mean((2, 3, 4)).sqrt().median().item() == pytest.approx(args.sigma_data, rel=0.1)


def test_frames_that_flash_do_not_hide_the_others():
    """A few frames unlike all others: the latents of the others keep their scale."""
    args = tiny()
    encoder, obs = make_agent(args).encoder, torch.full((32, 4, 3, 16, 16), 90, dtype=torch.uint8)
    obs[..., 2:6, 2:6] = torch.randint(60, 120, (32, 4, 1, 1, 1), dtype=torch.uint8)
    obs[:4, 1] = 255
    flash = torch.zeros(32, 4, dtype=torch.bool)
    flash[:4, 1] = True
    rms = encoder(obs, torch.ones(32, 4, dtype=torch.bool)).square().mean((2, 3, 4)).sqrt()  # [32, 4]
    assert rms[flash].min() > 3 * rms[~flash].median()
    assert rms[~flash].median().item() == pytest.approx(args.sigma_data, rel=0.1)


def test_refreshed_statistics_are_those_of_the_replay():
    """Acting and imagination normalise as the loss does, within sampling error; before the refresh they do not."""
    args = tiny(batch_size=32)
    trainer = make_trainer(args)
    batch = trainer.buffer.sample(300, 3, 4, torch.Generator().manual_seed(0))

    @torch.no_grad()
    def error() -> float:
        z, expected = trainer.agent.encoder(batch.obs), trainer.agent.encoder(batch.obs, batch.real)
        return (z - expected)[batch.real].square().mean().sqrt().item() / args.sigma_data

    assert error() < 0.1
    first = {name: value.clone() for name, value in trainer.agent.encoder.named_buffers()}
    rng = torch.get_rng_state()
    trainer.refresh()
    assert_equal(dict(trainer.agent.encoder.named_buffers()), first)
    assert torch.equal(torch.get_rng_state(), rng)
    for parameter in trainer.agent.encoder.parameters():
        parameter.data *= 1.5
    assert error() > 0.5
    trainer.refresh()
    assert error() < 0.1


def test_every_policy_phase_begins_with_fresh_statistics(tmp_path, monkeypatch):
    """Another refresh there would change nothing, and each phase of the world model changed them."""
    advance, seen = jedi.Trainer.advance, []

    def checking(self, phase):
        if phase == "actor_critic":
            held = {name: value.clone() for name, value in self.agent.encoder.named_buffers()}
            self.refresh()
            assert_equal(dict(self.agent.encoder.named_buffers()), held)
            if not any(torch.equal(held["center"], center) for center in seen):
                seen.append(held["center"])
        return advance(self, phase)

    monkeypatch.setattr(jedi.Trainer, "advance", checking)
    run(tmp_path)
    assert len(seen) == 3  # epochs


def gradient_size(loss: torch.Tensor, encoder: jedi.Encoder) -> float:
    gradients = torch.autograd.grad(loss, list(encoder.parameters()), retain_graph=True)
    return float(torch.cat([gradient.flatten() for gradient in gradients]).norm())


def test_a_latent_that_stands_still_wins_nothing():
    """A loss that rewards standing still has no gradient for the encoder. Under plain batch normalisation it has one."""
    args = tiny(latent_bound=1e4)  # so large that C is the identity
    encoder, batch = make_agent(args).encoder, filled_buffer(args).sample(64, 3, 4, torch.Generator().manual_seed(0))
    both = (batch.real[:, 1:] & batch.real[:, :-1])[..., None, None, None].expand(-1, -1, 4, 2, 2)
    motion = lambda z: (z[:, 1:] - z[:, :-1])[both].square().mean()  # noqa: E731
    x = encoder.net(batch.obs.flatten(0, 1) / 255).unflatten(0, batch.real.shape)
    x = x - x[batch.real].median(0).values
    plain = args.sigma_data * x / x[batch.real].square().mean((1, 2, 3)).median().sqrt()
    z = encoder(batch.obs, batch.real)
    torch.testing.assert_close(z, plain, rtol=1e-3, atol=1e-4)  # the same latents; only the gradient differs
    assert gradient_size(motion(z), encoder) < 1e-3 * gradient_size(motion(plain), encoder)
    assert gradient_size(z[:, 0].square().mean(), encoder) > 0.01  # others do have one


def test_the_scale_of_what_moves_is_free():
    """Any loss: along the scale of the encoder's output, its static picture removed, the derivative is zero."""
    args = tiny()
    encoder, batch = make_agent(args).encoder, filled_buffer(args).sample(64, 3, 4, torch.Generator().manual_seed(0))
    z = encoder(batch.obs, batch.real)
    loss = (z * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))).sin().sum()
    output = encoder.net[-1]  # scaling weight and bias of the last layer scales x
    gradients = torch.autograd.grad(loss, [output.weight, output.bias])
    along = sum((gradient * value).sum() for gradient, value in zip(gradients, (output.weight, output.bias)))
    assert abs(along) < 1e-4 * gradients[0].norm() * output.weight.norm()


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
    buffer = filled_buffer(tiny(), episodes=((6, False), (6, False)))
    batch = buffer.sample(100, 0, 6, torch.Generator().manual_seed(0))
    assert not batch.end.any() and not batch.real.all() and batch.step.sum(1).max() == 6  # none goes on in the next episode


def test_final_frame_is_kept():
    buffer = filled_buffer(tiny(), episodes=((5, True), (5, True)))
    assert buffer.size == 12 and buffer.has_step.sum() == 10 and not buffer.has_step[5] and not buffer.has_step[11]


def test_recency_weights():
    buffer = filled_buffer(tiny(), episodes=((10, True),) * 8)
    batch = buffer.sample(40_000, 0, 0, torch.Generator().manual_seed(0))
    frames = {buffer.obs[slot].numpy().tobytes(): slot // 22 for slot in range(buffer.size)}  # two episodes of 11 slots a part
    parts = np.bincount([frames[obs.numpy().tobytes()] for obs in batch.obs[:, 0]], minlength=4) / 40_000
    assert parts == pytest.approx([0.1, 0.1, 0.1, 0.7], abs=0.01)


def test_many_short_episodes():
    buffer = filled_buffer(tiny(), episodes=((1, True),) * 40)
    batch = buffer.sample(200, 2, 2, torch.Generator().manual_seed(0))
    assert buffer.size == 80 and (batch.real.sum(1) == 2).all()  # each one the only step's frame and the final one


def test_padding_never_enters_a_loss():
    args = tiny()
    agent = make_agent(args)
    batch = filled_buffer(args).sample(64, args.num_conditioning_steps - 1, args.horizon + 1, torch.Generator().manual_seed(0))
    after = ~batch.real & (torch.arange(batch.real.shape[1]) >= args.num_conditioning_steps)
    assert after.any()
    other = batch._replace(
        obs=torch.where(after[..., None, None, None], 255 - batch.obs, batch.obs),
        rew=torch.where(batch.step, batch.rew, 1.0), end=torch.where(batch.step, batch.end, 1),
        act=torch.where(after, 2, batch.act),
    )  # fmt: skip
    same, _ = seeded(jedi.world_model_loss, agent, batch)
    changed, _ = seeded(jedi.world_model_loss, agent, other)
    torch.testing.assert_close(same, changed)
    touched = batch._replace(rew=torch.where(batch.step & (batch.rew == 1), -1.0, batch.rew))  # while real data does enter
    assert seeded(jedi.world_model_loss, agent, touched)[0] != same


def test_reward_and_end_are_learned_from_noised_latents():
    args = tiny()
    agent = make_agent(args)
    batch = filled_buffer(args).sample(64, args.num_conditioning_steps - 1, args.horizon + 1, torch.Generator().manual_seed(0))
    outcomes, seen, forward = [], [], agent.reward_end.forward
    agent.reward_end.forward = lambda *inputs: (seen.append(inputs), forward(*inputs))[1]
    for noise in (0.5, 0.0):
        agent.args.reward_end_noise = noise
        outcomes.append(seeded(jedi.world_model_loss, agent, batch)[1])
    noised, plain = outcomes
    assert noised["losses/denoising"] == plain["losses/denoising"]
    assert noised["losses/reward"] != plain["losses/reward"] and noised["losses/end"] != plain["losses/end"]
    z = agent.encoder(batch.obs, batch.real)
    torch.testing.assert_close(seen[1][0], z[:, :-1])
    torch.testing.assert_close(seen[1][2], z[:, 1:])
    blur = (seen[0][0] - seen[1][0]) / (0.5 * args.sigma_data)
    assert abs(blur.mean()) < 0.05 and abs(blur.std() - 1) < 0.05
    torch.testing.assert_close(seen[0][2][:, :-1], seen[0][0][:, 1:])  # one latent, blurred once


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
    z, real = torch.randn(2, 4 + horizon, 4, 2, 2), torch.ones(2, 4 + horizon, dtype=torch.bool)
    act, rew, end = torch.zeros(2, horizon, dtype=torch.long), torch.ones(2, horizon), torch.tensor([[0.0, 1.0, 0.0]] * 2)
    rollout = jedi.Rollout(z, real, act, rew, end)
    loss, logs = jedi.actor_critic_loss(agent, rollout)
    after = rollout._replace(
        rew=torch.tensor([[1.0, 1.0, -1.0]] * 2), act=torch.tensor([[0, 0, 2]] * 2), z=z.index_fill(1, torch.tensor([6]), 5.0)
    )
    torch.testing.assert_close(jedi.actor_critic_loss(agent, after)[0], loss)
    assert logs["imagination/return"] == 2.0  # two rewards until the end, none after it
    agent.ent_coef.fill_(0.0)
    bonus = args.ent_coef * logs["losses/entropy"]
    torch.testing.assert_close(jedi.actor_critic_loss(agent, rollout)[0] - bonus, loss)


def test_each_phase_trains_its_own_networks():
    """The policy never trains the world model, whose update leaves the encoder's statistics alone."""
    trainer = make_trainer(tiny(**LONG))
    for phase, networks in (("actor_critic", {"actor_critic"}), ("world_model", {"encoder", "denoiser", "reward_end"})):
        before = copy.deepcopy(trainer.agent.state_dict())
        trainer.advance(phase)
        changed = {name for name, value in trainer.agent.state_dict().items() if not torch.equal(value, before[name])}
        assert {name.split(".")[0] for name in changed} == networks and not changed & {"encoder.center", "encoder.scale"}


def test_imagination_follows_given_actions_and_samples_the_policy():
    args = tiny(horizon=6)
    agent = make_agent(args)
    torch.nn.init.zeros_(agent.actor_critic.actor.weight)
    agent.actor_critic.actor.bias.data = torch.tensor([2.0, 1.0, 0.0])
    batch = filled_buffer(args).sample(3000, 3, 0, torch.Generator().manual_seed(0))
    z = agent.encoder(batch.obs)
    rollout = seeded(jedi.imagine, agent, z, batch.act, batch.real, 6)
    frequencies = torch.bincount(rollout.act.flatten(), minlength=3) / rollout.act.numel()
    torch.testing.assert_close(frequencies, torch.tensor([2.0, 1.0, 0.0]).softmax(0), atol=0.02, rtol=0)
    again, twice = (seeded(jedi.imagine, agent, z, batch.act, batch.real, 6, rollout.act) for _ in range(2))
    assert torch.equal(again.act, rollout.act) and torch.equal(again.z, twice.z) and torch.equal(again.rew, twice.rew)
    other = seeded(jedi.imagine, agent, z, batch.act, batch.real, 6, (rollout.act + 1) % 3)
    rollout = again
    assert torch.equal(other.z[:, :4], rollout.z[:, :4]) and not torch.equal(other.z[:, 4], rollout.z[:, 4])


def test_an_imagined_reward_is_expected_and_an_end_is_drawn():
    """R's logits are the same everywhere: probabilities 0.1, 0.3, 0.6 of -1, 0, 1, and 0.8, 0.2 of going on and of an end."""
    args = tiny()
    agent, batch = make_agent(args), filled_buffer(args).sample(2000, 3, 0, torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(agent.reward_end.head[-1].weight)
    agent.reward_end.head[-1].bias.data = torch.tensor([0.1, 0.3, 0.6, 0.8, 0.2]).log()
    rollout = seeded(jedi.imagine, agent, agent.encoder(batch.obs), batch.act, batch.real, args.horizon)
    torch.testing.assert_close(rollout.rew, torch.full_like(rollout.rew, 0.5))
    assert set(rollout.end.unique().tolist()) == {0.0, 1.0} and rollout.end.mean().item() == pytest.approx(0.2, abs=0.02)


def segments_to_measure(*episodes: tuple[int, bool]):
    """64 segments with what jedi.measure needs for them, and their rewards, ends and steps within the horizon."""
    args = tiny()
    agent, steps, horizon = make_agent(args), args.num_conditioning_steps, args.horizon
    batch = filled_buffer(args, episodes).sample(64, steps - 1, horizon + 1, torch.Generator().manual_seed(0))
    return (agent, batch), *(x[:, steps - 1 : steps - 1 + horizon] for x in (batch.rew, batch.end, batch.step))


def test_rewards_and_ends_are_found_at_their_own_step(monkeypatch):
    """Of an imagination in which every reward and end is right in even segments, and one step late in odd ones."""
    measured, rew, end, step = segments_to_measure((5, True), (9, True))
    even, imagine = (torch.arange(64) % 2 == 0)[:, None], jedi.imagine
    dreamt = [torch.where(even, x, x.roll(1, 1)) for x in (rew, end)]
    monkeypatch.setattr(jedi, "imagine", lambda *x, **y: imagine(*x, **y)._replace(rew=dreamt[0], end=dreamt[1]))
    logs = jedi.measure(*measured)
    for name, real, imagined in (("rewards", rew, dreamt[0]), ("ends", end, dreamt[1])):
        found = [(imagined == real)[b, t].item() for b, t in ((real != 0) & step).nonzero().tolist()]
        assert 0 < np.mean(found) < 1 and logs[f"world_model/{name}_found"] == pytest.approx(np.mean(found))
    none = [(dreamt[0] == 0)[b, t].item() for b, t in ((rew == 0) & step).nonzero().tolist()]
    assert 0 < np.mean(none) < 1 and logs["world_model/no_reward_found"] == pytest.approx(np.mean(none))
    agent, batch = measured
    logs = jedi.measure(agent, batch._replace(rew=batch.rew * 0, end=batch.end * 0))
    assert math.isnan(logs["world_model/rewards_found"]) and math.isnan(logs["world_model/ends_found"])


def test_overfits_one_batch(monkeypatch):
    """Both world-model losses fall to near zero on one batch: every path from the data to the loss is connected."""
    trainer = make_trainer(tiny(denoiser_channels=32, learning_rate=3e-3, **LONG))
    batch = trainer.batch("world_model")
    monkeypatch.setattr(trainer, "batch", lambda phase: batch)
    trainer.done["world_model"], logs = 1, []
    for _ in range(300):
        logs.append(update(trainer, "world_model"))
    first, last = ({k: torch.stack([log[k] for log in part]).mean() for k in logs[0]} for part in (logs[:10], logs[-10:]))
    assert last["losses/denoising"] < 0.3 * first["losses/denoising"]
    assert last["losses/reward"] < 0.05 and last["losses/end"] < 0.05


# --------------------------------------------------------------------------------------------------------------------
# Environment
# --------------------------------------------------------------------------------------------------------------------
class RecordedScreen(gym.Env):
    """Shows one screen."""

    observation_space, action_space = gym.spaces.Box(0, 255, (210, 160, 3), np.uint8), gym.spaces.Discrete(1)
    screen = np.zeros((210, 160, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.screen, {}


gym.register("RecordedScreen-v0", RecordedScreen)


def test_frames_equal_the_opencv_area_resize(monkeypatch):
    """Recorded screens and what cv2.resize(..., interpolation=cv2.INTER_AREA) made of them (opencv 5.0.0)."""
    recorded, env = np.load(ROOT / "tests" / "area_resize.npz"), jedi.make_env("RecordedScreen-v0", 0, 64)
    for screen, expected in zip(recorded["screens"], recorded["frames"]):
        monkeypatch.setattr(RecordedScreen, "screen", screen)
        assert np.abs(env.reset()[0].astype(int) - expected.transpose(2, 0, 1)).max() <= 1


@pytest.mark.parametrize("game, address, one, other", [("Breakout", 72, 3, 2), ("Pong", 51, 3, 2)])
def test_actions_move_the_paddle(game, address, one, other):
    position, frames = {}, {}
    for action in (one, other):
        env = jedi.make_env(f"{game}NoFrameskip-v4", 0)
        env.reset()
        for _ in range(10):
            frame = env.step(action)[0]
        position[action], frames[action] = int(env.unwrapped.ale.getRAM()[address]), frame
    assert abs(position[one] - position[other]) > 20 and (frames[one] != frames[other]).any()


def test_life_loss_ends_the_learning_episode_while_the_game_goes_on():
    trainer = jedi.Trainer(tiny(env_id="Breakout", total_steps=2000), 4, CPU)
    while not (game := trainer.advance("collect")):
        assert trainer.done["collect"] < 2000
    buffer = trainer.buffer
    ends, first = buffer.end[: buffer.size].nonzero().flatten(), buffer.first[: buffer.size]
    assert (
        len(ends) == 5 and game["l"] == buffer.has_step.sum() == buffer.size - 5
    )  # five lives of one game, a final frame each
    for end in ends[:-1]:  # the next life goes on from the frame at which the last one ended
        assert first[end + 2] == end + 2 and torch.equal(buffer.obs[end + 1], buffer.obs[end + 2])


def test_evaluation_plays_full_games():
    env, rng = jedi.make_env("BreakoutNoFrameskip-v4", 0), np.random.default_rng(0)
    lives, end = {env.reset()[1]["lives"]}, False
    while not end:
        _, _, end, _, info = env.step(int(rng.integers(4)))
        lives.add(info["lives"])
    assert lives == {0, 1, 2, 3, 4, 5} and info["episode"]["l"] > 50


def test_final_observation_is_the_last_screen():
    env = jedi.make_env("BreakoutNoFrameskip-v4", 3)
    env.reset()
    end, rng = False, np.random.default_rng(0)
    while not end:
        obs, _, end, _, _ = env.step(int(rng.integers(4)))
    resize = env.env  # RecordEpisodeStatistics -> TransformObservation
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
        env = jedi.make_env("PongNoFrameskip-v4", seed)
        env.reset()
        return np.stack([env.step(t % 6)[0] for t in range(30)])

    assert np.array_equal(play(1), play(1)) and not np.array_equal(play(1), play(2))


@pytest.mark.parametrize("env_id", ["MsPacman", "MsPacman-v4", "ALE/MsPacman-v5"])
def test_every_atari_id_skips_four_frames(env_id):
    """Whatever frame skip the id has of its own."""
    env = jedi.make_env(jedi.Args(env_id).env_id, 0)
    env.reset()
    before = env.unwrapped.ale.getEpisodeFrameNumber()
    for _ in range(5):
        env.step(0)
    assert env.unwrapped.ale.getEpisodeFrameNumber() - before == 20


def test_names_of_games():
    names = {"Breakout": "Breakout", "BreakoutNoFrameskip-v4": "Breakout", "ALE/Breakout-v5": "Breakout"}
    names |= {"tests.toy:Catch-v0": "Catch", "MsPacman": "MsPacman"}
    assert {env_id: jedi.game_name(env_id) for env_id in names} == names
    ids = {"Breakout": "BreakoutNoFrameskip-v4", "MsPacman-v4": "MsPacman-v4", "ALE/Breakout-v5": "ALE/Breakout-v5"}
    ids |= {"tests.toy:Catch-v0": "tests.toy:Catch-v0"}
    assert {env_id: jedi.Args(env_id).env_id for env_id in ids} == ids
    assert jedi.make_env(jedi.parse_args(["--env-id", "Breakout", "--device", "cpu"]).env_id, 0).spec.id == ids["Breakout"]


class CountingFromOne(ScriptedScreens):
    """A Discrete(3, start=1), which takes 1, 2 and 3 only."""

    action_space = gym.spaces.Discrete(3, start=1)

    def step(self, action):
        assert self.action_space.contains(action)
        return super().step(action)[:1] + (float(action), False, False, {})


gym.register("CountingFromOne-v0", CountingFromOne)


def test_actions_that_do_not_start_at_zero():
    env = jedi.make_env("CountingFromOne-v0", 0, 16)
    env.reset()
    assert env.action_space == gym.spaces.Discrete(3) and [env.step(act)[1] for act in range(3)] == [1.0, 2.0, 3.0]


def test_evaluation_gives_every_game_an_environment(monkeypatch):
    seen, agent, clock = [], make_agent(tiny(image_size=32)), itertools.count(100, 11)  # due for a line after every step
    torch.nn.init.zeros_(agent.actor_critic.actor.weight)  # nearly uniform: games differ
    monkeypatch.setattr(jedi, "time", types.SimpleNamespace(time=lambda: next(clock)))
    monkeypatch.setattr(
        jedi, "print", lambda line, **_: seen.append(re.fullmatch(r"  (\d)/7 games played", line)[1]), raising=False
    )
    games = jedi.evaluate_policy(agent, "tests.toy:Catch-v0", 7, 2)
    assert len(games["returns"]) == len(games["lengths"]) == 7 and len(seen) == max(games["lengths"]) > min(games["lengths"])
    assert list(map(int, seen)) == [sum(length <= t for length in games["lengths"]) for t in range(1, len(seen) + 1)]
    assert games == jedi.evaluate_policy(agent, "tests.toy:Catch-v0", 7, 2)
    assert games["returns"] != jedi.evaluate_policy(agent, "tests.toy:Catch-v0", 7, 1)["returns"]


def test_the_toy_game_is_as_described():
    """A uniformly random policy gets about -0.5; one that moves under the ball, the optimum of 10."""
    env, rng, scores = Catch(), np.random.default_rng(0), {}
    policies = {"random": lambda: int(rng.integers(3)), "optimal": lambda: 1 + int(np.sign(env.column - env.paddle))}
    for name, policy in policies.items():
        env.reset(seed=0)
        scores[name] = []
        for _ in range(1000 if name == "random" else 10):
            total, end = 0.0, False
            while not end:
                _, reward, end, _, _ = env.step(policy())
                total += reward
            scores[name].append(total)
            env.reset()
    assert -0.6 < np.mean(scores["random"]) < -0.3 and set(scores["optimal"]) == {10.0}


# --------------------------------------------------------------------------------------------------------------------
# Hyperparameters
# --------------------------------------------------------------------------------------------------------------------
def documented_fields() -> dict[str, str]:
    """Fields of Args with a comment on their line, in the order of the file."""
    source = (ROOT / "jedi.py").read_text()
    return dict(
        re.findall(r"^    (\w+): [^\n]+? = [^#\n]+  # ([^\n]{10,})$", source[source.index("class Args:") :], flags=re.M)
    )


def hyperparameters() -> list[str]:
    names = [field.name for field in dataclasses.fields(jedi.Args)]
    return names[names.index("image_size") :]  # what stands before it says what to run and where


def test_every_field_is_documented_and_read():
    source, documented = (ROOT / "jedi.py").read_text(), documented_fields()
    read = set(re.findall(r"\bargs\.(\w+)", source))
    for field in dataclasses.fields(jedi.Args):
        assert field.name in documented, f"{field.name} has no comment"
        assert field.name in read, f"{field.name} is never read"
    for name in hyperparameters():
        assert re.search(r"\[[PDO]\b", documented[name]), f"{name} has no provenance"


def test_readme_table_holds_the_presets():
    """The last two columns of the README's hyperparameter table are Args and SMALL, and every hyperparameter has a row."""

    def numbers(text: str) -> list[float]:
        """5,000, 100 -> 5000, 100"""
        return [float(re.sub(r",(?=\d{3})", "", number)) for number in text.split(", ")]

    row = r"^\| `--([\w-]+)` \| [^|]* \| [^|]+ \| [^|]+ \| ([^|]+) \| ([^|]+) \|$"
    rows = re.findall(row, (ROOT / "README.md").read_text(), flags=re.M)
    assert {name.replace("_", "-") for name in hyperparameters()} <= {flag for flag, _, _ in rows}
    for flag, paper, small in rows:
        name, default = flag.replace("-", "_"), jedi.Args()
        for text, value in ((paper, getattr(default, name)), (small, jedi.SMALL.get(name, "="))):
            if isinstance(value, (str, bool)):
                assert text == {True: "yes", False: "no"}.get(value, value), (flag, text, value)
            else:
                assert numbers(text) == list(value if isinstance(value, tuple) else (value,)), (flag, text, value)


def with_echo_for_python(tmp_path: pathlib.Path, script: str, **options) -> str:
    """Output of a bash script in which every `python ...` only says so."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run(["bash", "-euc", script], env=env, text=True, check=True, stdout=subprocess.PIPE, **options).stdout


def test_readme_fork_example_works(tmp_path):
    """The README's command applies its diff to a copy of jedi.py; the direct predictor that it makes overfits one batch."""
    diff, command = re.search(r"```diff\n(.*?)```.*?```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S).groups()
    shutil.copy(ROOT / "jedi.py", tmp_path)
    for name in re.findall(r"[\w/.-]+\.(?:diff|patch)\b", command):
        (tmp_path / name).write_text(diff)
    with_echo_for_python(tmp_path, command, cwd=tmp_path, input=diff)
    assert (tmp_path / "jedi.py").read_bytes() == (ROOT / "jedi.py").read_bytes()
    spec = importlib.util.spec_from_file_location("jedi_mse", tmp_path / "jedi_mse.py")
    fork = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fork)
    args = fork.Args(**(fork.SMALL | TINY | dict(learning_rate=3e-3, **LONG)))
    trainer = fork.Trainer(args, 3, CPU)
    trainer.buffer.load_state_dict(filled_buffer(args).state_dict())
    batch = trainer.batch("world_model")
    trainer.batch, trainer.done["world_model"] = lambda phase: batch, 1
    losses = [update(trainer, "world_model")["losses/denoising"].item() for _ in range(150)]
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("name", ablations.VARIANTS)
def test_every_ablation_trains_and_imagines(name, tmp_path, monkeypatch):
    """What it replaces stands in jedi.py, once; an update and an imagination of what comes out are not those of jedi.py."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    outcomes = []
    for variant in ("full", name):
        module = ablations.load_variant(variant)
        args = module.Args(**(module.SMALL | TINY | LONG | dict(latent_bound=0.5) | ablations.VARIANTS[variant][1]))
        torch.manual_seed(0)
        trainer = module.Trainer(args, 3, CPU)
        fill_zeros(trainer.agent)
        trainer.buffer.load_state_dict(filled_buffer(args).state_dict())
        trainer.refresh()
        for _ in range(4):
            trainer.advance("world_model")
        numbers = module.measure(trainer.agent, trainer.batch("world_model"))
        assert all(value.isfinite() for value in trainer.sums.values()) and numbers["world_model/error_1"] > 0
        outcomes.append([value.clone() for value in trainer.agent.parameters()])
    assert all(map(torch.equal, *outcomes)) == (name == "full")


def test_paper_preset_has_the_published_size():
    agent = jedi.Agent(jedi.Args(), num_actions=4)
    assert sum(p.numel() for p in agent.parameters()) == pytest.approx(13.5e6, rel=0.05)
    assert agent.encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 16, 8, 8)


def test_flags_win_over_the_preset(capsys):
    args = jedi.parse_args(["--preset", "small", "--batch-size", "7", "--device", "cpu"])
    assert args.batch_size == 7 and args.lstm_dim == jedi.SMALL["lstm_dim"] and args.preset == "small"
    args = jedi.parse_args(["--preset", "paper", "--lstm-dim", "64"])
    assert args.lstm_dim == 64 and args.total_steps == 100_000
    assert jedi.parse_args(["--device", "cpu"]).preset == "small"
    for preset, steps in (("small", jedi.SMALL["total_steps"]), ("paper", 100_000)):  # the help shows the preset's values
        with pytest.raises(SystemExit):
            jedi.parse_args(["--preset", preset, "--help"])
        assert f"(default: {steps})" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------------
# Runs: determinism, resume, checkpoints
# --------------------------------------------------------------------------------------------------------------------
def run(runs_dir: pathlib.Path, **changes) -> tuple[dict, dict, pathlib.Path]:
    """One tiny run in this process: result, checkpoint, run directory."""
    args = tiny(runs_dir=str(runs_dir), **changes)
    run_dir = runs_dir / f"{jedi.game_name(args.env_id)}__{args.exp_name}__{args.seed}"
    return jedi.main(args), jedi.load_checkpoint(run_dir), run_dir


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run (which no test may change): result, checkpoint, run directory; and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        outcome = run(tmp_path_factory.mktemp("finished"))
    return *outcome, out.getvalue()


@pytest.fixture
def finished_copy(finished, tmp_path):
    """Its run directory, copied into tmp_path, where it may be changed."""
    return pathlib.Path(shutil.copytree(finished[2], tmp_path / finished[2].name))


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


def without_times(checkpoint: dict) -> dict:
    """A checkpoint without what depends on the wall clock (times are logged) and the place of the run."""
    return {key: value for key, value in checkpoint.items() if key not in ("seconds", "log_size")}


def metrics(run_dir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl, without times."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if "hours" not in key} for line in lines]


def signal_at(patch, phase: str, number: int, signum: int = signal.SIGINT) -> None:
    """Sends this process a signal during the number-th step or update of a phase."""
    advance = jedi.Trainer.advance

    def interrupting(self, name):
        if name == phase and self.done[phase] == number - 1:
            os.kill(os.getpid(), signum)
        return advance(self, name)

    patch.setattr(jedi.Trainer, "advance", interrupting)


def test_two_runs_with_one_seed_are_bit_equal(finished, tmp_path):
    first, first_checkpoint, run_dir, _ = finished
    second, second_checkpoint, second_dir = run(tmp_path)
    assert_equal(without_times(first_checkpoint), without_times(second_checkpoint))
    assert first["returns"] == second["returns"] and first["lengths"] == second["lengths"]
    assert metrics(run_dir) == metrics(second_dir)
    _, other_checkpoint, _ = run(tmp_path, seed=2)
    name = "actor_critic.actor.weight"
    assert not torch.equal(first_checkpoint["agent"][name], other_checkpoint["agent"][name])


def test_run_directory(finished):
    result, _, run_dir, _ = finished
    assert {path.name for path in run_dir.iterdir()} == {"args.json", "jedi.py", "metrics.jsonl", "ckpt.pt", "result.json"}
    assert (run_dir / "jedi.py").read_bytes() == (ROOT / "jedi.py").read_bytes()
    assert {
        "losses/denoising", "world_model/error_1", "latent/effective_rank", "latent/moving_std", "latent/change_rms",
        "imagination/return", "eval/episodic_return",
        "world_model/rewards_found", "world_model/no_reward_found", "world_model/ends_found",
    } <= set().union(*metrics(run_dir))  # fmt: skip
    assert json.loads((run_dir / "result.json").read_text()) == result
    assert result["preset"] == "small" and len(result["returns"]) == 3 and result["protocol"]["epsilon"] == 0.0
    assert result["protocol"]["sticky_actions"] == 0.0 and result["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("phase, number", [("world_model", 5), ("actor_critic", 2)])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, phase, number):
    """Updates, Ctrl-C, the same command again, the other updates == all updates, bit for bit, and so are the logs, in which
    what was written after the checkpoint, as by a process that was killed, is forgotten."""
    once = dict(total_steps=40)
    whole, whole_checkpoint, whole_dir = run(tmp_path / "whole", **once)
    with monkeypatch.context() as patch:
        signal_at(patch, phase, number)
        assert jedi.cli(flags(runs_dir=tmp_path / "parts", **once)) == 128 + signal.SIGINT
    stopped = jedi.load_checkpoint(tmp_path / "parts" / whole_dir.name)
    assert stopped["done"][phase] == number
    with open(tmp_path / "parts" / whole_dir.name / "metrics.jsonl", "a") as file:
        file.write('{"global_step": 41, "charts/episodic_return": 5.0}\n{"global_st')
    parts, parts_checkpoint, parts_dir = run(tmp_path / "parts", **once)
    assert_equal(without_times(whole_checkpoint), without_times(parts_checkpoint))
    assert parts["returns"] == whole["returns"] and metrics(parts_dir) == metrics(whole_dir)


def test_resume_while_collecting_goes_on_at_an_episode_boundary(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, "collect", 50, signal.SIGTERM)
        assert jedi.cli(flags(runs_dir=tmp_path)) == 128 + signal.SIGTERM
    state = jedi.load_checkpoint(next(tmp_path.iterdir()))
    assert int(state["replay"]["has_step"].sum()) == state["done"]["collect"] == 50 and state["done"]["world_model"] == 4
    result, checkpoint, run_dir = run(tmp_path)
    replay, size = checkpoint["replay"], len(state["replay"]["obs"])
    assert int(replay["has_step"].sum()) == 60 and result["global_step"] == 60
    assert not replay["has_step"][size - 1] and replay["first"][size] == size  # the open episode stays truncated
    steps = [line["global_step"] for line in metrics(run_dir)]
    assert steps == sorted(steps)


def test_stopped_before_anything_is_logged(tmp_path, monkeypatch, finished):
    """In the middle of the first game."""
    with monkeypatch.context() as patch:
        signal_at(patch, "collect", 1)
        assert jedi.cli(flags(runs_dir=tmp_path)) == 128 + signal.SIGINT
    assert jedi.cli(flags(runs_dir=tmp_path)) == 0
    (run_dir,) = tmp_path.iterdir()
    assert {path.name for path in run_dir.iterdir()} == {path.name for path in finished[2].iterdir()}
    assert json.loads((run_dir / "result.json").read_text())["global_step"] == 60


class SignallingClock:
    """A clock that sends a signal when it is read for the number-th time after `due`."""

    def __init__(self, due, number: int):
        self.due, self.number = due, number

    def time(self) -> float:
        if self.due():
            self.number -= 1
            if not self.number:
                os.kill(os.getpid(), signal.SIGTERM)
        return time.time()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_claimed_checkpoint_exists_whenever_the_signal_comes(tmp_path, monkeypatch, capsys, number):
    """The signal arrives between two statements of the loop, where the clock is read, at the end of a phase or near it."""
    trainers, construct = [], jedi.Trainer.__init__

    def remember(self, *inputs):
        construct(self, *inputs)
        trainers.append(self)

    monkeypatch.setattr(jedi.Trainer, "__init__", remember)
    due = lambda: trainers and trainers[0].done["world_model"] >= 3  # noqa: E731
    monkeypatch.setattr(jedi, "time", SignallingClock(due, number))
    assert jedi.cli(flags(runs_dir=tmp_path)) == 128 + signal.SIGTERM
    assert "with a checkpoint; the same command" in capsys.readouterr().out
    assert jedi.load_checkpoint(next(tmp_path.iterdir()))["done"] == trainers[0].done


def test_a_signal_during_the_final_games(tmp_path, monkeypatch, finished):
    play = jedi.evaluate_policy

    def interrupted(*inputs):
        os.kill(os.getpid(), signal.SIGINT)
        return play(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(jedi, "evaluate_policy", interrupted)
        assert jedi.cli(flags(runs_dir=tmp_path)) == 128 + signal.SIGINT
    (run_dir,) = tmp_path.iterdir()
    assert jedi.load_checkpoint(run_dir)["stage"] == 9 and not (run_dir / "result.json").exists()
    assert run(tmp_path)[0]["returns"] == finished[0]["returns"]


def test_kill_while_checkpointing_leaves_a_whole_checkpoint(tmp_path):
    """kill -9 at a random moment of processes that do nothing but write checkpoints."""
    script = (
        "import sys, pathlib, torch, jedi\n"
        "path, i = pathlib.Path(sys.argv[1]), 0\n"
        "while True:\n"
        "    i += 1\n"
        "    state = {'i': i, 'x': torch.full((2_000_000,), float(i))}\n"
        "    jedi.write(path, lambda file: torch.save(state, file))\n"
        "    print(i, flush=True)\n"
    )
    paths = {delay: tmp_path / f"{delay}.pt" for delay in (0.0, 0.011, 0.023)}
    start = lambda path: subprocess.Popen([sys.executable, "-c", script, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)  # noqa: E731
    for (delay, path), process in zip(paths.items(), [start(path) for path in paths.values()]):
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
        "jedi.write(path, lambda file: torch.save({'i': 1}, file))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    jedi.write(path, lambda file: torch.save({'i': 2, 'x': torch.zeros(1_000_000)}, file))\n"
        "except jedi.UsageError as error:\n"
        "    print(error)\n"
    )
    path = tmp_path / "ckpt.pt"
    out = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert "previous one is intact" in out.stdout and out.stdout.count("\n") == 1, out
    assert torch.load(path, weights_only=True)["i"] == 1 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("update, epoch", [(2, 1), (4, 1), (6, 2)])
def test_nan_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch, update, epoch):
    loss, calls = jedi.world_model_loss, []

    def poisoned(*inputs):
        calls.append(1)
        value, logs = loss(*inputs)
        return value, logs | {"losses/denoising": logs["losses/denoising"] * (math.nan if len(calls) == update else 1)}

    monkeypatch.setattr(jedi, "world_model_loss", poisoned)
    what = f"losses/denoising is nan .*epoch {epoch}/3 world_model {update if update > 2 else '[234]'}/{max(4, update)}"
    with pytest.raises(jedi.UsageError, match=what):
        run(tmp_path, checkpoint_minutes=0)
    kept = jedi.load_checkpoint(next(tmp_path.iterdir()))
    assert 4 * (epoch - 1) <= kept["done"]["world_model"] < update  # from before
    assert all(value.isfinite() for value in kept["sums"].values())


def test_learning_rates_fall_to_the_end(tmp_path, monkeypatch):
    """Of all updates, also of epochs that collect nothing. The bonus falls as the square."""
    update, rates, bonus = jedi.Trainer.update, {"world_model": [], "actor_critic": []}, []

    def recording(self, phase):
        update(self, phase)
        rates[phase].append(self.optimizers[phase].param_groups[-1]["lr"])
        bonus.extend([float(self.agent.ent_coef)] * (phase == "actor_critic"))

    monkeypatch.setattr(jedi.Trainer, "update", recording)
    schedule = dict(collect_steps=(20, 20), lr_decay=1.0, warmup_updates=(0, 0), learning_rate=1e-4)
    result, _, _ = run(tmp_path, **schedule)
    assert result["global_step"] == 60
    for values in rates.values():
        falling = [1e-4 * (1 - k / len(values)) for k in range(len(values))]
        assert len(values) > 5 and values == pytest.approx(falling)
    assert bonus == pytest.approx([jedi.SMALL["ent_coef"] * (rate / 1e-4) ** 2 for rate in rates["actor_critic"]])


def test_the_encoder_warms_up_on_its_own():
    """Both warm-ups are linear, and multiply the fall towards the end, which is the encoder's twice."""
    schedule = dict(warmup_updates=(2, 4), world_model_updates=(8, 2), encoder_lr_scale=0.5)
    trainer = make_trainer(tiny(**schedule, learning_rate=1.0, lr_decay=0.5, total_steps=40, final_epochs=0))
    trainer.compute_gradients, rates = lambda phase: {}, []
    for _ in range(8):
        trainer.advance("world_model")
        rates.append([group["lr"] for group in trainer.optimizers["world_model"].param_groups])
    fall = [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    encoder, *others = zip(*rates)
    assert encoder == pytest.approx([0.5 * min(1, (k + 1) / 4) * fall[k] ** 2 for k in range(8)])
    for values in others:
        assert values == pytest.approx([min(1, (k + 1) / 2) * fall[k] for k in range(8)])


def test_an_epoch_of_one_step(tmp_path):
    """What remains of the steps for the last epoch may be one."""
    result, _, run_dir = run(tmp_path, total_steps=41)
    assert result["global_step"] == 41
    assert [line["global_step"] for line in metrics(run_dir) if "world_model/error_1" in line] == [40, 41]


def test_a_result_needs_no_other_program(tmp_path, monkeypatch, finished):
    monkeypatch.setenv("PATH", str(tmp_path))
    result, _, run_dir = run(tmp_path)
    assert result["returns"] == finished[0]["returns"] and json.loads((run_dir / "result.json").read_text()) == result


class FakeTime:
    """A clock of 3 seconds a step or update, and standard output that remembers when it was written to."""

    def __init__(self, patch):
        self.now, self.writes, advance = 0.0, [], jedi.Trainer.advance

        def slow(trainer, phase):
            self.now += 3
            return advance(trainer, phase)

        patch.setattr(jedi, "time", types.SimpleNamespace(time=lambda: self.now))
        patch.setattr(jedi.Trainer, "advance", slow)
        patch.setattr(sys, "stdout", self)

    def write(self, text: str) -> int:
        self.writes.append((self.now, text))
        return len(text)

    def flush(self) -> None:
        pass


def test_a_line_every_ten_seconds(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        clock, play, draw = FakeTime(patch), jedi.evaluate_policy, jedi.F.gumbel_softmax

        def slow_step(logits):
            clock.now += 3
            return draw(logits)

        def slow_games(*inputs):
            patch.setattr(jedi.F, "gumbel_softmax", slow_step)
            return play(*inputs)

        patch.setattr(jedi, "evaluate_policy", slow_games)
        run(tmp_path, world_model_updates=(20, 2), actor_critic_updates=(20, 2))
    times = [now for now, _ in clock.writes]
    assert times[-1] > 300 and max(np.diff(times)) <= 10 + 3  # a line, and the update that was under way
    text = "".join(text for _, text in clock.writes)
    for phase in ("collect", "world_model", "actor_critic"):
        assert re.search(rf"^epoch 1/3 {phase} \d+/\d+, \S+ min to go", text, flags=re.M), phase


HEALTHY = {"latent/change_rms": 0.2, "world_model/error_1": 0.4}
SICK = {"latent/change_rms": 0.019, "world_model/error_1": 1.1}


@pytest.mark.parametrize("second, expected", [(HEALTHY, 0), (SICK, 1)], ids=["healthy", "sick"])
def test_warnings_of_collapse_and_of_a_wrong_world(tmp_path, monkeypatch, capsys, second, expected):
    """The first measurement, of an untrained model, may well be worse than no change."""
    measured = iter([HEALTHY | {"world_model/error_1": 1.5}, second])
    monkeypatch.setattr(jedi, "measure", lambda *inputs: next(measured))
    run(tmp_path)
    out = capsys.readouterr().out
    assert out.count("imagination is worse than 'no change'") == out.count("the encoder is collapsing") == expected


def test_width_that_no_group_of_32_divides(tmp_path):
    assert len(run(tmp_path, denoiser_channels=112, total_steps=40, final_epochs=0, eval_episodes=1)[0]["returns"]) == 1


def no_compiler(function, **options):
    """In torch.compile's place: what is raised on the way out hides the cause."""

    def call(*inputs, **kwargs):
        try:
            raise RuntimeError("Failed to find C compiler.\nPlease specify one")
        except RuntimeError:
            raise ValueError("capture was invalidated")

    return call


def test_what_cannot_be_compiled_goes_on_without(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", no_compiler)
    trainer = make_trainer(tiny(**LONG))
    trainer.accelerate(True)  # as on CUDA
    for _ in range(2):
        for phase in ("world_model", "actor_critic"):
            trainer.advance(phase)
    (line,) = capsys.readouterr().out.splitlines()
    assert "Failed to find C compiler." in line and "capture" not in line.replace("capturing", "")
    assert trainer.sums["losses/entropy"] > 0 and not trainer.fast


# --------------------------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------------------------
def flags(**changes) -> list[str]:
    words = []
    for name, value in (TINY | changes).items():
        words += ["--" + name.replace("_", "-"), *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def one_line_error(capsys, words: list[str], *expected: str) -> None:
    """The command line ends with exit code 2 and one line that holds what is expected."""
    assert jedi.cli(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in expected), error


gym.register("VectorObs-v0", lambda: gym.make("CartPole-v1").unwrapped)


class ContinuousActions(gym.Env):
    observation_space, action_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), gym.spaces.Box(-1, 1, (2,))


gym.register("Continuous-v0", ContinuousActions)

BAD_INPUT = {
    "unknown env": (dict(env_id="BraekoutNoFrameskip-v4"), ["--env-id BraekoutNoFrameskip-v4", "Did you mean"]),
    "unknown game": (dict(env_id="Braekout"), ["--env-id Braekout", "Did you mean", "Breakout"]),
    "unknown module": (dict(env_id="nowhere:Game-v0"), ["--env-id nowhere:Game-v0", "nowhere"]),
    "no image": (dict(env_id="VectorObs-v0"), ["--env-id VectorObs-v0", "uint8 images"]),
    "no discrete action": (dict(env_id="Continuous-v0"), ["--env-id Continuous-v0", "Discrete"]),
    "no such device": (dict(device="gpu"), ["--device gpu", "--device cpu"]),
    "image size": (dict(image_size=20), ["--image-size 20", "multiple of 8"]),
    "horizon": (dict(horizon=0), ["--horizon 0"]),
    "too few steps": (dict(total_steps=30), ["--total-steps 30", "40"]),
    "no autoregressive step": (dict(num_autoregressive_steps=0), ["--num-autoregressive-steps 0"]),
    "beyond the segment": (dict(num_autoregressive_steps=5), ["--num-autoregressive-steps 5", "to 4"]),
    "no episode": (dict(eval_episodes=0), ["--eval-episodes 0"]),
    "discount": (dict(gamma=5), ["--gamma 5"]),
    "probability": (dict(epsilon=2), ["--epsilon 2"]),
    "no unit": (dict(lstm_dim=0), ["--lstm-dim 0"]),
    "no condition": (dict(cond_channels=0), ["--cond-channels 0"]),
    "uneven condition": (dict(cond_channels=36), ["--cond-channels 36", "multiple of 8"]),
    "uneven width": (dict(denoiser_channels=20), ["--denoiser-channels 20", "multiple of 8"]),
    "learning rate": (dict(learning_rate=-1), ["--learning-rate -1"]),
    "not a number": (dict(ent_coef="nan"), ["--ent-coef nan"]),
    "seed": (dict(seed=-1), ["--seed -1"]),
    "no channels": (dict(encoder_channels=(0, 0, 0, 0)), ["--encoder-channels (0, 0, 0, 0)"]),
    "no weight": (dict(recency_weights=(0, 0, 0, 0)), ["--recency-weights"]),
    "negative weight": (dict(recency_weights=(1, -1)), ["--recency-weights (1.0, -1.0)"]),
    "unwritable directory": (dict(runs_dir="/proc/nowhere"), ["/proc/nowhere"]),
}


@pytest.mark.parametrize("changes, expected", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(tmp_path, capsys, changes, expected):
    one_line_error(capsys, flags(**{"runs_dir": tmp_path} | changes), *expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_device_asked_for_and_absent(capsys):
    one_line_error(capsys, flags(device="cuda"), "--device cuda: not available")


def test_compile_asked_for_and_impossible(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", no_compiler)
    one_line_error(capsys, flags(runs_dir=tmp_path, compile=True), "--compile", "Failed to find C compiler.")


def test_optional_logger_names_the_missing_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    one_line_error(capsys, [*flags(runs_dir=tmp_path), "--track"], "pip install wandb")


def test_an_id_with_sticky_actions_runs_and_says_so(tmp_path, capsys):
    budget = dict(total_steps=40, final_epochs=0, eval_episodes=1)
    result, _, run_dir = run(tmp_path, env_id="ALE/Breakout-v5", **budget)
    out, share = capsys.readouterr().out, (result["mean_return"] - 1.7) / (30.5 - 1.7)
    assert "warning: ALE/Breakout-v5 repeats the last action" in out
    assert f"random play scores 1.7, a human 30.5: {share:.0%} of the way" in out.splitlines()[-1]
    assert result["protocol"]["sticky_actions"] == 0.25
    assert result["game"] == "Breakout" and run_dir.name.startswith("Breakout__")
    env = jedi.make_env("ALE/Breakout-v5", 0)
    assert env.unwrapped.ale.getFloat("repeat_action_probability") == 0.25
    one_line_error(capsys, flags(runs_dir=tmp_path, env_id="Breakout", **budget), "--env-id ALE/Breakout-v5, not Breakout")


def test_a_finished_run_says_so(finished, finished_copy, capsys):
    before = {path: path.read_bytes() for path in finished_copy.iterdir()}
    assert jedi.cli(flags(runs_dir=finished_copy.parent)) == 0
    assert f"has finished: score {finished[0]['mean_return']:.2f}" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in finished_copy.iterdir()} == before
    (finished_copy / "ckpt.pt").unlink()  # it holds the replay, and is large
    del before[finished_copy / "ckpt.pt"]
    jedi.cli(flags(runs_dir=finished_copy.parent, batch_size=5))
    assert {path: path.read_bytes() for path in finished_copy.iterdir()} == before


def test_a_run_directory_takes_its_own_run_only(finished_copy, monkeypatch, capsys):
    words, path = flags(runs_dir=finished_copy.parent), finished_copy / "ckpt.pt"
    whole = path.read_bytes()
    one_line_error(capsys, [*words, "--batch-size", "5"], str(finished_copy), "--batch-size 4, not 5", "--exp-name")
    assert jedi.cli([*words, "--checkpoint-minutes", "5"]) == 0  # what does not change the run may change
    fork = finished_copy.parent / "jedi.py"
    fork.write_text((ROOT / "jedi.py").read_text() + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(jedi, "SCRIPT", fork)
        one_line_error(capsys, words, str(finished_copy), "holds a run of another script", "--exp-name")
    args = json.loads((finished_copy / "args.json").read_text())
    (finished_copy / "args.json").write_text(json.dumps(args | {"device": "cuda"}))
    one_line_error(capsys, words, str(finished_copy), "--device cuda, not cpu", "--exp-name")
    (finished_copy / "args.json").write_text(json.dumps(args))
    (finished_copy / "result.json").unlink()  # only a run that has not finished needs its checkpoint
    path.write_bytes(whole[: len(whole) // 2])
    one_line_error(capsys, words, "ckpt.pt", "no whole checkpoint", "delete it")


def test_evaluate_refuses_another_agent(finished_copy, tmp_path, capsys):
    args = json.loads((finished_copy / "args.json").read_text())
    for changes, reason in (({"lstm_dim": 8}, "size mismatch"), ({"no_such_field": 1}, "no_such_field")):
        (finished_copy / "args.json").write_text(json.dumps(args | changes))
        assert evaluate.main(["--checkpoint", str(finished_copy), "--device", "cpu"]) == 2
        assert re.search(f"another jedi.py .*{reason}.*use the one in there", capsys.readouterr().err)
    assert evaluate.main(["--checkpoint", str(tmp_path / "nowhere")]) == 2
    assert "nowhere/ckpt.pt: no whole checkpoint there" in capsys.readouterr().err


def test_the_agent_of_the_repository_can_be_loaded():
    """The one that the README shows."""
    run = evaluate.Run(ROOT / "results" / "catch_agent", "cpu", 0)
    assert run.source.game_name(run.args.env_id) == "Catch" and run.agent.num_actions == 3 and run.replay.size == 0
    kept = json.loads((ROOT / "results" / "catch_agent" / "args.json").read_text())
    assert kept | json.loads(json.dumps(vars(run.args))) == kept


def test_evaluate_plays_a_checkpoint(finished, finished_copy, tmp_path, capsys):
    """evaluate.py --checkpoint on a real run: the same agent, seed and games as the final score, and the run as it was."""
    result, before = finished[0], {path: path.read_bytes() for path in finished_copy.iterdir()}
    words = ["--episodes", "3", "--seed", "10001", "--device", "cpu", "--out", str(tmp_path / "again.json")]
    assert not evaluate.main(["--checkpoint", str(finished_copy), *words])
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["returns"] == result["returns"] and again["protocol"] == result["protocol"]
    assert {path: path.read_bytes() for path in finished_copy.iterdir()} == before
    (finished_copy / "ckpt.pt").write_bytes((finished_copy / "ckpt.pt").read_bytes()[:1000])
    assert evaluate.main(["--checkpoint", str(finished_copy)]) == 2 and "no whole checkpoint" in capsys.readouterr().err


def test_what_a_run_prints(finished):
    _, checkpoint, run_dir, out = finished
    lines, encoder = out.splitlines(), [x for name, x in checkpoint["agent"].items() if name.startswith("encoder.net.")]
    about = f"{run_dir}: small preset, cpu, 60 steps, parameters encoder {sum(x.numel() for x in encoder):,}, "
    assert lines[0].startswith(about) and all(f"{name} " in lines[0] for name in ("denoiser", "reward_end", "actor_critic"))
    status, number = [line for line in lines if line.startswith("epoch ")], r"(-?\d+\.\d+|nan)"
    found = rf"return {number} error {number} rewards found {number}"
    done = [("collect", 40), ("world_model", 4), ("actor_critic", 3), ("collect", 60), ("world_model", 6), ("actor_critic", 5)]
    done += [("world_model", 8), ("actor_critic", 7)]  # the last epoch collects nothing
    for line, epoch, (phase, n) in zip(status, (1, 1, 1, 2, 2, 2, 3, 3), done, strict=True):
        assert (
            re.fullmatch(rf"epoch {epoch}/3 {phase} {n}/{n}, ([\d.]+|\?) min to go \| {found}", line) and len(line) <= 100
        ), line
    assert " 0.0 min to go" in status[-1]
    assert lines[-1].startswith("score ")


def test_command_line_end_to_end(tmp_path):
    command = [sys.executable, "jedi.py", *flags(runs_dir=tmp_path)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0 and not out.stderr and out.stdout.splitlines()[-1].startswith("score "), out


def test_a_fork_is_stopped_and_goes_on_as_itself(tmp_path):
    """As a user runs it: train, Ctrl-C, the command that it prints, score. Its source, not the original's, is in its run."""
    fork, runs_dir = tmp_path / "jedi_x.py", tmp_path / "runs"
    fork.write_text((ROOT / "jedi.py").read_text() + "\n# a fork\n")
    words = flags(runs_dir=runs_dir, exp_name="x", final_epochs=25)
    options = dict(env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, text=True)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "jedi_x.py", *words], **options, **pipes)
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    process.send_signal(signal.SIGINT)
    rest, error = process.communicate(timeout=600)
    assert process.returncode == 130 and not error, (rest, error)
    (run_dir,) = runs_dir.iterdir()
    assert run_dir.name == "Catch__x__1" and (run_dir / "jedi_x.py").read_bytes() == fork.read_bytes()
    assert not (run_dir / "jedi.py").exists() and jedi.load_checkpoint(run_dir)["stage"] < 75
    python, *again = shlex.split(re.search(r"goes on from there: (.*)", rest)[1])
    assert python == "python" and again == ["jedi_x.py", *words]
    out = subprocess.run([sys.executable, *again], **options, timeout=600, capture_output=True)
    assert out.returncode == 0 and not out.stderr and "epoch 1/" not in out.stdout and "score " in out.stdout, out


# --------------------------------------------------------------------------------------------------------------------
# Slow: learning, and the compiled path
# --------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def runs_dir(tmp_path) -> pathlib.Path:
    """JEDI_RUNS, where runs are kept, go on and are not repeated; else a directory for this test alone."""
    return pathlib.Path(os.environ.get("JEDI_RUNS") or tmp_path).resolve()


def small(runs_dir: pathlib.Path, game: str, seed: int, exp_name: str = "jedi") -> list[str]:
    """Flags: the small preset as it is."""
    words = f"--env-id tests.toy:{game}-v0 --preset small --device cpu --seed {seed} --exp-name {exp_name} --runs-dir"
    return [*words.split(), str(runs_dir)]


def learn(runs_dir: pathlib.Path, game: str, seed: int, exp_name: str = "jedi", *words: str) -> dict:
    """Result of the small preset, by the command line."""
    command = [sys.executable, "jedi.py", *small(runs_dir, game, seed, exp_name), *words]
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((runs_dir / f"{game}__{exp_name}__{seed}" / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_learns_the_toy_game(runs_dir, seed):
    start, result = time.time(), learn(runs_dir, "Catch", seed)
    assert result["mean_return"] >= 8
    assert max(time.time() - start, result["wall_time_s"]) < 15 * 60


@pytest.mark.slow
def test_does_not_learn_with_shuffled_actions(runs_dir, monkeypatch):
    """The negative control: same budget, but the world model cannot know what the actions do."""
    monkeypatch.setattr(jedi.Trainer, "batch", atari_cpu.shuffled_batch)
    assert jedi.main(jedi.parse_args(small(runs_dir, "Catch", 1, "shuffled")))["mean_return"] < 4


@pytest.mark.slow
def test_a_learned_encoder_beats_its_frozen_twin_in_noise(runs_dir):
    """On a background that nobody can predict, what the joint embedding drops decides."""
    learned, frozen = (
        np.mean([learn(runs_dir, "NoisyCatch", seed, *words)["mean_return"] for seed in (1, 2, 3)])
        for words in (["jedi"], ["frozen", "--encoder-lr-scale", "0"])
    )
    assert learned >= frozen + 3, (learned, frozen)


@pytest.mark.slow
def test_breakout_imagination_is_determined_by_its_seed(tmp_path):
    """tests/breakout_imagination.py, twice with one seed and once with another."""
    curves = []
    for seed, out in ((1, "a"), (1, "b"), (2, "c")):
        command = [sys.executable, "tests/breakout_imagination.py", "--updates", "6", "--eval-every", "4", "--frames", "1500"]
        subprocess.run([*command, "--device", "cpu", "--seed", str(seed), "--out", tmp_path / out], cwd=ROOT, check=True)
        lines = map(json.loads, (tmp_path / out).read_text().splitlines())
        curves.append([{key: value for key, value in line.items() if key != "minutes"} for line in lines])
    assert [line["updates"] for line in curves[0]] == [0, 4, 6] and curves[0] == curves[1] != curves[2]


def test_imagination_compiles_once(monkeypatch):
    """One graph for all steps of all rollouts: nothing about its input changes from one to the next."""
    graphs, compile_ = [], torch.compile

    def count(graph, example_inputs, **options):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend=count))
    torch._dynamo.reset()
    args = tiny(**LONG, compile=True)
    trainer = make_trainer(args)
    for _ in range(3):
        batch = trainer.batch("actor_critic")
        z = trainer.agent.encoder(batch.obs).detach()
        jedi.imagine(trainer.agent, z, batch.act, batch.real, args.horizon, step=trainer.imagine_step)
    assert len(graphs) == 1


@pytest.mark.slow
def test_compiled_equals_eager(monkeypatch):
    """Inductor on the CPU: losses, gradients and the sampler on the same noise."""
    args = tiny()
    monkeypatch.setattr(torch._inductor.config, "fallback_random", True)  # the random numbers of eager mode
    outcomes = []
    for compile_ in (False, True):
        trainer = make_trainer(dataclasses.replace(args, compile=compile_))
        agent, batch = trainer.agent, trainer.batch("world_model", torch.Generator().manual_seed(0))
        loss, _ = seeded(trainer.world_model_loss, agent, batch)
        loss.backward()
        context = agent.encoder(batch.obs[:, :4]).detach(), batch.act[:, :4], batch.real[:, :4]
        rollout = seeded(functools.partial(jedi.imagine, step=trainer.imagine_step), agent, *context, args.horizon)
        policy_loss, _ = trainer.actor_critic_loss(agent, rollout)
        policy_loss.backward()
        outcomes.append([loss, policy_loss, rollout.z, *(parameter.grad for parameter in agent.parameters())])
    for eager, compiled in zip(*outcomes):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)
