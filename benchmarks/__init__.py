"""Side-by-side measurements: the engine against TRL 1.12, and the service against a client's clock."""
