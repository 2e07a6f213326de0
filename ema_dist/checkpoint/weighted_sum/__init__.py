"""Weighted sums of the full weights in checkpoints and weight files, streamed one batch of tensors at a time.

In the order of the calls: `source.open_source` opens each checkpoint or file. `weighted_sum.WeightedSum` compares the
models, reads batches of tensors into a `buffer` and sums them. `write.write_weighted_sum` writes the sums in one of the
`output_formats`, reads them back to verify them, and gives the folder its final name.
"""
