"""Communication between ranks: the rendezvous before a collective call, and the collectives over replicas.

A rendezvous compares what ranks report, the history of their calls included.

`Shard` says which ranks hold a tensor. May import `sharding`, `kernels` and `messages`.
"""
