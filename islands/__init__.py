"""One shard in, one expert and one gate head out, in a place that nothing else reaches.

In: `islands/SHARD/island.json` (all that a job is told), `shards/SHARD`, `commons`, `base` and
`trunk` of the run. Out: `islands/SHARD/expert`, `gate_head`, metrics and training states. Open
`step.py` first: it is the whole algorithm. `train_denoiser.py` trains an expert, and for `base.py`
the common start on the commons, by the loop that trains the gate too (`train_trunk.py` on the
commons, `train_head.py` on a shard). Where islands run and who watches them: `supervise.py`, then
`queue.py`. One expert in several processes: `group.py` and `learner.py`, launched by `workers.py`.
"""
