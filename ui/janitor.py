"""Bound what Gradio would keep for visitors as long as it runs.

Private parts of Gradio's queue and application are used here and in ui/guard/security.py, and nowhere else.
"""

import asyncio
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from splitlearn.runtime import private_apis

EVERY_S = 15.0
MOST_LOGINS = 256
Unread = Mapping[str, frozenset[str]]
"""Sessions whose answers nobody reads now, each with its unanswered calls."""


async def tidy(app: Any, reading: Container[str]) -> None:
    """Sweep every EVERY_S seconds, forever."""
    unread: Unread = {}
    while True:
        await asyncio.sleep(EVERY_S)
        unread = await sweep(app, reading, unread)


async def sweep(app: Any, reading: Container[str], before: Unread) -> Unread:
    """Drop answers and waiting calls of sessions that nobody reads, the oldest logins, and names of removed files.

    A session is dropped if it was unread in `before`, too, and made no new calls since: a page reads only while it
    waits, and starts a moment after its call. Returns the sessions that are unread now.
    """
    queue = private_apis.page_queue(app.get_blocks())
    unread = {
        session: frozenset(queue.pending_event_ids_session.get(session, ()))
        for session in queue.pending_messages_per_session
        if session not in reading
    }
    gone = [session for session, calls in unread.items() if session in before and calls <= before[session]]
    for session in gone:
        queue.pending_messages_per_session.pop(session, None)
        await queue.clean_events(session_hash=session)
        queue.pending_event_ids_session.pop(session, None)
    for token in list(app.tokens)[:-MOST_LOGINS]:
        del app.tokens[token]
    for files in app.get_blocks().temp_file_sets:
        files.difference_update([file for file in files if not Path(file).exists()])
    return {session: calls for session, calls in unread.items() if session not in gone}
