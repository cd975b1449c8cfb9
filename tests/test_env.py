"""Tests of environments: Atari's protocol, evaluation, and what people bring."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import jedi
from tests.tiny import ROOT, make_agent, tiny
from tests.toy import Catch


# ------------------------------------------------------------------------------------ Frames
def resize(screen):
    """A raw screen of Atari [210, 160, 3] -> what the agent sees of it [3, 64, 64]."""
    env = jedi.make_env("PongNoFrameskip-v4", 0, 64)
    return env.get_wrapper_attr("observation")(screen)


def test_frames_equal_the_area_resize_of_opencv():
    """Recorded screens, and what cv2.resize with cv2.INTER_AREA made of them (opencv 5.0.0)."""
    recorded = np.load(ROOT / "tests" / "area_resize.npz")
    for i, screen in enumerate(recorded["screens"]):
        frame = resize(screen).transpose(1, 2, 0)
        error = frame.astype(int) - recorded["frames"][i]
        assert np.abs(error).max() <= 1
        assert np.abs(error).mean() < 0.01


def test_a_frame_may_become_larger():
    env = jedi.make_env("tests.odd_games:Stairs-v0", 0, 48)
    obs, _ = env.reset()
    assert obs.shape == (3, 48, 48)
    for t in range(1, 4):
        obs, _, _, _, _ = env.step(2)
        assert (obs == 10 * t + 2).all()


# ------------------------------------------------------------------------------------ Atari
class Numbered(gym.Env):
    """Raw frames show 1, 2, 3, ... and count down in another channel, until the `last`."""

    observation_space = gym.spaces.Box(0, 255, (2, 2, 3), np.uint8)
    action_space = gym.spaces.Discrete(1)
    last = 6

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros((2, 2, 3), np.uint8), {}

    def step(self, action):
        self.t += 1
        frame = np.full((2, 2, 3), (self.t, 100 - self.t, 0), np.uint8)
        return frame, 1.0, self.t == self.last, False, {}


def test_frame_skip_pools_the_last_two_frames_and_stops_at_the_end():
    game = jedi.AtariGame(Numbered())
    game.env.reset()
    obs, reward, end, _, _ = game.step(0)
    assert obs[0, 0].tolist() == [4, 97, 0]  # the larger of frames 3 and 4
    assert reward == 4
    assert not end
    obs, reward, end, _, _ = game.step(0)
    assert obs[0, 0].tolist() == [6, 94, 0]  # the last screen as it is
    assert reward == 2
    assert end


def test_a_game_begins_with_1_to_30_no_ops():
    class Long(Numbered):
        last = 1000

    game = jedi.AtariGame(Long())
    game.reset(seed=0)
    counts = set()
    for _ in range(500):
        obs, _ = game.reset()
        counts.add(game.unwrapped.t)
        assert obs[0, 0, 0] == game.unwrapped.t
    assert counts == set(range(1, 31))


@pytest.mark.parametrize("env_id", ["MsPacmanNoFrameskip-v4", "MsPacman-v4", "ALE/MsPacman-v5"])
def test_every_atari_id_skips_four_frames_and_has_the_minimal_actions(env_id):
    env = jedi.make_env(env_id, 0)
    assert env.action_space.n == 9
    before = env.unwrapped.ale.getEpisodeFrameNumber()
    for _ in range(5):
        env.step(0)
    assert env.unwrapped.ale.getEpisodeFrameNumber() - before == 20


@pytest.mark.parametrize("game, address", [("Breakout", 72), ("Pong", 51)])
def test_actions_move_the_paddle(game, address):
    positions = []
    for action in (2, 3):
        env = jedi.make_env(f"{game}NoFrameskip-v4", 0)
        env.reset()
        for _ in range(10):
            env.step(action)
        positions.append(int(env.unwrapped.ale.getRAM()[address]))
    assert abs(positions[0] - positions[1]) > 20


def play_pong(seed):
    env = jedi.make_env("PongNoFrameskip-v4", seed)
    env.reset()
    frames = []
    for t in range(30):
        obs, _, _, _, _ = env.step(t % 6)
        frames.append(obs)
    return np.stack(frames)


def test_environments_are_seeded():
    assert np.array_equal(play_pong(1), play_pong(1))
    assert not np.array_equal(play_pong(1), play_pong(2))


def test_a_game_has_all_lives_and_ends_with_the_last_screen():
    env = jedi.make_env("BreakoutNoFrameskip-v4", 3)
    _, info = env.reset()
    rng = np.random.default_rng(0)
    lives = {info["lives"]}
    end = False
    while not end:
        obs, _, end, _, info = env.step(int(rng.integers(4)))
        lives.add(info["lives"])
    assert lives == {0, 1, 2, 3, 4, 5}
    assert np.array_equal(obs, resize(env.unwrapped.ale.getScreenRGB()))


# ------------------------------------------------------------------------------------ Evaluation
def evaluated(env_id, games=3, seed=7):
    env = jedi.make_env(env_id, 0, 16)
    agent = make_agent(tiny(), int(env.action_space.n))
    torch.nn.init.zeros_(agent.actor_critic.actor.weight)  # nearly uniform
    env.close()
    return jedi.evaluate_policy(agent, env_id, games, seed)


def test_the_seed_determines_the_games():
    result = evaluated("tests.toy:Catch-v0", games=6)
    returns = result["returns"]
    assert result["mean_return"] == pytest.approx(np.mean(returns))
    assert len(set(returns)) > 1
    assert evaluated("tests.toy:Catch-v0", games=6) == result
    assert evaluated("tests.toy:Catch-v0", games=6, seed=8)["returns"] != returns


def test_games_are_played_in_full():
    """A game is eight steps of reward 7, unclipped. A lost life does not end it."""
    assert evaluated("tests.odd_games:RewardOfSeven-v0")["returns"] == [56.0] * 3
    assert evaluated("tests.odd_games:TwoLives-v0")["returns"] == [56.0] * 3


def test_an_endless_game_is_cut(monkeypatch):
    monkeypatch.setattr(jedi, "MAX_STEPS", 20)
    assert evaluated("tests.odd_games:Endless-v0", games=2)["returns"] == [140.0] * 2


@pytest.mark.parametrize("env_id, sticky", [("PongNoFrameskip-v4", 0.0), ("ALE/Pong-v5", 0.25)])
def test_the_protocol_of_an_atari_game(monkeypatch, env_id, sticky):
    monkeypatch.setattr(jedi, "MAX_STEPS", 3)
    result = evaluated(env_id, games=1)
    assert result["atari"] is True
    protocol = result["protocol"]
    assert protocol["noop_max"] == 30
    assert protocol["frame_skip"] == 4
    assert protocol["sticky_actions"] == sticky
    assert protocol["eval_seed"] == 7


@pytest.mark.parametrize("name", ["Mine/Breakout-v5", "MyBreakout-v0", "KeepsBooks-v0"])
def test_what_an_own_module_does_is_unknown(monkeypatch, name):
    """Neither the name of a game, nor lives, nor an Atari game within make it Atari's protocol."""
    monkeypatch.setattr(jedi, "MAX_STEPS", 3)
    result = evaluated(f"tests.odd_games:{name}", games=1)
    assert result["atari"] is False
    assert result["protocol"]["noop_max"] == "unknown"
    assert result["protocol"]["frame_skip"] == "unknown"
    sticky = 0.25 if name == "MyBreakout-v0" else "unknown"  # the emulator itself knows it
    assert result["protocol"]["sticky_actions"] == sticky


# -------------------------------------------------------------------------------- What people bring
SHORT = {
    "total_steps": 24,
    "first_collect_steps": 24,
    "first_world_model_updates": 1,
    "first_actor_critic_updates": 1,
    "final_epochs": 0,
}
WELCOME = [
    "LivesAtFirst-v0",
    "KeepsBooks-v0",
    "OwnStatistics-v0",
    "OneAtATime-v0",
    "RewardInArray-v0",
    "RewardIsBool-v0",
    "UpsideDown-v0",
    "OneBuffer-v0",
    "OneAction-v0",
    "AtOnce-v0",
    "Staircase",
    "mine/stair-case",
]


@pytest.mark.parametrize("name", WELCOME)
def test_it_trains_and_is_evaluated(tmp_path, name):
    result = jedi.main(tiny(env_id=f"tests.odd_games:{name}", runs_dir=str(tmp_path), **SHORT))
    assert len(result["returns"]) == 3
    for value in result["returns"]:
        assert type(value) is float
        assert abs(value) <= 8
    assert result["atari"] is False


REFUSED = {
    "RewardOfTwo-v0": "reward array",
    "RewardMissing-v0": "reward None",
    "ChannelsFirst-v0": "(3, 16, 16)",
    "Cropped-v0": "(11, 16, 3)",
    "FloatFrames-v0": "float64",
    "NoDisplay-v0": "no display",
    "Numbers-v0": "needed are uint8 images",
    "Rgba-v0": "needed are uint8 images",
    "Grey-v0": "needed are uint8 images",
    "Continuous-v0": "Discrete actions from 0",
    "FromOne-v0": "Discrete actions from 0",
    "Nowhere-v0": "Nowhere",
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(tmp_path, name):
    """Before any training, and the line names the environment."""
    with pytest.raises(jedi.UsageError) as refusal:
        jedi.main(tiny(env_id=f"tests.odd_games:{name}", runs_dir=str(tmp_path), **SHORT))
    message = str(refusal.value)
    assert name in message
    assert REFUSED[name] in message
    assert "\n" not in message
    assert not list(tmp_path.rglob("ckpt.pt"))


def test_an_error_inside_an_environment_keeps_its_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError, match="the physics exploded") as error:
        jedi.main(tiny(env_id="tests.odd_games:BreaksDown-v0", runs_dir=str(tmp_path)))
    assert "odd_games.py" in str(error.traceback[-1].path)


# ------------------------------------------------------------------------------------ The toy game
def play_catch(policy, games):
    env = Catch()
    env.reset(seed=0)
    returns = []
    for _ in range(games):
        total = 0.0
        end = False
        while not end:
            _, reward, end, _, _ = env.step(policy(env))
            total += reward
        returns.append(total)
        env.reset()
    return returns


def test_the_toy_game_is_as_described():
    """A random policy earns about -0.5; one that moves under the ball, the optimum of 10."""
    rng = np.random.default_rng(0)
    returns = play_catch(lambda env: int(rng.integers(3)), 1000)
    assert -0.6 < np.mean(returns) < -0.3
    returns = play_catch(lambda env: 1 + int(np.sign(env.column - env.paddle)), 10)
    assert set(returns) == {10.0}
