"""Tests of the algorithm in jedi.py: replay, networks, diffusion, imagination, losses."""

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.testing import assert_close

import jedi
from tests.chain import roc_auc
from tests.tiny import CPU, make_agent, make_batch, make_replay, seeded, tiny

L = 4  # conditioning steps of tiny()
H = 3  # its horizon


# ---------------------------------------------------------------------------------- Diffusion
def test_preconditioning():
    """Input and target of the U-Net have variance one. Without noise nothing changes."""
    args = tiny()
    sigma = torch.logspace(-4, 2, 50, dtype=torch.float64)
    coefficients = make_agent(args).denoiser.precondition(sigma)
    c_in, c_out, c_skip, c_noise = [c.flatten() for c in coefficients]
    signal = args.sigma_data**2
    noise = sigma**2
    one = torch.ones_like(sigma)
    assert_close(c_in**2 * (signal + noise), one)
    assert_close(((1 - c_skip) ** 2 * signal + c_skip**2 * noise) / c_out**2, one)
    assert_close(c_noise, sigma.log() / 4)
    assert c_skip[0] > 0.999999
    assert c_out[0] < 1.1e-4


def test_karras_sigmas():
    """The levels are evenly spaced in sigma^(1/rho)."""
    halfway = ((5 ** (1 / 7) + 2e-3 ** (1 / 7)) / 2) ** 7
    assert jedi.karras_sigmas(3, 2e-3, 5.0, 7.0) == pytest.approx([5.0, halfway, 2e-3, 0.0])
    assert jedi.karras_sigmas(1, 2e-3, 5.0, 7.0) == pytest.approx([5.0, 0.0])


def sample(denoise, sigmas, noise):
    """Sends unit noise [N, D] through Denoiser.sample, with denoise(z, sigma) for a network."""
    denoiser = make_agent(tiny(latent_bound=1e6)).denoiser

    def unet(z_in, c_noise, z_hist, act_hist):
        sigma = (4 * c_noise.double()).exp()  # [N]
        c_in, c_out, c_skip, _ = denoiser.precondition(sigma)
        z = z_in / c_in
        clean = denoise(z.flatten(1), sigma[0].item())
        return (clean[..., None, None] - c_skip * z) / c_out

    denoiser.unet = unet
    denoiser.sigmas = sigmas
    return denoiser.sample(None, None, noise[..., None, None]).flatten(1)


def mixture(modes, weights, std):
    """Makes the exact denoiser of data that lies within std of one of the modes [M, D]."""

    def denoise(z, sigma):
        variance = std**2 + sigma**2
        distance = (z[:, None] - modes).square().sum(2)  # [N, M]
        posterior = torch.softmax(weights.log() - distance / (2 * variance), dim=1)
        return (std**2 * z + sigma**2 * (posterior @ modes)) / variance

    return denoise


def test_sampler_recovers_a_mixture_of_gaussians():
    std = 0.1
    modes = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    denoise = mixture(modes, torch.tensor([0.3, 0.7]), std)
    noise = seeded(torch.randn, 20_000, 1).double()
    z = sample(denoise, jedi.karras_sigmas(200, sigma_max=80.0), noise)
    assert (z > 0).double().mean().item() == pytest.approx(0.7, abs=0.02)
    for mode in (-1.0, 1.0):
        near = z[(z - mode).abs() < 0.6]
        assert near.mean().item() == pytest.approx(mode, abs=0.02)
        assert near.std().item() == pytest.approx(std, abs=0.02)


def test_sampler_draws_what_is_far_from_the_mean():
    """Each of eight equal modes on a line is drawn.

    From unit noise at sigma 5 the outer four are not.
    """
    modes = torch.linspace(-1, 1, 8).double()[:, None]
    denoise = mixture(modes, torch.full((8,), 1 / 8), 0.02)
    shares = []
    for scale in (1.0, 1 / 5):
        noise = scale * seeded(torch.randn, 20_000, 1).double()
        z = sample(denoise, jedi.karras_sigmas(20), noise)
        nearest = (z - modes.T).abs().argmin(1)
        shares.append(torch.bincount(nearest, minlength=8) / 20_000)
    assert shares[0].min() > 0.08
    assert shares[1][[0, 1, 6, 7]].max() < 0.001


def test_sampler_denoises_once_at_every_level():
    seen = []

    def denoise(z, sigma):
        seen.append(sigma)
        return torch.full_like(z, 2.0)

    z = sample(denoise, [4.0, 2.0, 1.0, 0.0], torch.zeros(1, 1).double())
    assert seen == pytest.approx([4.0, 2.0, 1.0])
    assert z.item() == pytest.approx(2.0)


def test_a_sampled_latent_keeps_the_bound():
    """The helper's bound is 1e6."""
    noise = torch.zeros(1, 1).double()
    z = sample(lambda z, sigma: torch.full_like(z, 1e9), [4.0, 2.0, 0.0], noise)
    assert z.item() == pytest.approx(1e6)


# ---------------------------------------------------------------------------------- Gradients
def seed_of_switch(feed_own):
    """Finds a seed with which the loss feeds on own latents, or not: it tosses this coin first."""
    for seed in range(20):
        if (seeded(torch.rand, (), seed=seed) < 0.5) == feed_own:
            return seed


@pytest.mark.parametrize("feed_own", [False, True])
def test_gradient_reaches_the_encoder_through_the_context_only(feed_own):
    """The first target is in the second context, where the denoiser's own latent may replace it."""
    args = tiny()
    denoiser = make_agent(args).denoiser
    T = L + args.num_autoregressive_steps
    z = seeded(torch.randn, 4, T, 4, 2, 2).requires_grad_()
    act = torch.zeros(4, T, dtype=torch.long)
    real = torch.ones(4, T, dtype=torch.bool)
    loss = seeded(denoiser.loss, z, act, real, seed=seed_of_switch(feed_own))
    loss.backward()
    size = z.grad.square().sum((0, 2, 3, 4))  # [T]
    assert (size[:L] > 0).all()  # the first context
    assert (size[L] > 0) == (not feed_own)  # the first target, which is in the second context
    assert size[L + 1] == 0  # the last target


def test_no_gradient_flows_through_a_latent_that_was_fed_back():
    """Only the second target counts.

    The first latent is not in its context, but made a latent that is.
    """
    args = tiny()
    denoiser = make_agent(args).denoiser
    z = seeded(torch.randn, 4, L + 2, 4, 2, 2).requires_grad_()
    act = torch.zeros(4, L + 2, dtype=torch.long)
    real = torch.ones(4, L + 2, dtype=torch.bool)
    real[:, L] = False
    loss = seeded(denoiser.loss, z, act, real, seed=seed_of_switch(True))
    loss.backward()
    assert not z.grad[:, 0].any()
    assert z.grad[:, 1].any()


def test_random_switching_feeds_the_denoisers_own_latents():
    """With own latents the second context holds the denoiser's output, else the encoder's."""
    args = tiny()
    denoiser = make_agent(args).denoiser
    seen = []
    unet = denoiser.unet

    def spy(z_in, c_noise, z_hist, act_hist):
        seen.append(z_hist)
        return unet(z_in, c_noise, z_hist, act_hist)

    denoiser.unet = spy
    z = seeded(torch.randn, 4, L + 2, 4, 2, 2)
    act = torch.zeros(4, L + 2, dtype=torch.long)
    real = torch.ones(4, L + 2, dtype=torch.bool)
    for feed_own in (False, True):
        seen.clear()
        seeded(denoiser.loss, z, act, real, seed=seed_of_switch(feed_own))
        assert torch.equal(seen[0], z[:, :L])
        second = seen[1]
        assert torch.equal(second[:, :-1], z[:, 1:L])
        assert torch.equal(second[:, -1], z[:, L]) == (not feed_own)
        assert len(seen) == 2


def networks_with_gradient(agent):
    names = set()
    for name, parameter in agent.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            names.add(name.split(".")[0])
    return names


def imagined(agent, batch, actions=None, step=jedi.imagine_step):
    """The rollout of H steps that begins at the anchors."""
    obs = batch.obs[:, :L]
    with torch.no_grad():
        z = agent.encoder(obs)
    act = batch.act[:, :L]
    real = batch.real[:, :L]
    return jedi.imagine(agent, z, act, real, H, actions, step)


def test_each_loss_trains_its_own_networks():
    agent = make_agent(tiny())
    batch = make_batch(agent.args)
    loss, _ = jedi.actor_critic_loss(agent, imagined(agent, batch))
    loss.backward()
    assert networks_with_gradient(agent) == {"actor_critic"}
    agent.zero_grad()
    loss, _ = jedi.world_model_loss(agent, batch)
    loss.backward()
    assert networks_with_gradient(agent) == {"encoder", "denoiser", "reward_end"}


def test_the_policy_never_trains_the_encoder():
    """Even if somebody hands it latents with a gradient."""
    agent = make_agent(tiny())
    rollout = imagined(agent, make_batch(agent.args))
    z = rollout.z.clone().requires_grad_()
    loss, _ = jedi.actor_critic_loss(agent, rollout._replace(z=z))
    loss.backward()
    assert z.grad is None


@pytest.mark.parametrize("part", ["rew", "end"])
def test_rewards_and_ends_train_the_encoder(part):
    """Other rewards, or other ends, give the encoder another gradient; all else is the same."""
    agent = make_agent(tiny())
    batch = make_batch(agent.args)
    other = {"rew": -batch.rew, "end": 1 - batch.end}
    gradients = []
    for labels in (batch, batch._replace(**{part: other[part]})):
        loss, _ = seeded(jedi.world_model_loss, agent, labels)
        gradients.append(torch.autograd.grad(loss, agent.encoder.net[0].weight)[0])
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()


# ---------------------------------------------------------------------------------- Encoder
def test_the_paper_preset_has_the_published_size():
    agent = jedi.Agent(jedi.PRESETS["paper"], num_actions=4)
    size = sum(parameter.numel() for parameter in agent.parameters())
    assert 13.2e6 < size < 13.8e6
    size = sum(parameter.numel() for parameter in agent.encoder.parameters())
    assert 33_500 < size < 34_500
    assert agent.encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 16, 8, 8)


def test_the_encoder_sees_frames_between_0_and_1_and_keeps_its_bound():
    encoder = make_agent(tiny(sigma_data=100.0)).encoder
    frames = []
    encoder.net.register_forward_pre_hook(lambda net, inputs: frames.append(inputs[0]))
    z = encoder(torch.randint(0, 256, (8, 3, 3, 16, 16), dtype=torch.uint8))
    assert z.shape == (8, 3, 4, 2, 2)
    assert 0 <= frames[0].min() < 0.01
    assert 0.99 < frames[0].max() <= 1
    assert 2.9 < z.abs().max() <= 3


def mean_rms(z):
    """Mean over frames of the rms of each, z [N, C, h, w]."""
    return z.square().mean((1, 2, 3)).sqrt().mean()


def test_latents_are_normalised_by_the_batch_or_by_running_statistics():
    args = tiny(latent_bound=1e6)
    encoder = make_agent(args).encoder
    batch = make_batch(args)
    real = batch.real

    def error():
        return (encoder(batch.obs) - encoder(batch.obs, real))[real].square().mean().sqrt()

    assert error() > 0.1 * args.sigma_data
    for _ in range(100):
        z = encoder(batch.obs, real)
    assert z[real].mean(0).abs().max() < 1e-4  # every position is centered
    assert mean_rms(z[real]).item() == pytest.approx(args.sigma_data, rel=1e-3)
    assert error() < 1e-3 * args.sigma_data
    frozen = copy.deepcopy(encoder.state_dict())
    encoder(255 - batch.obs)
    assert torch.equal(encoder.center, frozen["center"])  # looking does not move the statistics
    assert torch.equal(encoder.scale, frozen["scale"])


def gradient_size(loss, encoder):
    gradients = torch.autograd.grad(loss, list(encoder.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients]).norm().item()


def test_a_latent_that_stands_still_wins_nothing():
    """A loss that rewards standing still has no gradient. With plain normalisation it has one."""
    args = tiny(latent_bound=1e6)
    encoder = make_agent(args).encoder
    batch = make_batch(args)
    real = batch.real

    def motion(z):
        both = real[:, 1:] & real[:, :-1]
        return mean_rms((z[:, 1:] - z[:, :-1])[both])

    x = encoder.net(batch.obs.flatten(0, 1) / 255).unflatten(0, real.shape)
    x = x - x[real].mean(0)
    plain = args.sigma_data * x / mean_rms(x[real])
    z = encoder(batch.obs, real)
    assert_close(z, plain, rtol=1e-3, atol=1e-4)  # the values are the same
    assert gradient_size(motion(plain), encoder) > 1e-2
    assert gradient_size(motion(z), encoder) < 1e-3 * gradient_size(motion(plain), encoder)
    assert gradient_size(z[:, 0].square().mean(), encoder) > 1e-2  # another loss does reach it


def test_the_scale_of_what_moves_is_free():
    """The derivative of any loss along the scale of the encoder's output is zero."""
    args = tiny()
    encoder = make_agent(args).encoder
    batch = make_batch(args)
    scale = torch.ones((), requires_grad=True)
    encoder.net.register_forward_hook(lambda net, inputs, output: scale * output)
    z = encoder(batch.obs, batch.real)
    loss = (z * seeded(torch.randn, z.shape)).sin().sum()
    along, weight = torch.autograd.grad(loss, [scale, encoder.net[0].weight])
    assert abs(along) < 1e-4 * weight.norm()
    assert weight.norm() > 0


@pytest.mark.parametrize("episodes", [((9, True), (9, True)), ((20, True),)])
def test_a_picture_that_never_moves_gives_no_nan(episodes):
    """Each episode shows one colour: the latent stands still, within an episode or at all."""
    agent = make_agent(tiny())
    batch = make_batch(agent.args, episodes=episodes, show=lambda slot: 200 * (slot > 9))
    still = batch._replace(obs=batch.obs[:, :1].expand_as(batch.obs))
    loss, logs = jedi.world_model_loss(agent, still)
    loss.backward()
    assert loss.isfinite()
    for parameter in agent.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
    for buffer in agent.encoder.buffers():
        assert buffer.isfinite().all()


# ---------------------------------------------------------------------------------- Replay
def test_a_segment_is_aligned():
    """obs[t] --act[t], rew[t], end[t]--> obs[t+1]. Frames show their number."""
    args = tiny()
    replay = jedi.ReplayBuffer(args, CPU)
    last = 11

    def frame(t):
        return np.full((3, 16, 16), t, np.uint8)

    replay.start_episode(frame(0))
    for t in range(last):
        replay.add(act=t % 5, rew=t - 4.0, end=t == last - 1, next_obs=frame(t + 1))
    batch = replay.sample(torch.arange(last), L - 1, H)
    number = batch.obs[:, :, 0, 0, 0].long()  # [B, T] of the frame
    expected = torch.arange(last)[:, None] + torch.arange(1 - L, H + 1)
    assert torch.equal(number, expected.clamp(0, last))
    assert torch.equal(batch.real, (expected >= 0) & (expected <= last))
    assert torch.equal(batch.has_act, (expected >= 0) & (expected < last))
    has = batch.has_act
    assert torch.equal(batch.act[has], number[has] % 5)
    assert torch.equal(batch.rew[has], (number[has] - 4.0).sign())
    assert torch.equal(batch.end[has] == 1, number[has] == last - 1)


def test_segments_keep_to_their_episode():
    """Episodes have 5, 9 and 12 steps. Padding repeats their first frame, without action."""
    args = tiny()
    starts = torch.tensor([0, 6, 16])  # a last frame has a slot, too
    batch = make_batch(args, batch_size=500, show=lambda slot: slot)
    slot = batch.obs[:, :, 0, 0, 0].long()  # [B, T]
    episode = torch.bucketize(slot, starts, right=True)
    anchor = slot[:, L - 1]
    assert batch.has_act[:, L - 1].all()
    real = batch.real
    assert (episode == episode[:, L - 1 : L])[real].all()
    before = ~real & (torch.arange(L + H) < L)
    first = starts[episode[:, L - 1] - 1]
    assert before.any()
    assert torch.equal(slot[before], first[:, None].expand_as(slot)[before])
    wanted = anchor[:, None] + torch.arange(1 - L, H + 1)
    assert torch.equal(slot[real], wanted[real])
    assert (~real[:, L:]).any()
    assert not batch.act[~batch.has_act].any()


def test_many_short_episodes():
    batch = make_batch(tiny(), batch_size=200, episodes=((1, True),) * 40)
    assert (batch.real.sum(1) == 2).all()  # the frame with the only action, and the final one
    assert (batch.has_act.sum(1) == 1).all()
    assert (batch.end[:, L - 1] == 1).all()


def test_truncation_is_not_an_end():
    batch = make_batch(tiny(), batch_size=100, episodes=((6, False), (6, False)))
    assert not batch.end.any()
    assert not batch.real.all()  # the segment ends all the same
    batch = make_batch(tiny(), batch_size=100, episodes=((6, True), (6, True)))
    assert batch.end.any()


def test_recent_parts_of_the_recording_are_drawn_more_often():
    """The four parts of 22 slots are equal parts of the recording, whatever its episodes are."""
    replay = make_replay(tiny(), episodes=((10, True), (42, True), (33, False)))
    torch.manual_seed(0)
    anchor = replay.anchors(40_000)
    assert replay.size == 88
    counts = torch.bincount(anchor // 22, minlength=4) / 40_000
    assert_close(counts, torch.tensor([0.1, 0.1, 0.1, 0.7]), atol=0.01, rtol=0)
    assert replay.data["has_act"][anchor].all()
    assert len(anchor.unique()) == 85


# ---------------------------------------------------------------------------------- Losses
def test_padding_never_enters_the_world_models_loss():
    agent = make_agent(tiny())
    batch = make_batch(agent.args)
    after = ~batch.real & (torch.arange(L + H) >= L)
    assert after.any()
    changed = batch._replace(
        obs=torch.where(after[..., None, None, None], 255 - batch.obs, batch.obs),
        act=torch.where(after, 2, batch.act),
        rew=torch.where(batch.has_act, batch.rew, 1.0),
        end=torch.where(batch.has_act, batch.end, 1),
    )
    loss, _ = seeded(jedi.world_model_loss, agent, batch)
    same, _ = seeded(jedi.world_model_loss, agent, changed)
    assert_close(same, loss)
    other, _ = seeded(jedi.world_model_loss, agent, batch._replace(rew=-batch.rew))
    assert other != loss  # what is real does enter


@pytest.mark.parametrize("network", ["actor_critic", "reward_end"])
def test_lstms_ignore_padding(network):
    agent = make_agent(tiny())
    z = torch.randn(2, 5, 4, 2, 2)
    act = torch.ones(2, 5, dtype=torch.long)
    real = torch.tensor([[False, False, True, True, True]] * 2)
    if network == "actor_critic":
        padded = agent.actor_critic(z, real)[0]
        alone = agent.actor_critic(z[:, 2:])[0]
    else:
        padded = agent.reward_end(z, act, real)[0]
        alone = agent.reward_end(z[:, 2:], act[:, 2:], real[:, 2:])[0]
    assert_close(padded[:, 2:], alone)


def n_step_return(rew, end, value, t, n, gamma):
    """r_t + gamma r_{t+1} + ... + gamma^n V_{t+n}, which stops at an end."""
    total = 0.0
    for k in range(n):
        total += gamma**k * rew[t + k]
        if end[t + k]:
            return total
    return total + gamma**n * value[t + n]


def lambda_return(rew, end, value, t, gamma, lambda_):
    """By definition: (1 - lambda) lambda^(n-1) of each G_n. The longest takes the other weight."""
    longest = len(rew) - t
    total = lambda_ ** (longest - 1) * n_step_return(rew, end, value, t, longest, gamma)
    for n in range(1, longest):
        total += (1 - lambda_) * lambda_ ** (n - 1) * n_step_return(rew, end, value, t, n, gamma)
    return total


def test_lambda_returns_against_the_definition():
    torch.manual_seed(0)
    rew = torch.randn(20, 7).double()
    end = (torch.rand(20, 7) < 0.2).double()
    value = torch.randn(20, 8).double()
    returns = jedi.lambda_returns(rew, end, value, 0.9, 0.8)
    for b in range(20):
        for t in range(7):
            expected = lambda_return(rew[b], end[b], value[b], t, 0.9, 0.8)
            assert returns[b, t].item() == pytest.approx(expected.item())


def test_a_truncation_bootstraps_and_an_end_does_not():
    rew = torch.zeros(1, 2)
    value = torch.full((1, 3), 10.0)
    goes_on = torch.tensor([[0.0, 0.0]])  # beyond the horizon
    ends = torch.tensor([[0.0, 1.0]])
    assert jedi.lambda_returns(rew, goes_on, value, 0.5, 1.0).tolist() == [[2.5, 5.0]]
    assert jedi.lambda_returns(rew, ends, value, 0.5, 1.0).tolist() == [[0.0, 0.0]]


def test_no_policy_loss_after_an_imagined_end():
    agent = make_agent(tiny())
    rollout = jedi.Rollout(
        z=torch.randn(2, L + H, 4, 2, 2),
        real=torch.ones(2, L + H, dtype=torch.bool),
        act=torch.zeros(2, H, dtype=torch.long),
        rew=torch.ones(2, H),
        end=torch.tensor([[0.0, 1.0, 0.0]] * 2),
    )
    loss, logs = jedi.actor_critic_loss(agent, rollout)
    assert logs["imagination/return"] == 2.0
    z = rollout.z.clone()
    z[:, L + 1 :] = 5.0  # frames after the second action, which ends the episode
    act = torch.tensor([[0, 0, 2]] * 2)
    rew = torch.tensor([[1.0, 1.0, -1.0]] * 2)
    after, _ = jedi.actor_critic_loss(agent, rollout._replace(z=z, act=act, rew=rew))
    assert_close(after, loss)
    act = torch.tensor([[0, 1, 0]] * 2)
    at_the_end, _ = jedi.actor_critic_loss(agent, rollout._replace(act=act))
    assert at_the_end != loss


def test_the_policy_learns_what_is_rewarded_and_keeps_its_entropy():
    """One action earns a reward each time: it becomes likely. The bonus alone makes all alike."""
    torch.manual_seed(0)
    for ent_coef, reward in ((0.0, 1.0), (1.0, 0.0)):
        agent = make_agent(tiny(ent_coef=ent_coef))
        optimizer = torch.optim.Adam(agent.actor_critic.parameters(), lr=1e-2)
        z = torch.randn(32, L + H, 4, 2, 2)
        real = torch.ones(32, L + H, dtype=torch.bool)
        end = torch.zeros(32, H)
        for _ in range(60):
            act = torch.randint(3, (32, H))
            rew = reward * (act == 1).float()
            rollout = jedi.Rollout(z, real, act, rew, end)
            loss, logs = jedi.actor_critic_loss(agent, rollout)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        probs = agent.actor_critic(z)[0].softmax(-1)
        if reward:
            assert probs[..., 1].mean() > 0.7
        else:
            assert logs["losses/entropy"] > math.log(3) - 0.01


# ---------------------------------------------------------------------------------- Imagination
def test_imagination_samples_the_policy():
    agent = make_agent(tiny())
    torch.nn.init.zeros_(agent.actor_critic.actor.weight)
    logits = torch.tensor([2.0, 1.0, 0.0])
    agent.actor_critic.actor.bias.data = logits
    rollout = imagined(agent, make_batch(agent.args, batch_size=1500))
    shares = torch.bincount(rollout.act.flatten(), minlength=3) / rollout.act.numel()
    assert_close(shares, logits.softmax(0), atol=0.02, rtol=0)


def test_imagination_follows_given_actions():
    """An action changes the latents from the next one on."""
    agent = make_agent(tiny())
    batch = make_batch(agent.args)
    actions = torch.zeros(64, H, dtype=torch.long)
    rollout = seeded(imagined, agent, batch, actions)
    assert torch.equal(rollout.act, actions)
    again = seeded(imagined, agent, batch, actions)
    assert torch.equal(again.z, rollout.z)
    actions = torch.tensor([[0, 1, 1]] * 64)
    other = seeded(imagined, agent, batch, actions)
    unchanged = L + 1  # the second action leads to the frame after these
    assert torch.equal(other.z[:, :unchanged], rollout.z[:, :unchanged])
    assert not torch.equal(other.z[:, unchanged], rollout.z[:, unchanged])


def test_imagination_reads_every_step_as_the_losses_do():
    """Step by step, policy and R see what they see in the whole rollout at once.

    Their logits are so large that to sample is to take the largest.
    """
    agent = make_agent(tiny())

    def sharpen(layer, inputs, logits):
        return 1e6 * (logits - logits.mean(0))

    agent.actor_critic.actor.register_forward_hook(sharpen)
    agent.reward_end.head.register_forward_hook(sharpen)
    batch = make_batch(agent.args)
    assert (~batch.real[:, :L]).any()
    z = 3 * torch.randn(64, L, 4, 2, 2)
    real = batch.real[:, :L]
    rollout = jedi.imagine(agent, z, batch.act[:, :L], real, H)
    now = slice(L - 1, L + H - 1)  # the steps at which something is imagined
    logits, _, _ = agent.actor_critic(rollout.z, rollout.real)
    best = logits.argmax(-1)
    assert torch.equal(rollout.act, best[:, now])
    before = batch.act[:, : L - 1]
    unused = rollout.act[:, :1]  # at the last latent, of which nothing is read
    act = torch.cat([before, rollout.act, unused], dim=1)
    rew_logits, end_logits = agent.reward_end(rollout.z, act, rollout.real)
    best = rew_logits.argmax(-1) - 1.0
    assert torch.equal(rollout.rew, best[:, now])
    best = end_logits.argmax(-1).float()
    assert torch.equal(rollout.end, best[:, now])
    for values in (rollout.act, rollout.rew, rollout.end):
        assert len(values.unique()) > 1  # else the comparison would say little


def test_the_agent_that_plays_is_the_policy_that_was_trained():
    """Frame by frame it takes the actions that the network gives for the whole segment at once."""
    agent = make_agent(tiny())
    agent.actor_critic.actor.weight.data *= 1e6
    obs = torch.randint(0, 256, (30, 3, 1, 1), dtype=torch.uint8).repeat(1, 1, 16, 16)
    acts = []
    state = None
    for frame in obs.numpy():
        act, state = agent.act(frame, state)
        acts.append(act)
    logits, _, _ = agent.actor_critic(agent.encoder(obs[None]))
    assert acts == logits[0].argmax(-1).tolist()
    assert len(set(acts)) > 1  # else the comparison would say little


def test_exploration_is_uniform():
    agent = make_agent(tiny())
    agent.actor_critic.actor.weight.data *= 1e6
    frame = np.zeros((3, 16, 16), np.uint8)
    acts = [agent.act(frame, epsilon=1.0)[0] for _ in range(600)]
    assert np.bincount(acts, minlength=3) / 600 == pytest.approx(1 / 3, abs=0.07)


# ---------------------------------------------------------------------------------- Learning
def test_overfits_one_batch():
    """All parts of the loss fall on one batch: every path from data to loss is connected."""
    args = tiny(
        denoiser_channels=32,
        learning_rate=3e-3,
        anneal_lr=False,
        horizon=1,
        num_autoregressive_steps=1,
    )
    agent = make_agent(args)
    optimizer, _, scheduler, _ = jedi.make_optimizers(agent, args)
    batch = make_batch(args, batch_size=4)
    history = []
    for _ in range(300):
        loss, logs = jedi.world_model_loss(agent, batch)
        jedi.optimize(loss, optimizer, scheduler)
        history.append(torch.stack(list(logs.values())))
    before = torch.stack(history[:10]).mean(0)
    denoising, reward, end = torch.stack(history[-30:]).mean(0)
    assert denoising < 0.3 * before[0]
    assert reward < 0.05
    assert end < 0.05


def random_play(args, seed):
    """Records args.total_steps uniformly random steps of Catch."""
    env = jedi.make_env(args.env_id, seed, args.image_size)
    replay = jedi.ReplayBuffer(args, CPU)
    rng = np.random.default_rng(seed)
    end = True
    for _ in range(args.total_steps):
        if end:
            obs, _ = env.reset()
            replay.start_episode(obs)
        act = int(rng.integers(3))
        obs, rew, end, _, _ = env.step(act)
        replay.add(act, rew, end, obs)
    return replay


def test_rewards_and_ends_are_learned_and_found_in_imagination():
    """After 200 small updates R tells catches and misses in games that it has not seen."""
    args = tiny(
        encoder_channels=(8, 8, 16, 8),
        lstm_dim=32,
        batch_size=16,
        learning_rate=3e-3,
        anneal_lr=False,
        total_steps=1500,
    )
    torch.manual_seed(0)
    agent = jedi.Agent(args, 3)
    optimizer, _, scheduler, _ = jedi.make_optimizers(agent, args)
    replay = random_play(args, seed=1)
    for _ in range(200):
        batch = replay.sample(replay.anchors(args.batch_size), L - 1, H)
        loss, _ = jedi.world_model_loss(agent, batch)
        jedi.optimize(loss, optimizer, scheduler)
    replay = random_play(args, seed=2)
    batch = replay.sample(replay.anchors(500), L - 1, H)
    z = agent.encoder(batch.obs)
    rollout = imagined(agent, batch, actions=batch.act[:, L - 1 : -1])
    ahead = batch.has_act.clone()
    ahead[:, :L] = False  # what is read from imagined latents, one to three steps ahead
    for latents, least in ((z, 0.9), (rollout.z, 0.75)):
        rew_logits, end_logits = agent.reward_end(latents, batch.act, batch.has_act)
        rew = rew_logits.softmax(-1)[ahead]
        end = end_logits.softmax(-1)[ahead]
        caught = batch.rew[ahead] > 0
        missed = batch.end[ahead] == 1
        assert roc_auc(rew[:, 2], caught) >= least
        assert roc_auc(end[:, 1], missed) >= least


# ---------------------------------------------------------------------------------- Measurement
def measured(monkeypatch, dream):
    """Measures the imagined latents dream(z), with an R that reads z[0, 0, 0] as a logit."""
    agent = make_agent(tiny())
    batch = make_batch(agent.args)
    z = agent.encoder(batch.obs)

    def imagine(agent, context, act, real, horizon, actions):
        assert torch.equal(actions, batch.act[:, L - 1 : -1])
        return jedi.Rollout(dream(z), None, None, None, None)

    def read(latents, act, has_act):
        logit = latents[:, :, 0, 0, 0]
        return torch.stack([-10 * logit, 0 * logit, 10 * logit], dim=-1), None

    monkeypatch.setattr(jedi, "imagine", imagine)
    agent.reward_end.forward = read
    return jedi.measure(agent, batch), batch, z


def test_measure_of_perfect_imagination(monkeypatch):
    metrics, batch, z = measured(monkeypatch, dream=lambda z: z)
    assert metrics["world_model/error_1"] == 0
    assert metrics["world_model/error_H"] == 0
    assert metrics["world_model/rewards_found"] == metrics["world_model/rewards_read"]
    signs = []  # by hand: sign(reward) times expected reward, at steps with a reward
    moves = []
    for b in range(64):
        for t in range(L - 1, L + H - 1):
            rew = batch.rew[b, t].item()
            if rew and batch.has_act[b, t]:
                logit = 10 * z[b, t, 0, 0, 0].item()
                total = math.exp(logit) + 1 + math.exp(-logit)
                signs.append(rew * (math.exp(logit) - math.exp(-logit)) / total)
        moves.append((z[b, L] - z[b, L - 1]).square().mean().item())
    assert metrics["world_model/rewards_read"] == pytest.approx(np.mean(signs), rel=1e-4)
    assert metrics["latent/change_rms"] == pytest.approx(np.sqrt(np.mean(moves)), rel=1e-4)


def test_measure_of_an_imagination_in_which_nothing_changes(monkeypatch):
    metrics, _, _ = measured(monkeypatch, dream=lambda z: z[:, L - 1 : L].expand_as(z))
    assert metrics["world_model/error_1"] == pytest.approx(1)
    assert metrics["world_model/error_H"] == pytest.approx(1)
    assert metrics["world_model/rewards_found"] != metrics["world_model/rewards_read"]


# ---------------------------------------------------------------------------------- Speed
@contextlib.contextmanager
def no_content():
    """Tensors have no content: whatever reads a value, and would wait for the device, raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def both_updates(agent, replay):
    """What main does in an update of each kind, but for the step of the optimizer."""
    batch = replay.sample(replay.anchors(4), L - 1, H)
    loss, _ = jedi.world_model_loss(agent, batch)
    loss.backward()
    rollout = imagined(agent, batch)
    loss, _ = jedi.actor_critic_loss(agent, rollout)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(agent.parameters(), 1.0)


def test_updates_never_wait_for_the_device():
    agent = make_agent(tiny())
    replay = make_replay(agent.args)
    with no_content():
        both_updates(agent, replay)


def indexing_mean(x, mask):
    return x[mask].mean()


def counting_mean(x, mask):
    return torch.where(mask, x, 0).sum() / max(1, mask.sum().item())


@pytest.mark.parametrize("mean", [indexing_mean, counting_mean])
def test_a_wait_for_the_device_would_be_found(monkeypatch, mean):
    agent = make_agent(tiny())
    replay = make_replay(agent.args)
    monkeypatch.setattr(jedi, "masked_mean", mean)
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        with no_content():
            both_updates(agent, replay)


def compiled(agent, batch, backend):
    """Both updates and the rollout between them, compiled as in main."""
    torch._dynamo.reset()
    torch._dynamo.config.allow_rnn = True

    def fast(function):
        return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)

    wm_loss = fast(jedi.world_model_loss)
    ac_loss = fast(jedi.actor_critic_loss)
    step = fast(jedi.imagine_step)
    return two_losses(agent, batch, wm_loss, ac_loss, step)


def two_losses(agent, batch, wm_loss, ac_loss, step):
    """Returns all that an update of each kind computes from fixed random numbers."""
    agent.zero_grad()
    torch.manual_seed(0)
    loss, _ = wm_loss(agent, batch)
    loss.backward()
    rollout = imagined(agent, batch, step=step)
    policy_loss, _ = ac_loss(agent, rollout)
    policy_loss.backward()
    gradients = [parameter.grad.clone() for parameter in agent.parameters()]
    return [loss, policy_loss, rollout.z, rollout.rew, *gradients]


def test_every_function_compiles_to_one_graph():
    """The same graph serves all steps of all rollouts: nothing about its inputs changes."""
    args = tiny(num_denoising_steps=1, num_autoregressive_steps=1, reward_end_blocks=1)
    agent = make_agent(args)
    batch = make_batch(args)
    counter = CompileCounter()
    compiled(agent, batch, counter)
    assert counter.frame_count == 3


def fake_compile(errors):
    """Stands in for torch.compile: what it compiles in a mode raises the mode's error, if any."""

    def compile(function, mode, **_):
        def compiled(*inputs):
            if mode in errors:
                raise errors[mode]
            return function(*inputs)

        return compiled

    return compile


def test_without_cuda_graphs_it_compiles_all_the_same(monkeypatch, capsys):
    agent = make_agent(tiny())
    batch = make_batch(agent.args)
    starts = make_batch(tiny(horizon=0))  # imagination begins where a segment of L frames ends
    errors = {"reduce-overhead": RuntimeError("no capture")}
    monkeypatch.setattr(torch, "compile", fake_compile(errors))
    wm_loss, _, _ = jedi.compile_losses(agent, batch, starts)
    assert wm_loss(agent, batch)[0].isfinite()
    assert "mode reduce-overhead: RuntimeError('no capture')" in capsys.readouterr().out

    errors["default"] = RuntimeError("no compiler")
    with pytest.raises(jedi.UsageError, match="--no-compile"):
        jedi.compile_losses(agent, batch, starts)
    assert "no compiler" in capsys.readouterr().out


def test_a_full_memory_is_no_failure_of_compilation(monkeypatch):
    agent = make_agent(tiny())
    errors = {"reduce-overhead": torch.OutOfMemoryError("full")}
    monkeypatch.setattr(torch, "compile", fake_compile(errors))
    with pytest.raises(torch.OutOfMemoryError):
        jedi.compile_losses(agent, make_batch(agent.args), make_batch(tiny(horizon=0)))


@pytest.mark.slow
def test_compiled_equals_eager(monkeypatch):
    # with the random numbers of eager mode
    monkeypatch.setattr(torch._inductor.config, "fallback_random", True)
    agent = make_agent(tiny())
    batch = make_batch(agent.args)
    start = copy.deepcopy(agent.state_dict())
    losses = [jedi.world_model_loss, jedi.actor_critic_loss]
    eager = two_losses(agent, batch, *losses, jedi.imagine_step)
    agent.load_state_dict(start)
    fast = compiled(agent, batch, "inductor")
    for i, expected in enumerate(eager):
        assert_close(fast[i], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graphs_equal_eager(monkeypatch):
    """Six updates of each kind log the same, in float32, from the same random numbers."""
    monkeypatch.setattr(torch._inductor.config, "fallback_random", True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.config.allow_rnn = True
    args = tiny(anneal_lr=False)
    device = torch.device("cuda")
    batch = jedi.Batch(*[tensor.to(device) for tensor in make_batch(args)])
    histories = []
    for use_graphs in (False, True):
        wm_loss = jedi.world_model_loss
        step = jedi.imagine_step
        if use_graphs:
            wm_loss = torch.compile(wm_loss, fullgraph=True, dynamic=False, mode="reduce-overhead")
            step = torch.compile(step, fullgraph=True, dynamic=False, mode="reduce-overhead")
        agent = make_agent(args).to(device)
        optimizer, _, scheduler, _ = jedi.make_optimizers(agent, args)
        losses = []
        torch.manual_seed(0)
        for _ in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            loss, _ = wm_loss(agent, batch)
            jedi.optimize(loss, optimizer, scheduler)
            rollout = imagined(agent, batch, step=step)
            losses += [loss.item(), rollout.z.square().mean().item()]
        histories.append(losses)
    assert histories[1] == pytest.approx(histories[0], rel=1e-2, abs=1e-3)
