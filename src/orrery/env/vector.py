"""Many cells of the tabletop in one batch, as a Gymnasium vector environment."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from orrery.env.cells import MAX_STEPS, Cells, Results, check_actions, start_of
from orrery.env.tabletop import TabletopEnv, action_space, draw, observation_space
from orrery.errors import InputError
from orrery.world import World


class TabletopVectorEnv(VectorEnv[dict[str, np.ndarray], np.ndarray, np.ndarray]):
    """`num_envs` copies of TabletopEnv; a world model moves all of them in one batch on one device.

    Args:
        num_envs: copies. autoreset_mode: what happens to a copy that is over: "NextStep" (Gymnasium's default): the
            next step begins it anew and its action does not count; "Disabled": it stands still, with reward 0, until
            `reset(options={"reset_mask": ...})`. The others: as TabletopEnv.
    """

    metadata = TabletopEnv.metadata | {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        num_envs: int = 1,
        kind: str = "model",
        model: str | Path | World = "tabletop",
        device: str | None = None,
        steps: int | None = None,
        max_steps: int = MAX_STEPS,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
    ) -> None:
        mode = AutoresetMode(autoreset_mode)
        if mode not in (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED):
            raise InputError(f"autoreset_mode is {mode.value!r}; allowed are 'NextStep', 'Disabled'")
        self.metadata = TabletopEnv.metadata | {"autoreset_mode": mode}
        self.num_envs, self.render_mode, self.mode = num_envs, render_mode, mode
        self.cells = Cells(kind, num_envs, model, device, steps, max_steps)
        self.single_observation_space, self.single_action_space = observation_space(), action_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._rngs: list[np.random.Generator] = [seeding.np_random(None)[0] for _ in range(num_envs)]
        self._over = np.zeros(num_envs, bool)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin all copies, or those of `options["reset_mask"]` [num_envs] bool. seed: of the first copy, the others
        count up from it; or one a copy. The other options are those of TabletopEnv, for all copies."""
        if seed is None or isinstance(seed, int | np.integer):
            seeds: list[int | None] = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise InputError(f"{len(seeds)} seeds for {self.num_envs} copies; allowed is one each")
        mask = (options or {}).get("reset_mask")
        mask = np.ones(self.num_envs, bool) if mask is None else np.asarray(mask, bool)
        if mask.shape != (self.num_envs,):
            raise InputError(f"reset_mask is {list(mask.shape)}; allowed is [{self.num_envs}]")
        rows = [int(row) for row in np.flatnonzero(mask)]
        for row in rows:
            if seeds[row] is not None:
                self._rngs[row] = seeding.np_random(seeds[row])[0]
        self.cells.reset(rows, [start_of(self._rngs[row], options) for row in rows])
        self._over[rows] = False
        info = {"distance": self.cells.distances.copy(), "success": np.zeros(self.num_envs, bool)}
        return self._observations(), info

    def step(self, actions: Any) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Hold an action [num_envs, 2] for four frames in every copy that goes on."""
        actions = check_actions(actions, self.num_envs)
        moving = [int(row) for row in np.flatnonzero(~self._over)]
        results = self.cells.step(actions, moving)
        terminated, truncated = results.terminated.copy(), results.truncated.copy()
        if self.mode is AutoresetMode.NEXT_STEP:
            again = [int(row) for row in np.flatnonzero(self._over)]
            self.cells.reset(again, [start_of(self._rngs[row], None) for row in again]) if again else None
            self._over = terminated | truncated
        else:
            self._over |= terminated | truncated
        return self._observations(), results.rewards, terminated, truncated, self._info(results)

    def _info(self, results: Results) -> dict[str, Any]:
        return {"distance": self.cells.distances.copy(), "success": results.terminated.copy(), "frames": results.frames}

    def _observations(self) -> dict[str, np.ndarray]:
        return {"image": self.cells.images.copy(), "goal": self.cells.goals.copy()}

    def render(self) -> tuple[np.ndarray, ...] | None:
        """The pictures now, enlarged, with their goals."""
        if not self.render_mode:
            return None
        return tuple(draw(image, goal) for image, goal in zip(self.cells.images, self.cells.goals, strict=True))
