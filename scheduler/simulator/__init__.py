"""The production scheduler core under virtual time, against a ground truth that it can only learn about by events."""
