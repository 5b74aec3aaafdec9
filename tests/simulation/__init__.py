"""The whole pool in one thread under simulated time; see `world`. `python -m tests.simulation --seed N` repeats one."""
