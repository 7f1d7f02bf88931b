"""Many checkpoints into a registry, on one machine or many, stopped and taken up again at any moment.

`items` says what there is to do, `work` does one checkpoint, `local` and `ray_cluster` say where, `run` sees to the
rest: what is kept already, what is the same weights under another name, what failed, and what is left.
"""
