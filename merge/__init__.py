"""Soups: exact integer-weighted means of experts, made, extended, reduced and checked.

In: expert folders (`config.json`, safetensors weights, `atoll.json`) that share one base.
Out: a soup folder, itself an ordinary expert on disk, with its recipe in `soup.json`, here or on a
store (`home.py`).
Open first: `soup.py` (create, add, remove on one page), `averages.py` and `stream.py` (how files go
through it), then `exact.py` (why every bit is right). What is averaged is found by `ingredients.py`
and `model.py`; `stock.py`, `moves.py`, `lora.py`, `bake.py` and `state.py` are one method
each.
"""
