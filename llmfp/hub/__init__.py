"""The Hugging Face Hub and other web servers: checkpoints that are read where they lie, by range.

    SOURCE ─ source ─► HubId or WeightUrl ─ repository ─► Checkpoint of RemoteFiles ─ reader.http_reader ─► engine

Whatever a server says is taken for hostile: sizes are bounded before they are allocated, names checked before they are
used, redirects followed to https alone, and every byte of a weight arrives under the same ETag, from the position and
of the number asked for, or not at all. Nothing is written to disk.
"""
