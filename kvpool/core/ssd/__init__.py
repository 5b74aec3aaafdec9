"""The SSD tier's decisions: record format, index of the log, space, what to reclaim. Pure: no files, clock or threads.

The log is a row of segment files of one size, written from front to back and never rewritten in place. What the shell
does with these decisions is in `kvpool.tiers.ssd`.
"""
