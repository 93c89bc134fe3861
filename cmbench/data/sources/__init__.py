"""Where datasets come from: folders, zip and tar archives, LMDB, and batch files of arrays.

``open_source`` looks at a path and returns what reads it. Imports no torch.
"""
