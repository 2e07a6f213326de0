"""Communication between ranks: the rendezvous before a collective call, and the collectives over replicas.

`Shard` says which ranks hold a tensor. May import `sharding`, `kernels` and `messages`.
"""
