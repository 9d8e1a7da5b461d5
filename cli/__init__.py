"""The `atoll` command: arguments in, the packages' functions called, a result or an error out.

Open `main.py` first: it lists the commands. What a command does that spans packages lives beside it
(`demo.py`, `unlearn.py`, `verify.py`). Heavy imports happen inside commands.
"""
