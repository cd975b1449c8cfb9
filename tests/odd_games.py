"""Small environments, each with one habit of other people's; their ids are their class names.

    python jedi.py --preset small --env-id tests.odd_games:Stairs-v0
"""

import gymnasium as gym
import numpy as np


class Stairs(gym.Env):
    """A frame shows 10 times the step plus the last action. The reward is the action minus 1."""

    observation_space = gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)
    action_space = gym.spaces.Discrete(3)
    length = 8
    info = {}

    def picture(self):
        return np.full(self.observation_space.shape, 10 * self.t + self.last_action, np.uint8)

    def reward(self):
        return self.last_action - 1.0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.last_action = 0
        return self.picture(), dict(self.info)

    def step(self, action):
        assert type(action) is int
        self.t += 1
        self.last_action = action
        return self.picture(), self.reward(), self.t >= self.length, False, dict(self.info)


class LivesAtFirst(Stairs):
    """Lives are told by reset() only."""

    def reset(self, seed=None, options=None):
        obs, _ = super().reset(seed)
        return obs, {"lives": 3}


class KeepsBooks(Stairs):
    """Lives never change, and "episode" is a number of its own."""

    info = {"lives": 3, "episode": 12, "score": None}


class OneAtATime(Stairs):
    """A process may hold one of it, as of an emulator or a licence."""

    held = False

    def __init__(self):
        if OneAtATime.held:
            raise RuntimeError("close the other one first")
        OneAtATime.held = True

    def close(self):
        OneAtATime.held = False


class RewardInArray(Stairs):
    def reward(self):
        return np.array([self.last_action - 1.0], np.float32)


class RewardIsBool(Stairs):
    def reward(self):
        return self.last_action == 2


class RewardOfSeven(Stairs):
    def reward(self):
        return 7.0


class TwoLives(RewardOfSeven):
    """A life is lost at the fourth step of eight."""

    def reset(self, seed=None, options=None):
        obs, _ = super().reset(seed)
        return obs, {"lives": 2}

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, terminated, truncated, {"lives": 2 - self.t // 4}


class RewardOfTwo(Stairs):
    """A vector, as of two players."""

    def reward(self):
        return np.array([1.0, -1.0])


class RewardMissing(Stairs):
    def reward(self):
        return None


class Grey(Stairs):
    observation_space = gym.spaces.Box(0, 255, (20, 12), np.uint8)


class UpsideDown(Stairs):
    """Frames are views with a negative stride, as of renderers whose rows begin at the bottom."""

    def picture(self):
        return super().picture()[::-1]


class OneBuffer(Stairs):
    """Every frame is the same array, written over."""

    buffer = np.zeros((16, 16, 3), np.uint8)

    def picture(self):
        self.buffer[:] = super().picture()
        return self.buffer


class ChannelsFirst(Stairs):
    def picture(self):
        return super().picture().transpose(2, 0, 1)


class Cropped(Stairs):
    def picture(self):
        return super().picture()[:11]


class FloatFrames(Stairs):
    def picture(self):
        return super().picture() / 255


class OneAction(Stairs):
    action_space = gym.spaces.Discrete(1)


class AtOnce(Stairs):
    """Each game ends at its first step."""

    length = 1


class Endless(RewardOfSeven):
    length = float("inf")

    def picture(self):
        return np.full((16, 16, 3), self.t % 256, np.uint8)


class NoDisplay(Stairs):
    def __init__(self):
        raise RuntimeError("no display")


class BreaksDown(Stairs):
    """An error from deep within, at the 30th step of all games."""

    steps = 0

    def step(self, action):
        self.steps += 1
        if self.steps == 30:
            raise ZeroDivisionError("the physics exploded")
        return super().step(action)


class Numbers(Stairs):
    """Observations are numbers."""

    observation_space = gym.spaces.Box(-1, 1, (4,), np.float32)


class Rgba(Stairs):
    observation_space = gym.spaces.Box(0, 255, (16, 16, 4), np.uint8)


class Continuous(Stairs):
    action_space = gym.spaces.Box(-1, 1, (2,))


class FromOne(Stairs):
    action_space = gym.spaces.Discrete(3, start=1)


for game in [Stairs, *Stairs.__subclasses__(), *RewardOfSeven.__subclasses__()]:
    gym.register(game.__name__ + "-v0", entry_point=game)
gym.register("OwnStatistics-v0", entry_point=lambda: gym.wrappers.RecordEpisodeStatistics(Stairs()))
gym.register("Mine/Breakout-v5", entry_point=Stairs)  # the name of an Atari game
gym.register("Staircase", entry_point=Stairs)  # no version
gym.register("mine/stair-case", entry_point=Stairs)


def breakout():
    """An Atari game in a module of somebody's own: only he knows the frame skip."""
    return gym.make("ALE/Breakout-v5", frameskip=5)


gym.register("MyBreakout-v0", entry_point=breakout)
