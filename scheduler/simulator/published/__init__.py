"""Experiments of published papers, as the simulator can run them. Pure."""
