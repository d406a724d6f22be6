"""From a queued job to its outputs on the Activity: one module a step, in the order in which a job meets them.

`worker` claims and moves; `stage`, `launch`, `watch`, `collect` and `report` do the work.
"""
