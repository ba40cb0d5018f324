"""The table of attacks: what happens to one rank, where, and what must come of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["ends", "reported", "unharmed"]
"""The job ends and names the rank; it is named and the job goes on to its end; nothing happens."""

DEATHS = {
    "kill": "SIGKILL", "segfault": "a segmentation fault", "exit": "os._exit(3)", "raise": "an exception",
    "leave": "sys.exit(0)",
}  # fmt: skip
PHASES = (
    "start", "sharding", "forward", "backward", "step", "sum_loss", "evaluation", "generate", "gathered", "save",
    "writing",
)  # fmt: skip
ALONE = {
    "evaluate": "runs a forward without gradients alone", "save": "saves alone", "gather": "enters bmt.gathered alone",
    "sum": "calls bmt.sum_loss alone", "agree": "calls bmt.agree alone", "barrier": "calls bmt.synchronize alone",
    "other size": "sums a loss of another size", "batch": "takes a batch alone",
}  # fmt: skip
SKIPS = {
    "block": "skips a block", "step": "skips an optimizer step", "backward": "skips a backward",
    "batch": "skips a batch before the forward", "generate": "leaves a loop that generates early",
    "rest": "leaves the training loop early",
}  # fmt: skip
MESHES = ("SHARD_SIZE", "TP_SIZE")


@dataclass(frozen=True)
class Attack:
    """``fault`` on ``rank`` of ``ranks`` at ``phase`` of tests/faults/script.py."""

    fault: str
    phase: str
    rank: int = 1
    ranks: int = 2
    torchrun: bool = False
    outcome: Outcome = "ends"
    env: dict[str, str] = field(default_factory=dict, hash=False)
    resumes_after: float = 0.0
    """Seconds until a rank that was stopped goes on."""

    @property
    def name(self) -> str:
        """As arguments and the table show it."""
        words = [self.fault.replace(" ", "_"), self.phase, f"{self.rank}of{self.ranks}"]
        words += [f"{key.lower()}{value}" for key, value in self.env.items()]
        return "-".join([*words, "torchrun" if self.torchrun else "bare"])

    @property
    def text(self) -> str:
        """What the rank does."""
        where = f"{self.phase}, workers" if "WORKERS" in self.env else self.phase
        if self.fault == "skip":
            said = SKIPS[self.phase]
        elif self.fault in ALONE:
            said = f"{ALONE[self.fault]} ({where})"
        elif self.fault == "stop":
            said = f"SIGSTOP, SIGCONT {self.resumes_after:g} s later ({where})"
        elif self.fault == "sleep":
            said = f"sleeps {self.env['SECONDS_ASLEEP']} s{_limit(self)} ({where})"
        else:
            said = f"{DEATHS[self.fault]} ({where})"
        return said + "".join(f", {key.lower()}={value}" for key, value in self.env.items() if key in MESHES)


def _limit(attack: Attack) -> str:
    return f", the limit being {attack.env['LIMIT']} s" if "LIMIT" in attack.env else ""


def attacks() -> Iterator[Attack]:
    """All of them, each once."""
    kinds = list(DEATHS)
    for number, phase in enumerate(PHASES):
        # Every death at some phases and every phase with some deaths; the rank that holds the store dies, too.
        rank = 0 if phase == "writing" else 1
        yield Attack("kill", phase, rank)
        other = kinds[1 + number % 4]
        yield Attack("exit" if (other, phase) == ("raise", "writing") else other, phase, rank=0, ranks=3)
        yield Attack(kinds[1 + (number + 1) % 4], phase, rank=0 if phase == "writing" else 1, torchrun=True)
    for fault in DEATHS:
        yield Attack(fault, "forward", rank=2, ranks=3)
        yield Attack(fault, "step", rank=0)
    yield Attack("kill", "forward", rank=1, env={"WORKERS": "1"})
    for phase in SKIPS:
        yield Attack("skip", phase)
        yield Attack("skip", phase, rank=0, ranks=3)
    yield Attack("skip", "batch", torchrun=True)
    yield Attack("skip", "step", torchrun=True)
    for fault in ALONE:
        yield Attack(fault, "step")
        yield Attack(fault, "sum_loss", rank=0, ranks=3)
    yield Attack("save", "evaluation", torchrun=True)
    yield Attack("evaluate", "sum_loss", torchrun=True)
    yield Attack("sleep", "forward", env={"SECONDS_ASLEEP": "9"}, outcome="reported")
    yield Attack("sleep", "start", rank=0, env={"SECONDS_ASLEEP": "9"}, outcome="reported")
    yield Attack("sleep", "writing", rank=0, ranks=3, env={"SECONDS_ASLEEP": "9"}, outcome="reported")
    yield Attack("sleep", "step", env={"SECONDS_ASLEEP": "9"}, outcome="reported", torchrun=True)
    yield Attack("sleep", "step", env={"SECONDS_ASLEEP": "60", "LIMIT": "6"})
    yield Attack("sleep", "writing", rank=0, env={"SECONDS_ASLEEP": "60", "LIMIT": "6"})
    yield Attack("sleep", "end", env={"SECONDS_ASLEEP": "2"}, outcome="unharmed")
    yield Attack("stop", "forward", resumes_after=9, outcome="reported")
    yield Attack("stop", "sum_loss", rank=0, ranks=3, resumes_after=9, outcome="reported")
    yield Attack("stop", "save", resumes_after=2, outcome="unharmed")
    for mesh in ({"SHARD_SIZE": "2"}, {"TP_SIZE": "2"}, {"SHARD_SIZE": "1"}):
        yield from _in_a_mesh(mesh)


def _in_a_mesh(env: dict[str, str]) -> Iterator[Attack]:
    """Of four ranks, in pairs or each alone: what happens in one group reaches the others."""
    for fault, phase, rank in (
        ("kill", "forward", 3), ("exit", "backward", 0), ("raise", "step", 2), ("kill", "writing", 0),
        ("skip", "block", 1), ("skip", "block", 2), ("skip", "step", 3), ("skip", "backward", 0), ("skip", "batch", 2),
        ("skip", "generate", 1), ("evaluate", "step", 3), ("gather", "sum_loss", 1), ("sum", "step", 2),
    ):  # fmt: skip
        yield Attack(fault, phase, rank, ranks=4, env=env)
    yield Attack("sleep", "forward", 1, ranks=4, env={"SECONDS_ASLEEP": "9", **env}, outcome="reported")
    yield Attack("stop", "step", 2, ranks=4, env=env, resumes_after=9, outcome="reported")


FAST = (
    "kill-forward-1of2-bare", "kill-step-0of2-bare", "raise-forward-2of3-bare", "exit-sum_loss-0of3-bare",
    "leave-step-0of2-bare", "skip-block-1of2-bare", "skip-step-1of2-bare", "skip-batch-1of2-bare",
    "sum-step-1of2-bare", "save-sum_loss-0of3-bare", "sleep-forward-1of2-seconds_asleep9-bare",
)  # fmt: skip
"""The subset for every run of the tests."""
