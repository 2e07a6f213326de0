"""Reads averages from files of other packages, without running anything in them, and writes them as this package's own.

`detection` detects the format; `torch_formats` and `folder_formats` have one function for each. `resolution` pairs
the averages with the tensors of a model, which `reference` describes.
"""
