"""The HTTP edge: one thin file per resource, and what all of them share.

An endpoint reads a request, calls one use case, and writes an answer; what is done, it does not know.
"""
