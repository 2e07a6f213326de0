"""Reads a folder that `torch.distributed.checkpoint` (DCP) wrote, without running anything in it.

Here are the metadata and its unpickler, the archive of each tensor, the reader, and the index of a folder's entries.
Writing belongs to `checkpoint`. May import the modules for errors, values and agreement of `checkpoint`.
"""
