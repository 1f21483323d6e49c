"""API keys: who may ask, and how much. They are the tokens of a file, with the limits that a trunk's tokens have.

A key over its rate is throttled between its requests: the next one waits until what the earlier ones used is paid for.
A run itself is not slowed, since others share it or wait for its end.
"""

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.datastructures import Headers

from splitlearn.access.quota import Account, Accounts, Quota
from splitlearn.arms.report import ArmReport
from splitlearn.errors import TrunkDenied, TrunkFull
from splitlearn.events import Message, Prompt, TokenEvent
from splitlearn.openai_api.answers import Found
from splitlearn.openai_api.failures import RETRY_S, ApiError
from splitlearn.wire import TOKEN_HEADER

MOST_WAIT_S = 60.0
CHARACTERS = 4
"""Characters of a token, about: for a prompt whose client left before it was counted."""


def account(accounts: Accounts, headers: Headers) -> Account | None:
    """The account of the key in `headers`; None if the server has no keys. Raises ApiError without a valid key."""
    try:
        return accounts.of(headers.getlist(TOKEN_HEADER))
    except TrunkDenied as error:
        said = "Authorization: expected a valid API key, as Bearer KEY."
        raise ApiError(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}) from error


def session(owner: Account | None) -> Quota:
    """The quota of a request, which counts as a session of its key until its `end`. Raises ApiError if all are open."""
    if owner is None:
        return Quota()
    try:
        owner.enter()
    except TrunkFull as error:
        raise ApiError(429, str(error), code=error.cause, headers={"Retry-After": str(RETRY_S)}) from error
    return Quota(f"token {owner.token.name}", owner)


async def metered(found: AsyncGenerator[Found, None], quota: Quota, prompt: Prompt) -> AsyncGenerator[Found, None]:
    """The items of a run, once the key's earlier requests are paid for. Charges the tokens of prompt and answer.

    Raises ApiError where that would take more than MOST_WAIT_S.
    """
    await asyncio.sleep(_debt_s(quota))
    unpaid = _about(prompt)
    try:
        async with aclosing(found):
            async for item in found:
                if isinstance(item, TokenEvent):
                    quota.charge(len(item.token_ids))
                elif isinstance(item, ArmReport):
                    unpaid = item.metrics.prompt_tokens
                yield item
    finally:
        quota.charge(unpaid)


def _debt_s(quota: Quota) -> float:
    debt_s = quota.debt_s()
    if debt_s > MOST_WAIT_S:
        said = f"This key has used its tokens per second for the next {debt_s:.0f} s; try again later."
        raise ApiError(429, said, code="token_rate", headers={"Retry-After": str(math.ceil(debt_s))})
    return debt_s


def _about(prompt: Prompt) -> int:
    """Tokens of the prompt, estimated for a text."""
    texts = [prompt] if isinstance(prompt, str) else [each.content for each in prompt if isinstance(each, Message)]
    return sum(map(len, texts)) // CHARACTERS if texts else len(prompt)
