"""What a process's collector still does, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc, weakref
from atoll.core.collector import look_rarely

class Ring: pass

def full(): return gc.get_stats()[2]["collections"]
def kept(count): return [[n] for n in range(count)]

look_rarely()
before = full()
ring = Ring()
ring.itself, seen = ring, weakref.ref(ring)
del ring
young = kept(10_000)
print("young cycles are collected", seen() is None)
grown = kept(2_000_000)
print("looked at everything", full() - before, "times")
"""


def test_young_cycles_are_collected_as_ever_and_all_is_looked_at_rarely() -> None:
    def said(script: str) -> list[str]:
        ended = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        return ended.stdout.splitlines()

    quiet = said(SCRIPT)
    assert quiet == ["young cycles are collected True", "looked at everything 0 times"]
    usual = said(SCRIPT.replace("look_rarely()\n", "", 1))
    assert usual[1] != quiet[1]
