"""Full weights in files that others read: safetensors and torch files in the Hugging Face layout, and casts.

Selecting the tensors, and sending them to one rank, belongs to `checkpoint.gathering` and the command line. May import
`checkpoint.dcp` and the modules for errors, step folders and values of `checkpoint`.
"""
