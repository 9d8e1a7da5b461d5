"""What every part agrees on: formats on disk, the one flow convention, models, randomness, errors.

Imports nothing else of Atoll. In: nothing; out: the types that the other packages meet through.
Open `flow.py` first for the mathematics and `manifest.py` for what a run is on disk.
"""
