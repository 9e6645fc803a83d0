"""Find the k nearest vectors, in one process (sharded/, shared/: over Ray actors).

plan                choose kind, sizes and shards of an index from room and time; no FAISS
cost                expected times: counted work times rates; no FAISS
rates               measure the rates of this machine
recall              recall@k against exact search; raise the search effort to reach it
vector_index        VectorIndex: build, add, replace, remove, search, save, load
vector_checks       refuse vectors and ids that do not fit
row_table           RowTable: id and coordinates of each row
index_file          an index as the bytes of a file
stores/             the vectors by row: exact, in lists, in a graph, on a GPU
exact_search        search exactly, by faiss or torch
top_k               Found, the type of an answer; select the k best scores (compiled)
faiss_library       import exactly one FAISS build, with fast BLAS kernels
sharded/            the same over Ray actors
shared/             the shards of one published version, for all processes of a cluster

    index = VectorIndex.build(vectors, ids, coordinates=positions, memory_gb=4)
    ids, scores = index.search(queries, k=10, area=Area.circle(47.4, 8.5, 2000))
"""
