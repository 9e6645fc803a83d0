"""Search one published index from many processes: its shards live while somebody uses them.

shared_shard   SharedShard: a shard that knows its users and stops without any; no Ray
shared_index   SharedIndex: attach to the shards of a published version, start those that lack
shard_files    change a published version shard by shard, in one process; no Ray

    index = SharedIndex.open("gallery/v=0003/index/1f0a", version=3)
    ids, scores = index.search(queries, 10, area=Area.circle(47.4, 8.5, 2000))
    index.close()
"""
