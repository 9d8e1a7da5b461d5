"""For all tests: Ctrl-C means Ctrl-C."""

from __future__ import annotations

import signal

# A shell starts its background jobs with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
