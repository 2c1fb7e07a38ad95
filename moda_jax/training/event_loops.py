"""asyncio loops that end what they began before they close.

Orbax writes a checkpoint in loops of its own. When one write fails, on a full disk say, it closes the loop at once,
while other writes are under way: they go on into a directory that is being removed, and each then reports to a loop
that is gone, which prints a traceback of its own ("Event loop is closed") long after the failure was told.
"""

from __future__ import annotations

import asyncio


class DrainingEventLoop(asyncio.SelectorEventLoop):
    """A loop whose `close` waits for its tasks; what becomes of them was told to whoever awaited them."""

    def close(self) -> None:
        """Waits for every task, failed ones included, then closes."""
        if not self.is_closed() and not self.is_running():
            tasks = asyncio.all_tasks(self)
            if tasks:
                self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()


class DrainingPolicy(asyncio.DefaultEventLoopPolicy):
    """Python's own policy, with loops that drain."""

    _loop_factory = DrainingEventLoop


def install() -> None:
    """Lets loops that are made from now on drain, unless the program has chosen another policy."""
    if type(asyncio.get_event_loop_policy()) is asyncio.DefaultEventLoopPolicy:
        asyncio.set_event_loop_policy(DrainingPolicy())
