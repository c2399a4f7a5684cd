"""Random walks: the smallest whole use of Proxima, and the yardstick trlX made known.

`graph` is the task, `reward` the plug-in a worker loads, `policy` the model that is fine-tuned,
`client` the way a program talks to Proxima over HTTP, and `demo` puts them together.
"""
