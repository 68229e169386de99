"""One script per library. Each trains on the task it is given and prints one JSON line.

A script imports only the library that it measures, what that library itself needs (torch, numpy,
datasets, transformers) and `common`, so that it runs in that library's own environment.
"""
