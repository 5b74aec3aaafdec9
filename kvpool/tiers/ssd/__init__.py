"""SSD tier: a log of checksummed records in segment files. Here is the I/O; what is decided is in `kvpool.core.ssd`."""
