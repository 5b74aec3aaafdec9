"""Should a cluster split prefill from decode, and with what: answered from a trace and from what machines can do."""
