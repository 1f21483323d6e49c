"""Atomic access from compiled code to fields of a numpy record that several threads share. The fields are int64, at
offsets that are multiples of 8 bytes.

    before = atomic_add(record, "left", -1)
"""

from typing import Any

import numba
from llvmlite import ir
from numba.extending import intrinsic

NUMBER = numba.types.int64


def field_pointer(builder: Any, record: Any, kind: Any, name: str) -> Any:
    """The address of a field."""
    start = builder.bitcast(record, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(start, [ir.IntType(64)(kind.offset(name))]), ir.IntType(64).as_pointer())


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def atomic_load(typing: Any, team: Any, name: Any) -> Any:
    """Load a field, with acquire order: earlier writes of the thread that stored it are then visible."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.load_atomic(field_pointer(builder, given[0], team, name.literal_value), "acquire", 8)

    return NUMBER(team, name), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def atomic_store(typing: Any, team: Any, name: Any, value: Any) -> Any:
    """Store a field, with release order: a thread that loads the value also sees all earlier writes."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        builder.store_atomic(given[2], field_pointer(builder, given[0], team, name.literal_value), "release", 8)
        return context.get_dummy_value()

    return numba.types.void(team, name, NUMBER), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def atomic_add(typing: Any, team: Any, name: Any, by: Any) -> Any:
    """Add to a field, and return its value before."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.atomic_rmw(
            "add", field_pointer(builder, given[0], team, name.literal_value), given[2], "acq_rel"
        )

    return NUMBER(team, name, NUMBER), generate
