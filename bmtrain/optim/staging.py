"""What goes between a GPU and optimizer states in the host's memory, while the host computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from ..device import Device, Event
from ..shard.unit import ShardUnit
from .pieces import Home


class _Slot:
    """Pinned memory of one batch of units, taken once, and given out in parts."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: list[torch.Tensor] = []
        self._given = 0
        self.gradients: dict[int, torch.Tensor] = {}  # by key of home
        self.came: Event | None = None  # when they are here
        self.went: Event | None = None  # when the device has what was to go there

    def begin(self) -> None:
        """Give out all of it anew."""
        if self.went is not None:
            self.went.synchronize()
        self.came = self.went = None
        self._given = 0
        self.gradients.clear()

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Memory for as many elements of this dtype."""
        if self._given == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8, device="cpu"))
        buffer = self._buffers[self._given]
        if buffer.numel() < tensor.nbytes:
            buffer = self._buffers[self._given] = self._device.host_buffer(tensor.view(torch.uint8))
        self._given += 1
        return buffer[: tensor.nbytes].view(tensor.dtype)


class Staging:
    """Gradients of the next batch of units come, and parameters of the last one go, while the host updates one."""

    def __init__(self, device: Device) -> None:
        self._device, self._stream = device, device.copy_stream()
        self._slots, self._turn = (_Slot(device), _Slot(device)), 0

    @property
    def _slot(self) -> _Slot:
        """Of the batch that is updated now."""
        return self._slots[self._turn]

    def each(self, batches: Sequence[list[ShardUnit]], reduced: Iterable[int]) -> Iterator[list[ShardUnit]]:
        """``batches``, one after the other; homes whose keys are in ``reduced`` have gradients that are wanted."""
        wanted = set(reduced)
        for number, batch in enumerate(batches):
            if number == 0:
                self._fetch(self._slot, batch, wanted)
            if number + 1 < len(batches):
                self._fetch(self._slots[1 - self._turn], batches[number + 1], wanted)
            yield batch
            self._slot.went = self._device.event_after(self._device.current_stream())
            self._turn = 1 - self._turn

    def _fetch(self, slot: _Slot, batch: list[ShardUnit], wanted: set[int]) -> None:
        slot.begin()
        homes = [flat for unit in batch for flat in unit.flats if flat.key in wanted]
        gradients = {flat.key: flat.gradient.values()[0] for flat in homes}
        self._device.event_after(self._device.current_stream()).wait(self._stream)
        with self._device.on(self._stream):
            for key, gradient in gradients.items():
                slot.gradients[key] = slot.like(gradient).copy_(gradient, non_blocking=True)
        slot.came = self._device.event_after(self._stream)

    def gradient(self, home: Home) -> torch.Tensor:
        """Its gradient, on the host; waits for it."""
        found = self._slot.gradients.get(home.key)
        if found is None:  # of no unit
            return home.gradient.values()[0].cpu()
        assert self._slot.came is not None
        self._slot.came.synchronize()
        return found

    def out(self, home: Home) -> torch.Tensor:
        """Where to put what ``home`` is to become."""
        if home.key not in self._slot.gradients:  # of no unit
            return torch.empty_like(home.shard, device="cpu")
        return self._slot.like(home.shard)
