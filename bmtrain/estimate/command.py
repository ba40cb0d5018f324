"""``python -m bmtrain estimate MODULE:FACTORY``: the memory that a job will need, before there is a GPU for it."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from ..block.summary import counts, words
from ..context import init_distributed, is_initialized
from ..errors import BMTrainError, ConfigurationError
from ..log import interruptible
from ..precision import as_precision
from .estimate import Estimate, Job, Model
from .scaling import Measured, Prediction, Ranks, completed, predict, usual

_GIB = 2**30
_OVERHEAD = 2.2
_GPUS = (1, 2, 4, 8, 16, 32, 64)
_MOST = 2**10

_CHECKED = """\
What this rests on. Parameters, gradients and AdamW's states are counted as bmtrain lays them out, to the byte. What a
forward and a backward have alive is counted by running the model on the device "meta", with attention, RMSNorm and
dropout keeping what their GPU kernels keep; for the rest it is, to the byte, what autograd saves on a CPU. CUDA, NCCL
and the allocator's reserve are one number (--overhead). Against what two H200 had in use for a Llama-like model in
bf16 (docs/benchmarks.md: 1.3B, 7B and 13B, blocks recomputed and, of 1.3B, kept) the sum is within 1 %, with that
number fitted to the same rows; a model of 16 MiB takes 7 % more than is said. Against torch's own peak for GPT-2 under
autocast, without that number: 1.5B 1 % high, 350M 5 %, a tiny model, of which logits are most, 15 %. Not checked: other
kinds of models, compiled blocks, other optimizers than AdamW, tensor parallelism, matrix products under autocast that
are neither linear layers nor F.scaled_dot_product_attention."""


def parser(**options: Any) -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(
        description="Predict the memory that training takes on each GPU, on a CPU, without values.",
        epilog=_CHECKED,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **{"prog": "bmt estimate", **options},
    )
    made.add_argument(
        "model", metavar="MODULE:FACTORY", help="what makes the model: model:GPT, or a call, 'model:GPT(layers=12)'"
    )
    made.add_argument("--gpus", type=_whole, default=1, metavar="N", help="ranks over which it is sharded (default: 1)")
    made.add_argument("--batch", type=_whole, default=1, metavar="N", help="sequences on each GPU at a time")
    made.add_argument("--length", type=_whole, default=1024, metavar="N", help="tokens of a sequence (default: 1024)")
    made.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="cast the model, as model.bfloat16() does")
    made.add_argument("--precision", choices=["bf16", "fp16"], help="as in bmt.init_distributed(precision=...)")
    made.add_argument("--autocast", choices=["bf16", "fp16"], help="the forward runs under torch.autocast")
    made.add_argument("--accumulate", action="store_true", help="several backwards make a step")
    made.add_argument(
        "--input", action="append", default=[], metavar="NAME=BxT:long", help="an argument of forward; B and T as above"
    )
    made.add_argument("--card", type=float, metavar="GIB", help="say what fits into so much memory of a GPU")
    made.add_argument(
        "--overhead", type=float, default=_OVERHEAD, metavar="GIB",
        help=f"of CUDA, NCCL and the allocator (default: {_OVERHEAD})",
    )  # fmt: skip
    made.add_argument(
        "--scale", type=_numbers, metavar="N,N,...", help="predict the step time on so many GPUs (docs/scaling.md)"
    )
    made.add_argument("--host-gpus", type=_whole, default=8, metavar="N", help="GPUs of a host (default: 8)")
    made.add_argument("--measured", metavar="FILE.json", help="what was measured on one host, for --scale")
    made.add_argument("--json", action="store_true", help="print numbers of bytes for programs")
    return made


@interruptible("bmt estimate")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command.  0: done, and it fits where ``--card`` is given; 1: it does not; 2: it could not be estimated."""
    given = parser().parse_args(arguments)
    try:
        job = _job(given)
        if not is_initialized():
            init_distributed(device="cpu", watch=False)
        model = Model(_factory(given.model), job.dtype)
        if given.scale or given.measured:
            return _scale(given, job, model)
        found = model.estimate(job)
    except BMTrainError as error:
        print(f"bmt estimate: {error}", file=sys.stderr)
        return 2
    overhead = int(given.overhead * _GIB)
    needed = found.total() + overhead
    if given.json:
        print(json.dumps({**asdict(found), "overhead": overhead, "total": needed}, indent=2))
    else:
        for line in _table(given, job, found, overhead):
            print(line)
        if given.card is not None and not found.problem:
            for line in _fits(given, job, model, found, overhead):
                print(line)
    if found.problem:
        print(f"bmt estimate: activations are not counted, the forward needs values: {found.problem}", file=sys.stderr)
        return 2
    return int(given.card is not None and needed > given.card * _GIB)


def _whole(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _numbers(text: str) -> list[int]:
    return [_whole(number) for number in text.split(",")]


def _job(given: argparse.Namespace) -> Job:
    pairs = [text.partition("=") for text in given.input]
    for name, equals, shape in pairs:
        if not (name and equals and shape):
            raise ConfigurationError(f"--input {name}{equals}{shape}: write NAME=BxT:long.")
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return Job(
        given.gpus, given.batch, given.length, names.get(given.dtype), as_precision(given.precision),
        names.get(given.autocast), given.accumulate, {name: shape for name, _, shape in pairs},
    )  # fmt: skip


def _factory(text: str) -> Callable[[], Any]:
    """What makes the model.  Raises ConfigurationError where there is no such thing."""
    name, separator, made = text.partition(":")
    if not (name and separator and made):
        raise ConfigurationError(
            f"{text}: write MODULE:FACTORY, as in model:GPT, or MODULE:CALL, as in 'model:GPT(12)'."
        )
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    except ImportError as error:
        raise ConfigurationError(f"{text}: {error}.") from None
    finally:
        sys.path.remove(os.getcwd())
    call = made if "(" in made else f"{made}()"

    def make() -> Any:
        try:
            return eval(call, vars(module))
        except (AttributeError, NameError, SyntaxError, TypeError) as error:
            raise ConfigurationError(
                f"{name}: {call} does not work: {error}. Give a function without arguments, or a whole call in quotes."
            ) from error

    return make


def _table(given: argparse.Namespace, job: Job, found: Estimate, overhead: int) -> Iterator[str]:
    ranks = f"{job.gpus} rank{'s' * (job.gpus != 1)}"
    yield f"{counts(found.parameters, found.trained, found.units)} ({found.blocks} blocks); {ranks}"
    yield f"{job.batch} x {job.length} on each; precision {words(job.precision)}; AdamW"
    if found.loss:
        yield f"loss: {found.loss}"
    if found.tests:
        yield f"tests of values that were taken for true, as of a mask that hides nothing: {found.tests}"
    columns = [found.recomputed, found.kept]
    titles = ["recomputed", "kept"]
    if found.recomputed == found.kept:
        columns, titles = columns[:1], [""]
    yield ""
    yield f"{'GiB on each rank':44}" + "".join(f"{title:>12}" for title in titles)
    held = found.held
    for name, size in (
        ("parameters, its part", held.parameters),
        ("gradients, its part", held.gradients),
        ("moments and masters, its part", held.states),
        ("whole parameters, while they are used", held.whole),
        ("whole gradients, until they are reduced", held.whole_gradients),
        ("the model's buffers", found.buffers),
    ):
        yield f"{name:44}" + _cells([size] * len(columns))
    live = "activations" if job.gpus > 1 else "activations and gradients"
    yield f"{live + ', at their most':44}" + _cells(columns)
    yield f"{'CUDA, NCCL, allocator (assumed)':44}" + _cells([overhead] * len(columns))
    fixed = held.total + found.buffers + overhead
    yield f"{'all':44}" + _cells([None if size is None else fixed + size for size in columns])


def _to_scale(given: argparse.Namespace, job: Job) -> tuple[Job, Measured]:
    """What ``--scale`` starts from.  Raises ConfigurationError where a figure is missing or cannot be."""
    if given.measured is None or not given.scale:
        raise ConfigurationError(
            "--scale N,N,... and --measured FILE.json go together: docs/scaling.md says how to measure."
        )
    if job.gpus != 1:
        raise ConfigurationError("--scale says on how many GPUs: leave --gpus out.")
    measured = Measured.read(given.measured)
    most = max(measured.step_ms or (), default=1)
    if most > given.host_gpus:
        raise ConfigurationError(
            f"step_ms of {most} GPUs is of several hosts of {given.host_gpus} (--host-gpus): give that of one."
        )
    if given.accumulate and measured.backwards == 1:
        raise ConfigurationError("--accumulate: the file says backwards=1; give the number that makes a step.")
    return replace(job, accumulates=job.accumulates or measured.backwards > 1), measured


def _scale(given: argparse.Namespace, job: Job, model: Model) -> int:
    """The steps that ``--scale`` asks for.  Raises ConfigurationError where a figure is missing or cannot be."""
    job, measured = _to_scale(given, job)
    steps = dict(measured.step_ms or {})
    everywhere = usual(given.scale, given.host_gpus)
    sizes = {ranks.shard_size for ranks in everywhere} | set(steps)
    work = {size: model.work(replace(job, gpus=size)) for size in sizes}
    assumed = measured.contention is None and all(size == 1 for size in steps)
    measured = completed(work, replace(measured, contention=0.0) if assumed else measured)
    predictions = [predict(work[ranks.shard_size], measured, ranks) for ranks in everywhere]
    several = model.estimate(replace(job, gpus=2))
    overhead = int(given.overhead * _GIB)
    rows = []
    for predicted in predictions:
        now = replace(job, gpus=predicted.ranks.shard_size)
        found = model.estimate(now) if now.gpus == 1 else replace(several, held=model.held(now))
        size = None if found.problem else found.total(keep=not measured.recomputed) + overhead
        tokens = measured.backwards * job.batch * job.length / predicted.ms * 1e3
        rows.append((predicted, tokens, size))
    if given.json:
        print(json.dumps([{**asdict(row), "tokens_s": tokens, "total": size} for row, tokens, size in rows], indent=2))
    else:
        for line in _scale_table(given, job, measured, rows):
            print(line)
        if assumed and any(ranks.gpus > 1 for ranks in everywhere):
            print("contention was not given, nor step_ms of several GPUs: with 0 these steps are the shortest possible")
    for number in sorted(steps)[:-1]:
        if number > 1:  # contention was not fitted to it
            ms = predict(work[number], measured, Ranks(number, number, given.host_gpus)).ms
            said = f"the step on {number} GPUs took {steps[number]:g} ms; predicted: {ms:.1f}"
            print(f"bmt estimate: {said}", file=sys.stderr)
    if several.problem:
        print(
            f"bmt estimate: activations are not counted, the forward needs values: {several.problem}", file=sys.stderr
        )
        return 2
    return int(given.card is not None and not any(size and size <= given.card * _GIB for _, _, size in rows))


def _scale_table(
    given: argparse.Namespace, job: Job, measured: Measured, rows: Sequence[tuple[Prediction, float, int | None]]
) -> Iterator[str]:
    yield (
        f"{measured.backwards} x {job.batch} x {job.length} on each GPU and step, blocks "
        f"{'recomputed' if measured.recomputed else 'kept'}, parameters whole while they are used; "
        f"{given.host_gpus} GPUs a host; contention {measured.contention or 0:.2f}"
    )
    titles = (
        "GPUs",
        "shard_size",
        "ms a step",
        "compute",
        "optimizer",
        "collectives",
        "exposed",
        "tokens/s/GPU",
        "GiB",
    )
    yield "".join(f"{title:>13}" for title in titles)
    for row, tokens, size in rows:
        times = (row.ms, row.compute_ms, row.optimizer_ms, row.communication_ms, row.exposed_ms)
        gib = "?" if size is None else f"{size / _GIB:.2f}"
        over = size is not None and given.card is not None and size > given.card * _GIB
        yield (
            f"{row.ranks.gpus:13}{row.ranks.shard_size:13}"
            + "".join(f"{time:13.1f}" for time in times)
            + f"{tokens:13.0f}{gib:>13}{'  does not fit' * over}"
        )


def _cells(sizes: Sequence[int | None]) -> str:
    return "".join(f"{'?' if size is None else f'{size / _GIB:.2f}':>12}" for size in sizes)


def _fits(given: argparse.Namespace, job: Job, model: Model, found: Estimate, overhead: int) -> Iterator[str]:
    """On how many GPUs it fits, and with which batches."""
    room = int(given.card * _GIB) - overhead
    yield ""
    yield f"on cards of {given.card:g} GiB, {job.batch} x {job.length} on each:"
    several = found if job.gpus > 1 else model.estimate(replace(job, gpus=2))
    for gpus in sorted({*_GPUS, job.gpus}):
        if gpus == job.gpus:
            now = found
        elif gpus == 1:
            now = model.estimate(replace(job, gpus=1))
        else:
            now = replace(several, held=model.held(replace(job, gpus=gpus)))
        total = [now.total() + overhead, now.total(keep=True) + overhead]
        said = ["fits" if size <= room + overhead else "does not fit" for size in total]
        said = said[:1] if total[0] == total[1] else [f"recomputed {said[0]}", f"kept {said[1]}"]
        yield f"  {gpus:3} GPU{'s' if gpus > 1 else ' '} {_cells(total[: len(said)])}  {', '.join(said)}"
    most = _most(job, model, room)
    said = [f"{most[0]} recomputed", f"{most[1]} kept"] if most[0] != most[1] else [str(most[0])]
    yield f"largest batch (1, 2, 4, ...) on each of {job.gpus}: {', '.join(said)}"


def _most(job: Job, model: Model, room: int) -> tuple[int, int]:
    """The largest batches whose step fits, with blocks recomputed and with activations kept; 0 for none."""
    recomputed = kept = 0
    batch = 1
    while batch <= _MOST:
        found = model.estimate(replace(job, batch=batch))
        if found.total() > room:
            break
        recomputed = batch
        kept = batch if found.total(keep=True) <= room else kept
        batch *= 2
    return recomputed, kept
