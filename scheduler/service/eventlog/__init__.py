"""The event log of several schedulers: what each hears from the life lines it has, said to the others.

One stream in Redis that all append to and all read. It carries no truth of its own: whatever is lost of it is found
missing within a second and said again. Redis is trusted: whoever writes to it can mislead the schedulers.
"""
