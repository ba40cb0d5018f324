"""Who is where: a diary of every rank's collectives, and a thread that compares it with the other ranks'."""

from .diary import Diary, Entry
from .interrupts import Interrupts
from .timeouts import Timeouts
from .watchdog import EXIT_CODE, Hooks, Watchdog, start

__all__ = ["EXIT_CODE", "Diary", "Entry", "Hooks", "Interrupts", "Timeouts", "Watchdog", "start"]
