"""Averages in the files of other packages, read without running anything in them, and written as this package's own.

`detection` tells the formats apart; `torch_formats` and `folder_formats` have one function for each. `resolution` pairs
the averages with the tensors of a model, which `reference` describes.
"""
