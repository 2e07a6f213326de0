"""Weighted sums of the full weights in checkpoints and weight files, streamed one batch of tensors at a time.

In the order of the calls: `source.open_source` opens each checkpoint or file; `weighted_sum.WeightedSum` compares the
models, and reads and sums batches into memory from `buffer`; `write.write_weighted_sum` writes them in one of the
`output_formats`, reads them again, and gives the folder its name.
"""
