"""Embedding tables into scores.

metrics               retrieval_metrics: recall@k, AP, hit rate, metres; both protocols
ranking               exact ranks of a block of queries
scores                metrics of a split, whole and by region
tables                Evaluation, and its tables for a terminal
gradient_correlation  a baseline without learning
"""
