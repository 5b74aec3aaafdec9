"""Journals run again: exactly, or with another policy or configuration. Reads files; asks no cluster and no clock."""
