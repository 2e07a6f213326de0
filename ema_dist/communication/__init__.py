"""What ranks do together: they meet before a collective call, and compare and fill replicas.

Which ranks hold which tensor is read from the shards of `sharding`. May import `sharding`, `kernels` and `messages`.
"""
