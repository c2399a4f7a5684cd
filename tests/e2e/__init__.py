"""The whole way of a job: the embedded stack as its own processes, spoken to over HTTP only."""
