"""The only SQL of Proxima: what is kept of jobs, their events and artifacts, files, and keys."""
