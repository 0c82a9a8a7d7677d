"""Who moves in `drive`: the ego car (kinematic, steered by actions) and other vehicles that follow each other.

Vehicles keep their lane and follow the Intelligent Driver Model (arXiv cond-mat/0002177). The ego car moves as the
actions say: curvature = steer * MAX_CURVATURE, acceleration = action * MAX_ACCELERATION.
"""

import math
from dataclasses import dataclass

import numpy as np

from orrery.sim.road import KINDS, LANE, Road

MAX_CURVATURE = 0.08  # 1 / metre at steer +1 (left) or -1 (right)
MAX_ACCELERATION = 6.0  # metres / second^2 at acceleration +1 or -1
COMFORT, BRAKE, HEADWAY, STANDSTILL = 2.0, 3.0, 1.2, 2.0  # the driver model's a, b (m/s^2), T (s) and s0 (m)
HARDEST = 6.0  # metres / second^2, what tyres give


@dataclass
class Vehicle:
    """A vehicle in road coordinates; `halt` is the time at which it brakes to a standstill (inf: never)."""

    kind: str
    colour: str
    lane: int
    s: float
    speed: float
    desired: float
    halt: float = math.inf

    @property
    def size(self) -> tuple[float, float, float]:
        """Length, width, height in metres."""
        return KINDS[self.kind]


@dataclass
class Plan:
    """What the ego driver means to do: at `swerve` seconds change by `change` lanes (left +1) within `duration`
    seconds; at `pedal` seconds go for speed `target` with at most `effort` m/s^2."""

    lane: int
    change: int = 0
    swerve: float = 0.0
    duration: float = 2.5
    target: float = 0.0
    pedal: float = 0.0
    effort: float = 3.0


def follow(speed: float, desired: float, gap: float, leader_speed: float) -> float:
    """The Intelligent Driver Model's acceleration, m/s^2; gap inf where there is no leader."""
    free = 1 - (speed / max(desired, 0.1)) ** 4
    wish = STANDSTILL + max(0.0, speed * HEADWAY + speed * (speed - leader_speed) / (2 * math.sqrt(COMFORT * BRAKE)))
    return float(np.clip(COMFORT * (free - (wish / max(gap, 0.1)) ** 2), -HARDEST, COMFORT))


class Traffic:
    """The state of a road's traffic. `time` is 0 at the first frame; x, y, yaw, speed are the ego car's."""

    def __init__(self, road: Road, vehicles: list[Vehicle], plan: Plan, speed: float, time: float):
        self.road, self.vehicles, self.plan, self.speed, self.time = road, vehicles, plan, speed, time
        self.cruise = speed
        (self.x, self.y), yaw = road.pose(0.0, road.lane_offset(plan.lane))
        self.yaw = float(yaw)

    def advance(self, dt: float, steer: float, acceleration: float) -> None:
        """Moves everything on by dt seconds under the ego's action (each in [-1, 1])."""
        ego_s, ego_offset = self.road.locate(np.array([self.x, self.y]))
        pulls = [self._pull(vehicle, ego_s, ego_offset) for vehicle in self.vehicles]
        for vehicle, pull in zip(self.vehicles, pulls, strict=True):
            vehicle.speed = max(0.0, vehicle.speed + pull * dt)
            bend = float(np.interp(vehicle.s, self.road.s, self.road.curvature))
            vehicle.s += vehicle.speed * dt / (1 - bend * self.road.lane_offset(vehicle.lane))
        self.speed = max(0.0, self.speed + acceleration * MAX_ACCELERATION * dt)
        turn = steer * MAX_CURVATURE * self.speed * dt
        self.x += self.speed * dt * math.cos(self.yaw + turn / 2)
        self.y += self.speed * dt * math.sin(self.yaw + turn / 2)
        self.yaw += turn
        self.time += dt

    def act(self) -> np.ndarray:
        """The ego driver's action [2] float: steer (left positive) and acceleration, each in [-1, 1]."""
        s, offset = self.road.locate(np.array([self.x, self.y]))
        reach = max(4.0, 0.55 * self.speed)
        (gx, gy), _ = self.road.pose(s + reach, self._wanted_offset(self.time + reach / max(self.speed, 4.0)))
        bearing = math.atan2(gy - self.y, gx - self.x) - self.yaw
        curvature = 2 * math.sin(bearing) / math.hypot(gx - self.x, gy - self.y)
        target, effort = (
            (self.plan.target, self.plan.effort) if self.time >= self.plan.pedal else (self.cruise, COMFORT)
        )
        pull = float(np.clip((target - self.speed) / 0.4, -effort, effort))
        here = offset, self._wanted_offset(self.time + self.plan.duration)  # heeds the lane that it is bound for, too
        gap, other = self._leader(s, KINDS["car"][0], here)
        if math.isfinite(gap):
            pull = min(pull, follow(self.speed, 40.0, gap, other))
        return np.clip([curvature / MAX_CURVATURE, pull / MAX_ACCELERATION], -1, 1)

    def clear(self) -> bool:
        """Whether the ego car stands free of every other vehicle."""
        s, offset = self.road.locate(np.array([self.x, self.y]))
        return not any(
            abs(v.s - s) < (v.size[0] + KINDS["car"][0]) / 2 + 0.4 and abs(self.road.lane_offset(v.lane) - offset) < 2.3
            for v in self.vehicles
        )

    def _wanted_offset(self, time: float) -> float:
        u = float(np.clip((time - self.plan.swerve) / self.plan.duration, 0, 1))
        smooth = u**3 * (10 - 15 * u + 6 * u * u)
        return self.road.lane_offset(self.plan.lane + self.plan.change * smooth)

    def _leader(self, s: float, length: float, offsets: tuple[float, ...]) -> tuple[float, float]:
        """Gap in metres and speed of the nearest vehicle ahead in the lanes of `offsets`."""
        ahead = [
            (v.s - s - (v.size[0] + length) / 2, v.speed)
            for v in self.vehicles
            if v.s > s and any(abs(self.road.lane_offset(v.lane) - o) < LANE / 2 + 0.3 for o in offsets)
        ]
        return min(ahead, default=(math.inf, 0.0))

    def _pull(self, vehicle: Vehicle, ego_s: float, ego_offset: float) -> float:
        if self.time >= vehicle.halt:
            return -4.0
        offset = self.road.lane_offset(vehicle.lane)
        ahead = [
            (v.s - vehicle.s - (v.size[0] + vehicle.size[0]) / 2, v.speed)
            for v in self.vehicles
            if v is not vehicle and v.lane == vehicle.lane and v.s > vehicle.s
        ]
        if abs(ego_offset - offset) < LANE / 2 + 0.3 and ego_s > vehicle.s:
            ahead.append((ego_s - vehicle.s - (KINDS["car"][0] + vehicle.size[0]) / 2, self.speed))
        return follow(vehicle.speed, vehicle.desired, *min(ahead, default=(math.inf, 0.0)))
