"""The whole comparison: asks both sides for the same phases and sets their recordings against each other."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewriter.verify.compare import Comparison, Distance, compare, first_difference, merge
from rewriter.verify.findings import Report, Row
from rewriter.verify.processes import Failure, Group, Reply


@dataclass(frozen=True)
class Settings:
    """What to verify and how strictly."""

    original: Path
    converted: Path
    factory: str
    ranks: tuple[int, ...] = (1, 2)
    seed: int = 0
    steps: int = 3
    shapes: tuple[str, ...] = ()
    tolerance: float = 1e-6
    exact: bool = True
    """Whether one rank must give the same bits."""
    device: str = "auto"
    timeout: float = 300.0
    keep: Path | None = None
    tp_size: int = 1
    """So many ranks hold the slices of layers, where the number of ranks is a multiple of it."""

    def tensor_parallel(self, ranks: int) -> int:
        """Of a run on so many ranks."""
        return self.tp_size if ranks % self.tp_size == 0 else 1


def verify(settings: Settings) -> Report:
    """Compare everything, stopping at nothing."""
    with tempfile.TemporaryDirectory(prefix="bmt-verify-") as folder:
        return _Run(settings, Path(folder)).all()


def import_roots(path: Path) -> list[Path]:
    """The folders that must be on ``sys.path`` to import the code at ``path``."""
    path = path.resolve()
    if path.is_file() or (path / "__init__.py").exists():
        return [path.parent]
    return [folder for folder in (path, path / "src") if folder.is_dir()]


class _Run:
    def __init__(self, settings: Settings, work: Path) -> None:
        self.settings, self.work = settings, work
        self.report = Report()
        self.original = self._group("original", settings.original, 1)
        self.ours: dict[str, Reply] = {}
        self.tensors: dict[str, Any] = {}

    def all(self) -> Report:
        try:
            for ranks in self.settings.ranks:
                group = self._group("converted", self.settings.converted, ranks)
                try:
                    self._with(group, ranks)
                finally:
                    group.close()
        finally:
            self.original.close()
        self.report.sort()
        self._keep()
        return self.report

    def _group(self, side: str, code: Path, ranks: int) -> Group:
        settings = self.settings
        device = settings.device
        if device == "auto":
            import torch

            device = "cuda" if torch.cuda.device_count() >= max(settings.ranks) else "cpu"
        roots = [str(root) for root in import_roots(code)]
        job = {
            "side": side, "ranks": ranks, "factory": settings.factory, "seed": settings.seed, "device": device,
            "tp_size": settings.tensor_parallel(ranks), "shapes": list(settings.shapes), "path": roots,
            "roots": [str(code.resolve())],
        }  # fmt: skip
        return Group(job, self.work, settings.timeout)

    # -- phases ---------------------------------------------------------------------------------------------------

    def _with(self, group: Group, ranks: int) -> None:
        if not self._build(group, ranks):
            return
        if ranks != self.settings.ranks[0]:
            self.original.ask("reset")  # the ranks before have trained it
        self._phase(group, ranks, "evaluate")
        self._gradients(group, ranks)
        slices = self.settings.tensor_parallel(ranks)
        still = {"still": True} if slices > 1 else {}
        if still:
            note = "tensor-parallel ranks draw other masks for what they share: dropout does nothing from here on"
            self.report.rows.append(Row(ranks, "train", "dropout", skipped=note))
        self._phase(group, ranks, "train", still)
        if ranks > slices:
            self._split(group, ranks, still)
        self._phase(group, ranks, "steps", {"count": self.settings.steps, "max_norm": self._max_norm(), **still})
        self._checkpoints(group, ranks)

    def _of_original(self, phase: str, **options: Any) -> Reply:
        key = f"{phase} {options}"
        if key not in self.ours:
            self.ours[key] = self.original.ask(phase, **options)[0]
        return self.ours[key]

    def _phase(
        self, group: Group, ranks: int, phase: str, options: dict[str, Any] | None = None,
        theirs_options: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        options = options or {}
        ours = self._of_original(phase, **options)
        self._sections(ranks, phase, ours, group.ask(phase, **(options | (theirs_options or {}))), group)

    def _build(self, group: Group, ranks: int) -> bool:
        """Whether there is anything to run."""
        ours, theirs = self._of_original("build"), group.ask("build")
        self._sections(ranks, "build", ours, theirs, None)
        for name, reply, path in (
            ("original", ours, self.settings.original), ("converted", theirs[0], self.settings.converted),
        ):  # fmt: skip
            if isinstance(reply, dict) and not reply["files"]:
                error = f"no class of the {name} model is defined in {path}: something else was imported"
                self.report.rows.append(Row(ranks, "build", "code", error=error))
        if isinstance(theirs[0], dict):
            self.report.files = tuple(theirs[0]["files"])
        if ranks > 1 and isinstance(theirs[0], dict) and isinstance(ours, dict):
            wrong = tuple(Distance(name, why="held whole by every rank") for name in theirs[0]["unsharded"])
            count = len(ours["keys and shapes"])
            self.report.rows.append(Row(ranks, "build", "sharded", Comparison(count, different=wrong)))
            if self.settings.tensor_parallel(ranks) > 1:
                split = len(theirs[0]["split"])
                none = () if split else (Distance("the model", why="no layer is split over tensor-parallel ranks"),)
                self.report.rows.append(Row(ranks, "build", "split", Comparison(split, different=none)))
        return isinstance(ours, dict) and isinstance(theirs[0], dict)

    def _gradients(self, group: Group, ranks: int) -> None:
        ours = self._of_original("gradients")
        if isinstance(ours, Failure) and not isinstance(self._of_original("train"), Failure):
            note = "the original cannot be trained in evaluation mode: " + ours.message.splitlines()[0]
            self.report.rows.append(Row(ranks, "gradients", "gradients", skipped=note))
            return
        grads = ours.get("input_grads", False) if isinstance(ours, dict) else False
        self._phase(group, ranks, "gradients", theirs_options={"input_grads": grads})
        if isinstance(ours, dict) and (why := ours["no_input_grads"]):
            self.report.rows.append(Row(ranks, "gradients", "gradients of inputs", skipped=why))

    def _split(self, group: Group, ranks: int, still: dict[str, Any]) -> None:
        slices = self.settings.tensor_parallel(ranks)
        shares = ranks // slices
        ours, theirs = (
            self._of_original("split", shares=shares, **still),
            group.ask("split", shares=shares, **still)[::slices],
        )
        if isinstance(ours, Failure):
            note = "the original cannot run a share of the batch: " + ours.message.splitlines()[0]
            self.report.rows.append(Row(ranks, "split", "gradients", skipped=note))
            return
        if "unsplit" in ours:
            note = f"the inputs' first dimension does not split into {shares}"
            self.report.rows.append(Row(ranks, "split", "gradients", skipped=note))
            return
        joined: list[Reply] = [*theirs]
        if not isinstance(theirs[0], Failure):
            parts = [reply for reply in theirs if isinstance(reply, dict)]
            joined = [
                {
                    "outputs": _numbered(part["outputs"] for part in parts),
                    "loss": _numbered(part["loss"] for part in parts),
                    "gradients": parts[0]["gradients"],
                }
            ]
        whole = {
            "outputs": _numbered(ours["outputs"]), "loss": _numbered(ours["loss"]), "gradients": ours["gradients"],
        }  # fmt: skip
        self._sections(ranks, "split", whole, joined, None)

    def _checkpoints(self, group: Group, ranks: int) -> None:
        mine, yours = self.work / "original.ckpt", self.work / f"converted{ranks}.ckpt"
        saved = self._of_original("save", path=str(mine))
        written = group.ask("save", path=str(yours))
        read = self.original.ask("load", path=str(yours)) if yours.exists() else written
        self._sections(ranks, "their checkpoint in the original", written[0], read, None)
        back = group.ask("load", path=str(mine)) if mine.exists() else [saved]
        self._sections(ranks, "the original's checkpoint", saved, back, None)

    def _max_norm(self) -> float:
        """Half of the first gradient's norm, so that clipping acts."""
        import torch

        record = self._of_original("train")
        if isinstance(record, Failure):
            return 1.0
        norms = [g.double().norm() for g in record["gradients"].values() if isinstance(g, torch.Tensor)]
        return round(float(torch.stack(norms).norm()) / 2, 6) or 1.0 if norms else 1.0

    # -- comparison -----------------------------------------------------------------------------------------------

    def _sections(self, ranks: int, phase: str, ours: Reply, theirs: Sequence[Reply], traced: Group | None) -> None:
        for name, reply in (("original", ours), ("converted", theirs[0])):
            if isinstance(reply, Failure):
                error = f"the {name} raised {reply.message.splitlines()[0] if reply.message else '?'}"
                self.report.rows.append(Row(ranks, phase, "run", error=error, detail=reply.detail))
                return
        assert isinstance(ours, dict)
        differs = False
        for what, leaves in ours.items():
            if not isinstance(leaves, dict) or (what == "buffers" and len(leaves) <= 1):
                continue
            found: Comparison | None = None
            for reply in theirs:
                part = reply.get(what) if isinstance(reply, dict) else None
                if part is not None:
                    tolerance = self._tolerance(ranks, phase, what)
                    one = compare(leaves, part, tolerance, noise=what.startswith(("gradients", "weights")))
                    found = one if found is None else merge(found, one)
                    self._note(f"{ranks} ranks, {phase}, {what}", one, leaves, part)
            row = Row(ranks, phase, what, found or Comparison())
            self.report.rows.append(row)
            differs |= row.verdict == "differs" and what in ("outputs", "loss")
        sliced = self.settings.tensor_parallel(ranks) > 1  # layers inside give shares, which differ
        if differs and traced is not None and not sliced and phase in ("evaluate", "gradients", "train"):
            self._trace(traced, ranks, phase)

    def _tolerance(self, ranks: int, phase: str, what: str) -> float:
        if phase == "steps":
            # Adam divides by a gradient's size, so rounding comes out larger; and every step adds to it, much where the
            # model normalises over few values.
            return (10 if what == "weights after one" else 100) * self.settings.tolerance
        exact = phase == "build" or what == "weights" or (ranks == 1 and self.settings.exact)
        return 0.0 if exact else self.settings.tolerance

    def _trace(self, group: Group, ranks: int, phase: str) -> None:
        train = phase == "train"
        ours, theirs = self._of_original("trace", train=train), group.ask("trace", train=train)[0]
        for reply in (ours, theirs):
            if isinstance(reply, Failure):
                why = "could not be looked for: " + reply.message.splitlines()[0]
                self.report.first[ranks, phase] = ("-", Distance("-", why=why))
                return
        assert isinstance(ours, dict) and isinstance(theirs, dict)
        found = first_difference(ours["calls"], theirs["calls"], self._tolerance(ranks, phase, "outputs"))
        if found is not None:
            name, distance, leaves = found
            self.report.first[ranks, phase] = (name, distance)
            self.tensors[f"{ranks} ranks, {phase}, first module {name}"] = leaves

    def _note(self, title: str, comparison: Comparison, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        """Keep the tensors that differ most."""
        worst = comparison.worst()
        if worst is not None and title not in self.tensors:
            self.tensors[title] = (worst.path, ours.get(worst.path), theirs.get(worst.path))

    def _keep(self) -> None:
        if not self.tensors:
            return
        import torch

        folder = self.settings.keep or Path(tempfile.mkdtemp(prefix="bmt-verify-differences-"))
        folder.mkdir(parents=True, exist_ok=True)
        self.report.kept = folder / "differences.pt"
        torch.save(self.tensors, self.report.kept)


def _numbered(parts: Any) -> dict[str, Any]:
    return {f"share {number}: {path}": leaf for number, part in enumerate(parts) for path, leaf in part.items()}
