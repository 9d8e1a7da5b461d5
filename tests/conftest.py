"""For all tests: Ctrl-C means Ctrl-C, and nothing fails because a machine is slow."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

# A shell starts its background jobs with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# By itself an example fails that takes more than 200 ms, as one does while others have the cores.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
