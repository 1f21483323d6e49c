"""Reuses what earlier generations have computed: the leading blocks of a prompt that the process still has.

A block's key is the HMAC-SHA256 of its token ids and of all before them, under a secret of this process. A trunk gets
such keys and never token ids, so it cannot try out which text has a given key.
"""

import hmac
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from splitlearn.generation.chain import Chain
from splitlearn.generation.sequence import Sequence as Ids
from splitlearn.kvcache.prefix_store import BLOCK_TOKENS, Block, PrefixStore
from splitlearn.stages.base import KeepsPrefixes
from splitlearn.wire import PREFIX_KEY_BYTES


def chain_keys(secret: bytes, context: bytes, ids: Sequence[int]) -> list[bytes]:
    """The key of each full block of `ids`. Equal keys mean the same `context`, block and blocks before it."""
    link, keys = hmac.digest(secret, context, "sha256"), []
    for at in range(BLOCK_TOKENS, len(ids) + 1, BLOCK_TOKENS):
        link = hmac.digest(secret, link + array("I", ids[at - BLOCK_TOKENS : at]).tobytes(), "sha256")
        keys.append(link[:PREFIX_KEY_BYTES])
    return keys


@dataclass(frozen=True)
class PrefixCache:
    """The kept prefixes of one arm. `context` names all that the kept values depend on besides the token ids: weights,
    layers, dtype, device and flags."""

    store: PrefixStore
    secret: bytes
    context: bytes

    def find(self, ids: Sequence[int]) -> "Prefix":
        """What is here of a prompt. Its last token is always computed: its logits are needed."""
        keys = chain_keys(self.secret, self.context, ids[:-1])
        blocks = self.store.find(keys)
        return Prefix(self, keys[: len(blocks)], blocks)

    def keep(self, chain: Chain, ids: Sequence[int]) -> None:
        """Keep what the sessions of `chain` have computed: the full blocks of `ids`."""
        keys = chain_keys(self.secret, self.context, ids)
        first = self.store.first_missing(keys)
        parts = [each.keep_blocks(keys, first) for each in _sessions(chain)]
        self.store.put(keys, first, list(zip(*parts, strict=True)))


@dataclass(frozen=True)
class Prefix:
    """The leading blocks of one prompt that are kept, and their keys."""

    cache: PrefixCache
    keys: Sequence[bytes]
    blocks: Sequence[Block]

    @contextmanager
    def reused(self, chain: Chain, sequence: Ids, keep: bool) -> Iterator[None]:
        """Inside, `chain` goes on behind the kept blocks. At the end, also of a cancelled answer, what it has computed
        of `sequence` is kept if `keep` is true."""
        self._begin(chain, sequence)
        ended: type[BaseException] | None = None
        try:
            yield
        except BaseException as error:
            ended = type(error)
            raise
        finally:
            if keep and ended in (None, GeneratorExit):
                self.cache.keep(chain, sequence.ids[: sequence.computed])

    def _begin(self, chain: Chain, sequence: Ids) -> None:
        count = min([len(self.blocks), *(each.most_blocks for each in _sessions(chain))])
        for number, session in enumerate(_sessions(chain) if count else ()):
            session.write_blocks([block[number] for block in self.blocks[:count]])
        sequence.computed = count * BLOCK_TOKENS
        if chain.defended is not None:
            chain.defended.feed(0, sequence.ids[: sequence.computed])


def _sessions(chain: Chain) -> Sequence[KeepsPrefixes]:
    return cast(Sequence[KeepsPrefixes], chain.sessions)
