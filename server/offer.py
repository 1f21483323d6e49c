"""What this trunk offers: the model and layers that it serves, and the flags that a session may have."""

from dataclasses import replace

import grpc
import torch

from server import connections
from server.build import TrunkRuntime
from server.variants import Variants
from splitlearn.checkpoints.folder import read_config
from splitlearn.config import ServerConfig
from splitlearn.errors import InputError, TrunkRefused
from splitlearn.flags.here import here
from splitlearn.flags.selection import TEXTS, applied_of, chosen_in, why_not, why_not_chosen
from splitlearn.models.structure import no_prefixes
from splitlearn.runtime import hardware
from splitlearn.runtime.process import resident_bytes
from splitlearn.scheduling.room import free_bytes
from splitlearn.wire import ENVELOPE_BYTES, MAX_PADDING_BYTES, MAX_TENSOR_BYTES, PROTOCOL
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.status import status_of


class Offer:
    """Answers Describe, and checks what a session asks for. `part_bytes` is the largest tensor of one message.

    Raises InputError for a limit on messages that is too small for the hidden state of one token."""

    def __init__(self, runtime: TrunkRuntime, variants: Variants, limits: ServerConfig) -> None:
        self._runtime, self._variants, self._limits = runtime, variants, limits
        self.part_bytes = min(MAX_TENSOR_BYTES, limits.max_message_bytes - ENVELOPE_BYTES)
        row = runtime.files.facts.hidden_size * runtime.placement.dtype.itemsize
        if self.part_bytes < row:
            expected = f"at least {row + ENVELOPE_BYTES}, for the hidden state of one token"
            raise InputError("server.max_message_bytes", limits.max_message_bytes, expected)
        self._dtype = str(runtime.placement.dtype).removeprefix("torch.")
        model = read_config(runtime.files.folder)
        place = here(str(runtime.placement.device), self._dtype, model)
        self._place = replace(place, no_prefixes=no_prefixes(model))
        self._machine = {name: str(value) for name, value in hardware.describe().items() if value is not None}

    def describe(self, request: bytes, context: grpc.ServicerContext) -> pb.Description:
        """The answer to Describe."""
        asked = connections.parse(pb.DescribeRequest, request, context)
        if asked.answer_padding > MAX_PADDING_BYTES:
            error = InputError("answer_padding", asked.answer_padding, f"at most {MAX_PADDING_BYTES}")
            context.abort_with_status(status_of(error))
        runtime, plan = self._runtime, self._runtime.plan
        return pb.Description(
            protocol=PROTOCOL,
            model=runtime.files.name,
            digest=runtime.files.digest,
            start=plan.start,
            end=plan.end,
            n_layers=plan.n_layers,
            dtype=self._dtype,
            device=str(runtime.placement.device),
            hidden_size=runtime.files.facts.hidden_size,
            max_length=self._max_length() or 0,
            threads=runtime.threads,
            flags=[pb.FlagState(name=text, unavailable=self._why_not(text) or "") for text in TEXTS],
            machine=self._machine,
            padding=bytes(asked.answer_padding),
            costs=self._costs() if asked.costs else None,
        )

    def _costs(self) -> pb.Costs:
        runtime, times = self._runtime, self._runtime.metrics.step_times
        device = runtime.placement.device
        base = 0 if device.type == "cuda" else runtime.import_rss_bytes
        has = torch.cuda.memory_reserved(device) if device.type == "cuda" else resident_bytes()
        return pb.Costs(
            decode_s=times.decode_s,
            prefill_s=times.prefill_s,
            memory_bytes=free_bytes(device) + has,
            base_bytes=base,
            weight_bytes=runtime.weight_memory_bytes,
        )

    def flags(self, opening: pb.Open) -> frozenset[str]:
        """The flags that `opening` applies. Raises InputError or TrunkRefused for a session that cannot be served."""
        self._check_served(opening)
        limit = self._max_length()
        if opening.max_length < 1 or (limit is not None and opening.max_length > limit):
            raise InputError("max_length", opening.max_length, f"1 to {limit or 'any number of'} tokens")
        if not 0 <= opening.timeout_s < float("inf"):
            raise InputError("timeout_s", opening.timeout_s, "seconds, 0 or more")
        chosen = chosen_in(opening.flags)
        here = {text: why_not(text, "trunk", self._place) for text in TEXTS}
        for text in chosen.values():
            if reason := why_not_chosen(text, here):
                raise TrunkRefused(f"flag {text} is unavailable at this trunk: {reason}")
        return applied_of(chosen)

    def _check_served(self, opening: pb.Open) -> None:
        """Raise TrunkRefused, which lists every difference, if the client expects another trunk than this one.

        The digest tells models apart. A model's name may be a path, which is another one on each machine: it is said
        where the digests differ.
        """
        files, plan = self._runtime.files, self._runtime.plan
        named = [("model", opening.model, files.name)] if opening.digest != files.digest else []
        differing = [
            f"{what} is {ours}, not {theirs!r}"
            for what, theirs, ours in (
                ("protocol", opening.protocol, PROTOCOL),
                *named,
                ("digest", opening.digest, files.digest),
                ("layer range", (opening.start, opening.end, opening.n_layers), (plan.start, plan.end, plan.n_layers)),
                ("dtype", opening.dtype, self._dtype),
            )
            if theirs != ours
        ]
        if differing:
            raise TrunkRefused(f"this trunk serves something else: {'; '.join(differing)}")

    def _max_length(self) -> int | None:
        """The limit on a session's tokens, by the model and the settings. None if neither has a limit."""
        limits = (self._runtime.files.facts.context_length, self._limits.max_length)
        return min((limit for limit in limits if limit is not None), default=None)

    def _why_not(self, flag: str) -> str | None:
        """Why this flag is unavailable here, or None."""
        return why_not(flag, "trunk", self._place) or self._variants.why_not(flag.partition("=")[0])
