"""A toy game that a world model must understand to win.

It is stochastic, with delayed reward, real ends and small pixels.
"""

import gymnasium as gym
import numpy as np


class Catch(gym.Env):
    """An 8 x 8 grid drawn on 32 x 32 pixels.

    A ball falls one row a step from a random column; a paddle of 3 cells on the bottom row moves
    left, stays or moves right. A catch is +1 and a new ball; a miss is -1 and the end, as is the
    10th catch.

    The action that decides a reward is taken up to 7 steps before it. Optimal return 10; uniformly
    random about -0.5.
    """

    GRID, CELL, CATCHES = 8, 4, 10

    def __init__(self):
        size = self.GRID * self.CELL
        self.observation_space = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.paddle, self.caught = int(self.np_random.integers(1, self.GRID - 1)), 0
        self._drop()
        return self._draw(), {}

    def step(self, action):
        self.paddle = int(np.clip(self.paddle + action - 1, 1, self.GRID - 2))
        self.row += 1
        if self.row < self.GRID - 1:
            return self._draw(), 0.0, False, False, {}
        if abs(self.column - self.paddle) > 1:
            return self._draw(), -1.0, True, False, {}
        self.caught += 1
        screen = self._draw()  # the catch is seen; the next ball appears one step later, at the top
        self._drop(row=-1)
        return screen, 1.0, self.caught == self.CATCHES, False, {}

    def get_action_meanings(self):
        return ["left", "stay", "right"]

    def _drop(self, row: int = 0):
        self.row, self.column = row, int(self.np_random.integers(self.GRID))

    def _draw(self):
        grid = np.zeros((self.GRID, self.GRID, 3), np.uint8)
        grid[-1, self.paddle - 1 : self.paddle + 2] = (80, 160, 240)
        grid[self.row, self.column] = (240, 220, 80)
        return grid.repeat(self.CELL, 0).repeat(self.CELL, 1)


gym.register("Catch-v0", entry_point=Catch)


class NoisyCatch(Catch):
    """Catch over fresh random noise in every frame, which no one can predict and no one needs."""

    def _draw(self):
        screen = super()._draw()
        noise = self.np_random.integers(0, 128, screen.shape, dtype=np.uint8)
        return np.where(screen.any(-1, keepdims=True), screen, noise)


gym.register("NoisyCatch-v0", entry_point=NoisyCatch)
