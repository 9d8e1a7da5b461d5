"""How often Python's garbage collector looks through all that a process has made."""

from __future__ import annotations

import gc


def look_rarely() -> None:
    """Let the collector of this process look at everything a hundred times less often.

    What torch and diffusers make while they are imported, 460,000 objects, stays to the end and is
    looked through again and again meanwhile, a fifth of what their import takes. What is young is
    collected as ever.
    """
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, 1000)
