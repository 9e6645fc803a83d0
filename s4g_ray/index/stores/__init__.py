"""Hold the vectors of an index and search them by row number; VectorIndex adds ids.

store         Store, what all have in common; Scope, the rows that a search may find
dense         DenseStore: all vectors, searched exactly (flat, sqfp16)
ivf           IvfStore: codes in k-means lists of which a query visits some (ivf_sq8, ivf_rabitq)
ivf_training  train the lists
hnsw          HnswStore: vectors in a graph
gpu           GpuDevice; GpuCopy, a copy of a store on a GPU that finds any number of results
"""
