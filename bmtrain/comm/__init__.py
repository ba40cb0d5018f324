"""Communication: one interface, three transports."""

from .base import Communicator, ReduceOp
from .gloo import GlooCommunicator
from .local import LocalCommunicator
from .rendezvous import Meeting, meet

__all__ = ["Communicator", "GlooCommunicator", "LocalCommunicator", "Meeting", "ReduceOp", "meet"]
