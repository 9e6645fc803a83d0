"""The k nearest vectors, in one process.

plan                kind and size of an index for N, D and a memory budget (pure)
cost                build and search time, extrapolated from measured rates
recall              recall@k against exact search; how far effort is raised
faiss_library       import exactly one FAISS build, on its fast BLAS path
exact_search        exact inner-product search by faiss or torch
top_k               compiled selection of the k best scores
approximate_search  IVF and HNSW stores of FAISS
vector_index        VectorIndex: build, add, search, save, load; no Ray
sharded/            the same over Ray actors
"""
