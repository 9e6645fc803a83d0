"""Search an index that is divided among Ray actors.

sharding     deal rows to shards, check ids and vectors; no Ray
merging      merge the shards' answers, search again where results are missing; no Ray
versions     load a shard's part of a published version; no Ray
requests     arguments and results of a shard's methods; no Ray
shard        IndexShard: the version that one actor serves
shard_group  ShardGroup: start the actors, call all of them
client       IndexClient: search from any process of the cluster
planning     kind and number of shards from what Ray has free
report       IndexReport: how a version was built
build        VersionBuild: count, train, stage, measure and publish one version
update       VersionUpdate: publish a version with vectors added, replaced or removed
service      IndexService: plan and start the shards, build versions, search them

    with IndexService(config.mining, "run/index", num_vectors=10**7, dim=1024) as service:
        service.build(4, "run/embeddings/v=0004", k=128)
        ids, scores = service.search(4, queries, 128)
"""
