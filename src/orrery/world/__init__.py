"""The world model, assembled: text encoder, VAE and transformer; from a prompt and a start to a Video."""

from orrery.world.loading import load
from orrery.world.request import Request, Start
from orrery.world.rollout import Rollout
from orrery.world.transfer import Transferred
from orrery.world.transfer_request import Signal, TransferRequest
from orrery.world.world import World

__all__ = ["Request", "Rollout", "Signal", "Start", "TransferRequest", "Transferred", "World", "load"]
