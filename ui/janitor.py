"""What Gradio keeps for visitors for as long as it runs, bounded from outside.

Private parts of Gradio's queue and application are used here and in ui/guard/security.py, and nowhere else.
"""

import asyncio
from collections.abc import Container
from pathlib import Path
from typing import Any

from splitlearn.runtime import private_apis

EVERY_S = 15.0
MOST_LOGINS = 256


async def tidy(app: Any, reading: Container[str]) -> None:
    """Sweep every EVERY_S seconds, for ever."""
    unread: set[str] = set()
    while True:
        await asyncio.sleep(EVERY_S)
        unread = await sweep(app, reading, unread)


async def sweep(app: Any, reading: Container[str], before: set[str]) -> set[str]:
    """Drop the answers and the waiting calls of sessions that nobody reads, now and `before`; the oldest logins; the
    names of files that are gone. Gives the sessions that nobody reads now."""
    queue = private_apis.page_queue(app.get_blocks())
    unread = {session for session in queue.pending_messages_per_session if session not in reading}
    for session in unread & before:
        queue.pending_messages_per_session.pop(session, None)
        await queue.clean_events(session_hash=session)
        queue.pending_event_ids_session.pop(session, None)
    for token in list(app.tokens)[:-MOST_LOGINS]:
        del app.tokens[token]
    for files in app.get_blocks().temp_file_sets:
        files.difference_update([file for file in files if not Path(file).exists()])
    return unread - before
