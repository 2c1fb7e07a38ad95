"""Many devices and many processes: the mesh and its sharding rules, and what the partitioner cannot do by itself."""
