"""Communication: one interface, three transports."""

from .asked_later import AskedLater
from .base import Communicator, ReduceOp
from .gloo import GlooCommunicator, let_others_speak_first
from .launcher import Launcher
from .local import LocalCommunicator
from .rendezvous import Meeting, meet
from .replicated import ReplicatedCommunicator
from .watched import WatchedCommunicator

__all__ = [
    "AskedLater",
    "Communicator",
    "GlooCommunicator",
    "Launcher",
    "LocalCommunicator",
    "Meeting",
    "ReduceOp",
    "ReplicatedCommunicator",
    "WatchedCommunicator",
    "let_others_speak_first",
    "meet",
]
