"""What the GPU did during a step: busy and idle time of every stream, and how gathers and reductions moved."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Event = dict[str, Any]
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


def profile_steps(step: Callable[[], object], steps: int = 2) -> list[Event]:
    """Run `step` under the profiler; everything the GPU did, as events with `name`, `ts`, `dur` (microseconds)."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events: list[Event] = json.loads(path.read_text())["traceEvents"]
    return [event for event in events if event.get("cat") in GPU_WORK]


def summary(events: list[Event], steps: int = 2, heaviest: int = 15) -> list[str]:
    """Lines of text, all times in milliseconds per step."""
    per_step = 1e-3 / steps
    begin = min(event["ts"] for event in events)
    end = max(event["ts"] + event["dur"] for event in events)
    span = (end - begin) * per_step
    lines = [f"span {span:.1f} ms per step"]
    streams: dict[int, list[Event]] = {}
    names: dict[str, list[Event]] = {}
    for event in events:
        streams.setdefault(event["args"]["stream"], []).append(event)
        names.setdefault(event["name"], []).append(event)
    for stream, own in sorted(streams.items(), key=lambda item: -busy(item[1])):
        used = busy(own) * per_step
        count = len(own) / steps
        lines.append(f"stream {stream}: {count:.0f} operations, busy {used:.1f} ms, idle {span - used:.1f} ms")
    for what, way in (("gathers", gather_way), ("reductions", reduction_way)):
        ways: dict[str, list[Event]] = {}
        for event in events:
            if (found := way(event["name"])) is not None:
                ways.setdefault(found, []).append(event)
        lines += [
            f"{what} moved by {found}: {len(own) / steps:.0f} operations, {busy(own) * per_step:.1f} ms"
            for found, own in ways.items()
        ]
    by_weight = sorted(names.items(), key=lambda item: -sum(event["dur"] for event in item[1]))
    for name, own in by_weight[:heaviest]:
        lines.append(f"{sum(event['dur'] for event in own) * per_step:8.2f} ms  x{len(own) / steps:<6.0f} {name[:80]}")
    return lines


def busy(events: list[Event]) -> float:
    """Microseconds in which at least one of the events was running."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def gather_way(name: str) -> str | None:
    if "AllGather" in name:
        return "a kernel (on the multiprocessors)"
    return "copy engines (Memcpy PtoP)" if "PtoP" in name else None


def reduction_way(name: str) -> str | None:
    return "a kernel" if "ReduceScatter" in name or "AllReduce" in name else None
