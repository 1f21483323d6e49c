"""Random JSON Schemas whose answers are of bounded length, from a seed."""

import random
from typing import Any

Schema = dict[str, Any]
WORDS = ("name", "age", "größe", "a b", 'quo"te', "$ref", "id", "tags", "0", "naïve", "x\\y")
PATTERNS = ("^[a-z]{1,5}$", "^(yes|no)$", "^\\d{3}-\\d{2}$", "^[A-Z]\\w{0,4}$", "^ab{0,3}c$", "^a.{2,4}[^x]$")
FORMATS = ("date", "uuid", "ipv4", "time", "date-time")


def schema(seed: int) -> Schema:
    """A schema; each number gives another one."""
    rng = random.Random(seed)
    made = _any(rng, 3)
    if rng.random() < 0.3:
        made = {"$defs": {"part": _any(rng, 1)}, "type": "object", "properties": {"whole": made}}
        made |= {"required": ["part", "whole"], "additionalProperties": False}
        made["properties"]["part"] = {"$ref": "#/$defs/part"}
    return made


def _any(rng: random.Random, depth: int) -> Schema:
    leaves = (_string, _integer, _number, _fixed)
    makers = (_object, _object, _array, _choice, *leaves) if depth else leaves
    return rng.choice(makers)(rng, depth)


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(WORDS, rng.randint(0, 4))
    made: Schema = {"type": "object", "properties": {name: _any(rng, depth - 1) for name in names}}
    made["required"] = rng.sample(names, rng.randint(0, len(names)))
    made["additionalProperties"] = False
    if rng.random() < 0.2:
        made |= {"additionalProperties": _integer(rng, 0), "required": names, "maxProperties": len(names) + 2}
    return made


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(0, 2)
    made: Schema = {"type": "array", "minItems": least, "maxItems": least + rng.randint(0, 2)}
    if rng.random() < 0.3:
        made["prefixItems"] = [_any(rng, 0), _any(rng, 0)]
    return {**made, "items": _any(rng, depth - 1)}


def _choice(rng: random.Random, depth: int) -> Schema:
    if rng.random() < 0.3:
        one, other = _object(rng, 1), _object(rng, 1)
        shared = {"type": "object", "properties": one["properties"] | other["properties"], "required": one["required"]}
        return {"allOf": [shared | {"additionalProperties": False}, {"required": other["required"]}]}
    return {"anyOf": [_any(rng, depth - 1) for _ in range(rng.randint(1, 3))]}


def _string(rng: random.Random, depth: int) -> Schema:
    kind = rng.random()
    if kind < 0.3:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if kind < 0.5:
        return {"type": "string", "format": rng.choice(FORMATS)}
    least = rng.randint(0, 4)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 8)}


def _integer(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(-2000, 2000)
    made: Schema = {"type": "integer", "minimum": low, "maximum": low + rng.randint(20, 10**6)}
    if rng.random() < 0.3:
        made["multipleOf"] = rng.choice((2, 5, 7, 10))
    return made


def _number(rng: random.Random, depth: int) -> Schema:
    low = rng.uniform(-100, 100)
    return {"type": "number", "exclusiveMinimum": round(low, 2), "maximum": round(low + rng.uniform(1, 1000), 3)}


def _fixed(rng: random.Random, depth: int) -> Schema:
    values: list[Any] = [*WORDS, 1, -2.5, None, True, {"a": [1, {"b": None}]}, [], {}, 'a "b"\n', "日本語 🙂"]
    kind = rng.random()
    if kind < 0.4:
        return {"enum": rng.sample(values, rng.randint(1, 5))}
    return (
        {"const": rng.choice(values)} if kind < 0.7 else {"type": rng.choice(("null", "boolean", ["null", "boolean"]))}
    )
