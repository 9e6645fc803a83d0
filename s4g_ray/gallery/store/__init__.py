"""The files of a gallery: versions that are published whole.

header           GalleryHeader: gallery.json, which names the current version
tiles            Tiles and TileTable: the rows of a version
versions         publish, open and prune versions
source_tiles     the rows of a data set that become tiles
images           copy new and changed images into tar shards of the gallery
embedding        embed those images, here or on the actors of a cluster
index_facts      IndexFacts: kind and size of the index, and where it is held
index_writer     write the index of a version: of one process, or in shards
cluster          the Ray session of galleries in shards
vectors          the index of one process, and embeddings by id
"""
