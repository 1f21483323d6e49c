"""Kept prefixes of the trunk: what sessions have computed, for later sessions of the same holder.

Clients send keys of blocks, never token ids (splitlearn/generation/prefix_cache.py). A block is stored under a hash of
its key, its holder and all else that its values depend on, so no holder finds what another one's sessions have left:
neither by an answer's time nor by counters.
"""

import hashlib

from splitlearn.errors import InputError
from splitlearn.kvcache.prefix_store import BLOCK_TOKENS, PrefixStore
from splitlearn.scheduling.engine import Engine
from splitlearn.scheduling.sessions import EngineSession
from splitlearn.wire import MAX_PREFIX_KEYS, PREFIX_KEY_BYTES


class TrunkPrefixes:
    """The prefixes in `store`. `context` names the weights, layers, dtype and device that they were computed with."""

    def __init__(self, engine: Engine, store: PrefixStore, context: bytes) -> None:
        self.store = store
        self._engine, self._context = engine, context

    def begin(self, session: EngineSession, holder: str, keys: bytes) -> int:
        """Let a new session begin with what is kept of the blocks with `keys`. Returns its number of tokens. Raises
        InputError for keys that no client would send."""
        names = self._names(session, holder, keys)
        if len(names) * BLOCK_TOKENS >= session.max_length:
            limit = f"keys of fewer tokens than {session.max_length}, the session's max_length"
            raise InputError("prefix_keys", f"keys of {len(names) * BLOCK_TOKENS} tokens", limit)
        blocks = self.store.find(names) if names else []
        if blocks:
            self._engine.begin_with(session, [part for (part,) in blocks])
        return session.computed

    def keep(self, session: EngineSession, holder: str, keys: bytes) -> None:
        """Keep what `session` has computed of its first blocks. Raises InputError for keys of more than that."""
        names = self._names(session, holder, keys)
        if len(names) * BLOCK_TOKENS > session.computed:
            limit = f"keys of at most {session.computed} tokens, which the session has computed"
            raise InputError("prefix_keys", f"keys of {len(names) * BLOCK_TOKENS} tokens", limit)
        first = self.store.first_missing(names)
        self.store.put(names, first, [(part,) for part in self._engine.blocks_of(session, names, first)])

    def _names(self, session: EngineSession, holder: str, keys: bytes) -> list[bytes]:
        """The names in the store of the blocks with `keys`."""
        if len(keys) % PREFIX_KEY_BYTES or len(keys) > MAX_PREFIX_KEYS * PREFIX_KEY_BYTES:
            limit = f"whole keys of {PREFIX_KEY_BYTES} bytes, at most {MAX_PREFIX_KEYS}"
            raise InputError("prefix_keys", f"{len(keys)} bytes", limit)
        if keys and not session.local.settings.reuses_prefixes:
            raise InputError("prefix_keys", f"{len(keys)} bytes", "none without the flags prefix_cache and use_cache")
        salt = repr((self._context, holder, sorted(session.flags))).encode()
        starts = range(0, len(keys), PREFIX_KEY_BYTES)
        return [hashlib.sha256(salt + keys[at : at + PREFIX_KEY_BYTES]).digest() for at in starts]
