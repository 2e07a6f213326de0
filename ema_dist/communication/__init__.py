"""Communication between ranks: the rendezvous before a collective call, and the collectives over replicas.

A rendezvous compares what ranks report, including the history of their calls.

`Shard` knows which ranks hold a tensor. May import `sharding`, `kernels` and `messages`.
"""
