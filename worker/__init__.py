"""Takes jobs off the queue, runs the engine on them, and relays what it says.

No torch here, and no HTTP: a worker speaks to the database, the broker, the storage, and its engine.
"""
