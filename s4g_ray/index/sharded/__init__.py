"""Search an index that is divided among Ray actors.

sharding     divide rows among shards, check ids and vectors, merge answers; no Ray
shard        IndexShard: the versions that one actor serves
shard_group  ShardGroup: start the actors, call all of them
client       IndexClient: search from any process of the cluster
build        VersionBuild: count, train, stage, measure and publish one version
service      IndexService: start the shards, build versions, search them

    with IndexService(config.mining, "run/index") as service:
        service.build(4, "run/embeddings/v=0004", k=128)
        ids, scores = service.search(4, queries, 128)
"""
