"""What Gradio keeps for visitors for as long as it runs, bounded from outside.

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
"""The sessions whose answers nobody reads now, each with its calls that have no answer yet."""


async def tidy(app: Any, reading: Container[str]) -> None:
    """Sweep every EVERY_S seconds, for ever."""
    unread: Unread = {}
    while True:
        await asyncio.sleep(EVERY_S)
        unread = await sweep(app, reading, unread)


async def sweep(app: Any, reading: Container[str], before: Unread) -> Unread:
    """Drop the answers and the waiting calls of sessions that nobody reads, now and `before`, and that have asked for
    nothing since: a page reads only while it waits, and begins to a moment after it has asked. Drop the oldest logins,
    too, and the names of files that are gone. Gives the sessions that nobody reads now."""
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
