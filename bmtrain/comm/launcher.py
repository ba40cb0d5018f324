"""What a job remembers from one attempt to the next: in the store of the launcher that starts its ranks again."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore

from .rendezvous import signed

_TIMEOUT = timedelta(seconds=10)


@dataclass
class Launcher:
    """torchrun's agent, which outlives the ranks; ``address`` is None where there is none, and nothing is remembered.

    Texts are signed with the job's ``token``, as whoever reaches the store can write to it.
    """

    address: tuple[str, int] | None = None
    job: str = ""
    token: str = ""
    _store: Store | None = field(default=None, init=False)

    @staticmethod
    def of(env: Mapping[str, str], token: str) -> Launcher:
        """The one that has set ``env``."""
        port = env.get("MASTER_PORT", "")
        if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not port.isdecimal() or not env.get("MASTER_ADDR"):
            return Launcher()
        return Launcher((env["MASTER_ADDR"], int(port)), env.get("TORCHELASTIC_RUN_ID", ""), token)

    def remember(self, what: str, text: str) -> None:
        """For the attempts after this one.  Raises RuntimeError where the launcher does not answer."""
        store = self._connected()
        if store is not None:
            store.set(self._key(what), f"{signed(self.token, f'{what} {text}')} {text}")

    def recall(self, what: str) -> str | None:
        """What was remembered last.  Raises RuntimeError where the launcher does not answer."""
        store = self._connected()
        if store is None or not store.check([self._key(what)]):
            return None
        signature, _, text = store.get(self._key(what)).decode(errors="replace").partition(" ")
        return text if hmac.compare_digest(signature.encode(), signed(self.token, f"{what} {text}").encode()) else None

    def _key(self, what: str) -> str:
        return f"bmtrain/{self.job}/{what}"

    def _connected(self) -> Store | None:
        if self._store is None and self.address is not None:
            self._store = TCPStore(*self.address, is_master=False, wait_for_workers=False, timeout=_TIMEOUT)
        return self._store
