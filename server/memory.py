"""Whether there is memory for one more server like this one, and how much of it its KV pool may take."""

import threading

import torch

from server.build import TrunkRuntime, free_bytes
from splitlearn.errors import TrunkFull
from splitlearn.runtime.process import peak_resident_bytes

KV_SHARE = 0.5
"""Of what is left after the new server's copy of the weights and all KV memory already promised."""
LEAST_BLOCKS = 4
MIB = 1 << 20
CPU = torch.device("cpu")


class Memory:
    """Promises memory to new servers: as much as this one took to load, and a KV pool."""

    def __init__(self, runtime: TrunkRuntime) -> None:
        self._device, self._pool = runtime.placement.device, runtime.admission.pool
        self._copy = {CPU: peak_resident_bytes()}
        if self._device.type == "cuda":
            self._copy[self._device] = torch.cuda.max_memory_reserved(self._device) - self._pool.nbytes
        self._lock = threading.Lock()
        self._promised: dict[object, int] = {}

    def take(self, server: object) -> int:
        """The bytes of KV memory that a new `server` may have. Raises TrunkFull where it does not fit."""
        device = self._device if self._device in self._copy else CPU
        with self._lock:
            left = {where: self._left(where) - copy for where, copy in self._copy.items()}
            kv_bytes = min(self._pool.nbytes, int(KV_SHARE * left[device]))
            short = [where for where in left if left[where] < 0]
            if short or kv_bytes < LEAST_BLOCKS * self._pool.nbytes // self._pool.n_blocks:
                where = short[0] if short else device
                needed, free = self._copy[where] // MIB, max(0, self._left(where)) // MIB
                said = f"no memory for a server with these flags: it takes {needed} MiB, and {free} MiB are free"
                raise TrunkFull(f"{said} ({where.type})", cause="variants_full")
            self._promised[server] = self._copy[device] + kv_bytes
        return kv_bytes

    def loaded(self, server: object) -> None:
        """The server's weights are in memory now, so they count as used and not as promised."""
        with self._lock:
            self._promised[server] -= self._copy[self._device if self._device in self._copy else CPU]

    def give_back(self, server: object) -> None:
        """The server has ended. Does nothing for an unknown one."""
        with self._lock:
            self._promised.pop(server, None)

    def _left(self, where: torch.device) -> int:
        """Free bytes there that are not promised. KV memory that is reserved takes nothing until it is used."""
        if where.type != self._device.type:
            return free_bytes(where)
        unused = self._pool.nbytes * (self._pool.n_blocks - self._pool.blocks_used) // self._pool.n_blocks
        return free_bytes(where) - unused - sum(self._promised.values())
