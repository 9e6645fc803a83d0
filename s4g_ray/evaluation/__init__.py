"""Turn embedding tables into scores.

ranking               exact ranks of references for a block of queries
gallery_parts         a gallery that is read part by part; its references near queries
gallery_search        the ranks of all queries over the parts of a gallery
metrics               retrieval_metrics: recall@k, AP, hit rate, metres; both protocols
distances             SDM@k and Dis@k: how far the first references are
top_references        the first few references of each query
scores                metrics of a split, as a whole and by region
query_results         what was found for each query, as Parquet or CSV
tables                Evaluation, and its tables for a terminal
gradient_correlation  a baseline without learning

    metrics = retrieval_metrics(query_embeddings, reference_embeddings, query_places, places)
    metrics["recall@1"]
"""
