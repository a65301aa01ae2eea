"""Inside a worker: the loop, and what it saves, measures and watches."""
