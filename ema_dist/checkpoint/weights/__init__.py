"""Full weights in files that other libraries read: safetensors and torch files in the Hugging Face layout, and casts.

Code that selects the tensors and sends them to one rank belongs to `checkpoint.gathering` and the command line. May
import `checkpoint.dcp` and the modules for errors, step folders and values of `checkpoint`.
"""
