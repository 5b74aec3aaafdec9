"""What a connector needs of the node that its engine is attached to, whichever engine that is.

Settings, the line to the node, memory as planes, and what tells one model's weights from another's. Nothing here knows
an engine; each connector adds what is its engine's.
"""
