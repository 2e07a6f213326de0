"""Reads a folder that `torch.distributed.checkpoint` (DCP) wrote, without running anything in it.

The metadata and its unpickler, the archive of each tensor, the reader, and the index of what the folder holds. Writing
belongs to `checkpoint`. May import the modules for errors, values and agreement of `checkpoint`.
"""
