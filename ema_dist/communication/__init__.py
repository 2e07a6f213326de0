"""Communication between ranks: the rendezvous before a collective call, and the collectives over replicas.

The ranks that hold a tensor are read from the shards of `sharding`. May import `sharding`, `kernels` and `messages`.
"""
