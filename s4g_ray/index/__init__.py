"""Find the k nearest vectors, in one process (sharded/: over Ray actors).

plan                choose kind and size of an index for N, D and a memory budget; no FAISS
faiss_library       import exactly one FAISS build, with fast BLAS kernels
top_k               Found, the type of an answer; select the k best scores (compiled)
exact_search        search exactly, by faiss or torch
approximate_search  IVF and HNSW indexes of FAISS
vector_index        VectorIndex: build, add, search, save, load
cost                estimate build and search time from measured rates
recall              measure recall@k against exact search; raise the search effort to reach it
sharded/            the same over Ray actors

    index = VectorIndex.build(vectors, ids, memory_gb=4)
    ids, scores = index.search(queries, k=10)
"""
