"""Two runs, and the likely class of what differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rewriter.verify.script.runs import Run
from rewriter.verify.script.split import Split
from rewriter.verify.script.story import Loss, apart, losses_of, mean, mean_by_samples, merged, position
from rewriter.verify.script.text import compare_lines

DATA = "data not shared"
SAMPLES = "other samples"
ACROSS = "loss looks across the batch"
COUNTS = "mean over different counts"
SUM = "loss is a sum over the batch"
BRANCH = "rank-dependent branch"
WRITTEN = "file written by several ranks"
PRINTED = "printed by several ranks"
RANDOM = "random numbers"
INITIAL = "weights differ before the first step"
CRASHED = "crashed"
STALLED = "stalled"
LOSSES = "losses differ"
GRADIENTS = "gradients differ"
WEIGHTS = "weights differ"
OUTPUT = "printed lines differ"
FILES = "files differ"
UNREPEATED = "the original does not repeat itself"
REFUSED = "not converted"
NOTHING = "nothing was compared"

OF_SPLIT = {"across": ACROSS, "counts": COUNTS, "sum": SUM}
"""Classes of what the split test finds."""
END = 1e9
"""The moment after the last loss."""


@dataclass(frozen=True)
class Finding:
    """Something that did not hold. ``moment`` is the number of losses before it."""

    ranks: int
    kind: str
    message: str
    at: str = ""
    moment: float = END


@dataclass
class Outcome:
    """What was compared on a number of ranks, and what was found."""

    ranks: int
    losses: int = 0
    loss_difference: float = 0.0
    steps: int = 0
    gradients: int = 0
    gradient_difference: float = 0.0
    weights: int = 0
    weight_difference: float = 0.0
    batches: int = 0
    samples: int = 0
    lines: int = 0
    files: int = 0
    tensors: int = 0
    file_difference: float = 0.0
    first_step: float | None = None
    """Seconds until the first optimizer step."""
    findings: list[Finding] = field(default_factory=list)

    def first(self) -> Finding | None:
        """What differs first."""
        return min(self.findings, key=lambda finding: finding.moment, default=None)


class Comparison:
    """The original against one run of the converted script."""

    def __init__(self, original: Run, run: Run, split: Split, tolerance: float, again: Callable[[], Run]) -> None:
        self.original, self.run, self.split, self.again = original, run, split, again
        self.ours = merged(original)
        self.theirs = [losses_of(run, rank) for rank in range(run.ranks)]
        low = any(loss.low for loss in self.ours)
        self.tolerance = max(tolerance, 1e-2) if low else tolerance
        self.outcome = Outcome(run.ranks)

    def all(self) -> Outcome:
        """Compare what the events say."""
        self._ends()
        self._initial()
        self._branches()
        self._data()
        self._losses()
        self._weights()
        self._printed()
        self._written()
        steps = self.run.of("weights")
        self.outcome.first_step = next((event["time"] for event in steps if event["when"] == "after"), None)
        return self.outcome

    def note(self, kind: str, message: str, at: str = "", moment: float = END) -> None:
        """Something did not hold."""
        self.outcome.findings.append(Finding(self.run.ranks, kind, message, at, moment))

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _ends(self) -> None:
        run = self.run
        crashed = [
            (_follows(event["message"]), event["time"], rank, event["message"], event["at"])
            for rank in range(run.ranks)
            for event in run.of("crash", rank)
        ]
        where = "; ".join(f"rank {rank} {run.waiting(rank)}" for rank in range(run.ranks))
        moment = float(min(map(len, self.theirs), default=0)) + 0.5
        if crashed:
            _, _, rank, message, at = min(crashed)
            rest = "" if all(code is not None for code in run.codes) else f" ({where})"
            parted = message.startswith("RankDivergenceError")  # the runtime has seen it before a rank could wait
            self.note(BRANCH if parted else CRASHED, f"rank {rank}: {message}{rest}", at, moment)
        elif run.stalled:
            self.note(STALLED, where, "", moment)
        elif not run.succeeded:
            rank = next(rank for rank, code in enumerate(run.codes) if code)
            tail = run.errors[rank].strip().splitlines()[-1:] or ["without a word"]
            self.note(CRASHED, f"{where}: {tail[0]}", "", moment)

    def _branches(self) -> None:
        """Every rank must take the same losses and steps."""
        paths = [
            [(e["kind"], e["at"]) for e in events if e["kind"] in ("loss", "gradients")] for events in self.run.events
        ]
        for rank, path in enumerate(paths[1:], 1):
            for number in range(max(len(path), len(paths[0]))):
                one = paths[0][number] if number < len(paths[0]) else None
                other = path[number] if number < len(path) else None
                if one != other and (self.run.succeeded or (one and other)):  # a rank that was ended has no more
                    told = [f"{step[0]} at {step[1]}" if step else "nothing more" for step in (one, other)]
                    moment = sum(step[0] == "loss" for step in path[:number])
                    at = (one or other or ("", ""))[1]
                    self.note(BRANCH, f"rank 0 comes to {told[0]}, rank {rank} to {told[1]}", at, moment)
                    return

    # -- numbers ------------------------------------------------------------------------------------------------------

    def _initial(self) -> None:
        for ours in self._weights_of(self.original, "initial"):
            for rank in range(self.run.ranks):
                theirs = [e for e in self._weights_of(self.run, "initial", rank) if e["optimizer"] == ours["optimizer"]]
                if not theirs:
                    continue
                pairs = zip(ours["digests"], theirs[0]["digests"], strict=False)
                wrong = [n for n, (a, b) in enumerate(pairs) if a[0] != b[0] or _distance(a, b) > 1e-9]
                if len(ours["digests"]) != len(theirs[0]["digests"]):
                    counts = f"{len(ours['digests'])} parameters became {len(theirs[0]['digests'])}"
                    self.note(INITIAL, f"the optimizer's {counts}", ours["at"], -1)
                    return
                if wrong:
                    shape = ours["digests"][wrong[0]][0]
                    message = f"{len(wrong)} of {len(ours['digests'])} parameters, first number {wrong[0]} {shape}"
                    self.note(INITIAL, f"{message}, on rank {rank}", ours["at"], -1)
                    return

    def _weights_of(self, run: Run, when: str, rank: int = 0) -> list[dict[str, Any]]:
        return [event for event in run.of("weights", rank) if event["when"] == when]

    def _data(self) -> None:
        """Every sample once: not seen by all ranks, none missing, none too many."""
        for number, (ours, *theirs) in enumerate(zip(self.ours, *self.theirs, strict=False)):
            if not ours.rows or not all(loss.rows for loss in theirs):
                continue
            if len(ours.rows) < len(theirs):
                continue  # a batch of fewer samples than ranks is seen twice, and counted there
            mine = Counter(ours.rows)
            others = [Counter(loss.rows) for loss in theirs]
            total = sum(map(len, (loss.rows for loss in theirs)))
            if len(theirs) > 1 and all(Counter(loss.given) == Counter(ours.given) for loss in theirs):
                message = f"all {len(theirs)} ranks get the same {len(ours.rows)} samples"
                self.note(DATA, f"{message}, those of the original's batch {number + 1}", theirs[0].at, number - 0.2)
                return
            if total != len(ours.rows):
                message = (
                    f"batch {number + 1} has {len(ours.rows)} samples in the original, {total} on all ranks together"
                )
                whole = len(theirs) > 1 and total == len(ours.rows) * len(theirs)
                self.note(DATA if whole else SAMPLES, message, theirs[0].at, number - 0.2)
                return
            if ours.loaded and sum(others, Counter()) != mine and not _alike(ours, theirs):
                message = f"batch {number + 1} is made of other samples than the original's"
                if not self._repeats(lambda run, k=number: merged(run)[k].rows == self.ours[k].rows):  # type: ignore[misc]
                    self._unrepeated(f"its batch {number + 1} is another one when it is run again", number)
                    return
                self.note(SAMPLES, message, theirs[0].at, number - 0.2)
                return
            if ours.loaded or sum(others, Counter()) == mine:
                self.outcome.batches += 1
                self.outcome.samples += total

    def _losses(self) -> None:
        least = 0.01 * sum(abs(loss.value) for loss in self.ours) / max(1, len(self.ours))
        counts = [len(losses) for losses in self.theirs]
        for number, (ours, *theirs) in enumerate(zip(self.ours, *self.theirs, strict=False)):
            distance = apart(ours.value, mean(theirs), least)
            if not distance <= self.tolerance:
                self._differing_loss(number, ours, theirs)
                return
            self.outcome.losses += 1
            self.outcome.loss_difference = max(self.outcome.loss_difference, distance)
        if len(set(counts)) == 1 and counts[0] != len(self.ours) and self.run.succeeded:
            last = (self.theirs[0] or self.ours)[-1]
            message = f"{len(self.ours)} losses became {counts[0]}"
            self.note(LOSSES, message, last.at, min(counts[0], len(self.ours)))

    def _differing_loss(self, number: int, ours: Loss, theirs: list[Loss]) -> None:
        told = f"loss {number + 1} is {ours.value:.6g} and became {mean(theirs):.6g}"
        if not self._repeats(lambda run: apart(ours.value, merged(run)[number].value) <= self.tolerance):
            self._unrepeated(f"its loss {number + 1} is another one when it is run again; set a seed", number)
            return
        before = self.ours[: number + 1]
        kind, why = LOSSES, ""
        if number and (uneven := self._uneven(number)):
            kind, why = COUNTS, uneven
        elif apart(ours.value, mean_by_samples(theirs)) <= self.tolerance:
            kind, why = COUNTS, f"ranks have {', '.join(str(len(loss.rows)) for loss in theirs)} samples"
        elif any(loss.drew for loss in before):
            drew = next(loss.drew for loss in before if loss.drew)
            kind, why = RANDOM, f"drawn {drew}, so that the losses of N ranks are as likely but not equal"
        elif len(theirs) > 1 and self.split.kind:
            kind, why = OF_SPLIT[self.split.kind], split_words(self.split)
        self.note(kind, told + (f": {why}" if why else ""), theirs[0].at, number)

    def _uneven(self, number: int) -> str:
        for earlier in range(number):
            if earlier < min(map(len, self.theirs)):
                counts = [len(losses[earlier].rows) for losses in self.theirs]
                if len(set(counts)) > 1:
                    told = " and ".join(map(str, counts))
                    return f"batch {earlier + 1} gave the ranks {told} samples, and each rank's mean counts the same"
        return ""

    def _weights(self) -> None:
        """After each step, on every rank."""
        noisy = noise_of(self.original)
        steps = self._weights_of(self.original, "after")
        # Ranks that all do the whole work come to the same numbers.
        begun = {finding.moment for finding in self.outcome.findings if finding.kind not in (STALLED, DATA)}
        for number, ours in enumerate(steps):
            moment = position(self.original, ours)
            if any(found < moment for found in begun):
                return  # what follows from a difference is none of its own
            spread = noisy[number] if number < len(noisy) else {}
            if self._differing_gradients(number, moment):
                return
            theirs = [self._weights_of(self.run, "after", rank)[number : number + 1] for rank in range(self.run.ranks)]
            if not all(theirs):
                if self.run.succeeded:
                    message = f"the optimizer's step {number + 1} is made by the original only"
                    self.note(WEIGHTS, message, ours["at"], moment - 0.1)
                return
            allowed = spread.get(ours["optimizer"], [])
            for rank, (event,) in enumerate(theirs):
                if self._differing_weights(ours, event, allowed, rank, number, moment):
                    return
            self.outcome.steps += 1
        if self.run.succeeded and len(self._weights_of(self.run, "after")) != len(steps):
            self.note(WEIGHTS, f"the optimizers make {len(steps)} steps in the original, more in the converted script")

    def _differing_weights(
        self, ours: dict[str, Any], theirs: dict[str, Any], allowed: list[float], rank: int, number: int, moment: int
    ) -> bool:
        for index, (a, b) in enumerate(zip(ours["digests"], theirs["digests"], strict=False)):
            if a[0] != b[0]:
                self.note(WEIGHTS, f"parameter {index} has another shape", theirs["at"], moment - 0.1)
                return True
            slack = allowed[index] if index < len(allowed) else 0.0
            distance = max(0.0, _distance(a, b) - slack / max(a[2] ** 0.5, 1e-12))
            if not distance <= self.tolerance:
                message = f"after step {number + 1} parameter {index} {a[0]} differs by {distance:.1e}"
                message += f" on rank {rank}" * bool(rank)
                self.note(WEIGHTS, f"{message}: the gradients are the same", theirs["at"], moment - 0.1)
                return True
            if slack <= 0.5 * a[2] ** 0.5:
                self.outcome.weights += rank == 0
                self.outcome.weight_difference = max(self.outcome.weight_difference, distance)
        return False

    def _differing_gradients(self, number: int, moment: int) -> bool:
        """Norms of whole gradients, as the optimizer gets them; a step of rate 0 shows them nowhere else."""
        ours, theirs = self.original.of("gradients"), self.run.of("gradients")
        if number >= min(len(ours), len(theirs)):
            return False
        one, other = (sum((norm or 0.0) ** 2 for norm in e["norms"]) ** 0.5 for e in (ours[number], theirs[number]))
        distance = apart(one, other)
        self.outcome.gradients += 1
        if distance <= self.tolerance:
            self.outcome.gradient_difference = max(self.outcome.gradient_difference, distance)
            return False
        kind, why = GRADIENTS, ""
        if uneven := self._uneven(moment):
            kind, why = COUNTS, uneven
        elif any(loss.drew for loss in self.ours[:moment]):
            kind, why = RANDOM, "the losses before have drawn them"
        elif self.run.ranks > 1 and self.split.kind:
            kind, why = OF_SPLIT[self.split.kind], split_words(self.split)
        message = f"at step {number + 1} the gradients' norm is {one:.6g} and became {other:.6g}"
        self.note(kind, message + (f": {why}" if why else ""), theirs[number]["at"], moment - 0.2)
        return True

    # -- output -------------------------------------------------------------------------------------------------------

    def _printed(self) -> None:
        ours, theirs = self.original.of("print"), self.run.of("print")
        texts = [[event["text"] for event in events] for events in (ours, theirs)]
        found = compare_lines(texts[0], texts[1], self.tolerance)
        if found.different and self.run.succeeded:
            again = [event["text"] for event in self.again().of("print")]
            found = compare_lines(texts[0], texts[1], self.tolerance, again)
        self.outcome.lines = found.compared
        self._several()
        if found.different and self.run.succeeded:
            first = found.different[0]
            event = ours[first.index] if first.index < len(ours) else None
            moment = position(self.original, event) + 0.3 if event else END
            more = f", and {len(found.different) - 1} more" if len(found.different) > 1 else ""
            at = next((e["at"] for e in theirs if e["text"] == first.theirs), event["at"] if event else "")
            self.note(OUTPUT, f"{first.ours!r} became {first.theirs!r}{more}", at, moment)

    def _several(self) -> None:
        """Lines that more than one rank prints."""
        seen: dict[str, list[int]] = {}
        text: dict[str, str] = {}
        for rank in range(self.run.ranks):
            for event in self.run.of("print", rank):
                ranks = seen.setdefault(event["at"], [])
                text.setdefault(event["at"], event["text"])
                if rank not in ranks:
                    ranks.append(rank)
        known = {event["at"] for rank in range(1, self.original.ranks) for event in self.original.of("print", rank)}
        for at, ranks in seen.items():
            if any(ranks) and self.run.succeeded and at not in known:
                who = "all ranks print" if len(ranks) == self.run.ranks else f"ranks {', '.join(map(str, ranks))} print"
                self.note(PRINTED, f"{who} {text[at][:60]!r}", at)

    def _written(self) -> None:
        writers: dict[str, dict[int, str]] = {}
        for rank in range(self.run.ranks):
            for event in self.run.of("file", rank):
                if event["how"] != "mkdir":
                    writers.setdefault(event["path"], {}).setdefault(rank, event["at"])
        known = {event["path"] for rank in range(1, self.original.ranks) for event in self.original.of("file", rank)}
        for path, ranks in writers.items():
            if len(ranks) > 1 and path not in known:
                at = next(iter(ranks.values()))
                told = f"{path} is written by ranks {', '.join(map(str, ranks))}"
                self.note(WRITTEN, told, at)
        loaded = {event["path"] for rank in range(self.run.ranks) for event in self.run.of("load", rank)}
        for event in self.original.of("load"):
            if event["path"] not in loaded and self.run.succeeded:
                self.note(FILES, f"{event['path']} is loaded by the original only", event["at"])
                return

    # -- the original again -------------------------------------------------------------------------------------------

    def _repeats(self, what: Callable[[Run], bool]) -> bool:
        try:
            return what(self.again())
        except IndexError:
            return False

    def _unrepeated(self, message: str, number: int) -> None:
        self.note(UNREPEATED, message, self.ours[number].at, number - 0.3)


def split_words(split: Split) -> str:
    """What the split test says."""
    halves = " and ".join(f"{value:.5g}" for value in split.halves)
    told = f"on one process the first batch gives {split.whole:.5g}, its halves {halves}"
    if split.kind == "counts":
        return f"{told}: a mean over something else than samples (a mask, an ignored index), which halves hold unevenly"
    return told + (": a sum" if split.kind == "sum" else "")


def noise_of(original: Run) -> list[dict[int, list[float]]]:
    """For each step, how far rounding error may have led every parameter of each optimizer.

    An entry whose gradient is rounding error moves by the learning rate at most where an optimizer divides by the
    gradient's size; twice that is the distance of two runs.
    """
    gradients, found = iter(original.of("gradients")), []
    sums: dict[int, list[float]] = {}
    for event in original.of("weights"):
        if event["when"] != "after":
            continue
        step = next(gradients, None)
        if step is None:
            break
        known = sums.setdefault(step["optimizer"], [0.0] * len(step["noise"]))
        for index, (count, rate) in enumerate(zip(step["noise"], step["rates"], strict=True)):
            if index < len(known):
                known[index] += 2 * rate * count**0.5
        found.append({number: list(spread) for number, spread in sums.items()})
    return found


def _follows(message: str) -> bool:
    """Whether an error says no more than that another rank has gone."""
    return any(sign in message for sign in ("CommunicationError", "DistBackendError", "Connection closed by peer"))


def _distance(ours: list[Any], theirs: list[Any]) -> float:
    """Between two digests, relative to the tensor's norm."""
    count = 1
    for size in ours[0]:
        count *= size
    norm = max(ours[2], 0.0) ** 0.5
    found = max(
        abs(ours[1] - theirs[1]) / max(1, count) ** 0.5,
        abs(norm - max(theirs[2], 0.0) ** 0.5),
        abs(ours[3] - theirs[3]),
    )
    return found / max(norm, 1e-12) if found == found else (0.0 if ours[2] != ours[2] else float("inf"))


def _alike(ours: Loss, theirs: list[Loss]) -> bool:
    """Whether batches hold the same samples, each padded to another length."""
    return bool(ours.loose) and Counter(ours.loose) == sum((Counter(loss.loose) for loss in theirs), Counter())
