"""What a run is worth: metrics with intervals, shares of shards, and the one report.

In: pictures from any system (a callable), the run's held-out records, the run's encoder.
Out: `RUN/evaluation/metrics.json` and `RUN/evaluation/report.html`.
Open `evaluation.py` first for what is measured and how, `views.py` for what the report can show.
"""
