"""The service: the HTTP API, the job store, and the storage of artifacts. Loads no torch."""
