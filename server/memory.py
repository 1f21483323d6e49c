"""Reserves memory for variants: for each a copy of the weights and a KV pool, if they fit."""

import threading

import torch

from server.build import TrunkRuntime
from splitlearn.errors import TrunkFull
from splitlearn.runtime.process import peak_resident_bytes
from splitlearn.scheduling.room import free_bytes

KV_SHARE = 0.5
"""A new server's KV pool may take this share of the free memory, less its weights and all reservations."""
MIN_BLOCKS = 4
MIB = 1 << 20
CPU = torch.device("cpu")


class Memory:
    """Reserves memory for new servers: as much as this server took to load, plus a KV pool, plus kept prefixes."""

    def __init__(self, runtime: TrunkRuntime) -> None:
        self._device, self._pool = runtime.placement.device, runtime.admission.pool
        self._copy = {CPU: peak_resident_bytes()}
        if self._device.type == "cuda":
            self._copy[self._device] = torch.cuda.max_memory_reserved(self._device) - self._pool.nbytes
        self._store, self._tier = runtime.prefixes.store, "device" if self._device.type == "cuda" else "memory"
        self._prefix_bytes = sum(tier.max_bytes for tier in self._store.tiers if tier.name == self._tier)
        self._lock = threading.Lock()
        self._reserved: dict[object, int] = {}

    def take(self, server: object) -> int:
        """Reserve memory for a new `server`. Returns its bytes of KV memory. Raises TrunkFull if it does not fit."""
        device = self._device if self._device in self._copy else CPU
        with self._lock:
            needs = {**self._copy, device: self._copy[device] + self._prefix_bytes}
            left = {where: self._left(where) - needed for where, needed in needs.items()}
            kv_bytes = min(self._pool.nbytes, int(KV_SHARE * left[device]))
            short = [where for where in left if left[where] < 0]
            if short or kv_bytes < MIN_BLOCKS * self._pool.nbytes // self._pool.n_blocks:
                where = short[0] if short else device
                needed, free = needs[where] // MIB, max(0, self._left(where)) // MIB
                message = f"no memory for a server with these flags: it takes {needed} MiB, and {free} MiB are free"
                raise TrunkFull(f"{message} ({where.type})", cause="variants_full")
            self._reserved[server] = needs[device] + kv_bytes
        return kv_bytes

    def loaded(self, server: object) -> None:
        """Count the server's weights as used memory from now on, not as reserved."""
        with self._lock:
            self._reserved[server] -= self._copy[self._device if self._device in self._copy else CPU]

    def give_back(self, server: object) -> None:
        """Release the reservation of a server that has ended. Does nothing for an unknown one."""
        with self._lock:
            self._reserved.pop(server, None)

    def _left(self, where: torch.device) -> int:
        """Free bytes of a device, less all reservations. Unused KV blocks, and room for kept prefixes, count as taken:
        the system counts them as free until they are first written."""
        if where.type != self._device.type:
            return free_bytes(where)
        unused = self._pool.nbytes * (self._pool.n_blocks - self._pool.blocks_used) // self._pool.n_blocks
        unused += self._store.unused_bytes(self._tier)
        return free_bytes(where) - unused - sum(self._reserved.values())
