"""From a corpus to shards: records are read, embedded, clustered and written with their digests.

In: a corpus (Parquet or an image folder, by any fsspec URI) and an empty RUN. Out, in RUN: the
encoder, the commons, one folder per shard, `partition/` with assignments, centroids and a report,
and the manifest, written last. `forget` takes a shard out of all of these again, bitwise.
Open `pipeline.py` first.
"""
