"""Ground floor: object store, corpus readers, filters, Arrow shards, sample order, loader. Imports no other floor."""
