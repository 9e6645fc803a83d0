"""The same over Ray actors.

sharding     rows of each shard, id checks, merging answers (pure)
shard        IndexShard: the versions that one actor serves
shard_group  the actors, asked together
client       IndexClient: search from any process of the cluster
build        build one version: count, train, stage, measure, publish
service      IndexService: start shards, build and report versions
"""
