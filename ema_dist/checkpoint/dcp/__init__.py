"""Reads a folder that `torch.distributed.checkpoint` (DCP) wrote, without running anything in it.

The modules read the metadata and unpickle it, read the archive of each tensor, read entries, and index them. Code that
writes checkpoints belongs to `checkpoint`. May import the modules for errors, values and agreement of `checkpoint`.
"""
