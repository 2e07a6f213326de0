"""Full weights in files that others read: safetensors and torch files in the Hugging Face layout, and casts.

Which tensors are written, and how they get to one rank, belongs to `checkpoint.gathering` and the command line. May
import `checkpoint.dcp` and the modules for errors, folders and values of `checkpoint`.
"""
